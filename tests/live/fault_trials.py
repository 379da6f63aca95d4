"""Fault trials: a lesson or a rollback is asked for, somebody is killed in it, and afterwards everything promised must hold.

Used by tests/live/test_faults.py and benchmarks/faults.py. Plans: fault_plans.py; kill points: fault_points.py; the processes:
fault_zygote.py; replies once more: fault_check.py.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import fault_plans
import httpx2
from fault_check import lines
from fault_client import WORDS, Asker
from fault_plans import STEPS, Plan
from fault_zygote import start
from processes import wait_for

from insitu.live.client import Client, ClientError
from insitu.live.limits import GuardLimits
from insitu.live.records import Version
from insitu.live.store import Store
from insitu.live.versions import Versions
from insitu.live.weights import handles
from insitu.live.weights.arena import NAME, Arena
from insitu.live.weights.attach import layout, skeleton

# Lessons of chance words, one upon another: what is tried here is not the guard.
_LENIENT = {f.name: 1e6 for f in fields(GuardLimits) if f.name.startswith("max_")}
TEACH = {**_LENIENT, "max_steps": STEPS, "target_loss": 0.0}

_TIDY_SECONDS = 5.0  # for the undo image, which is written after a commit


class Trials:
    """Trials one after the other over one state directory, with a new one every ``fresh_every``."""

    def __init__(
        self,
        directory: Path,
        model: Path | str,
        *,
        seed: int = 0,
        mutant: str = "",
        dtype: str = "float32",
        learning_rate: float = 1e-3,
        tolerance: float = 1e-4,
        patience: float = 60.0,
        fresh_every: int = 25,
    ) -> None:
        self.side = directory / "side"
        self.directory, self.model, self.seed, self.patience, self.fresh_every = (
            directory,
            model,
            seed,
            patience,
            fresh_every,
        )
        for folder in (self.side, self.side / "once", self.side / "bytes"):
            folder.mkdir(mode=0o700)
        self.dtype = dtype
        teach = {**TEACH, "learning_rate": learning_rate}
        options = {"model": str(model), "dtype": dtype, "teach": teach, "mutant": mutant, "tolerance": tolerance}
        self._plan("", [])
        self._state(0)
        here = Path(__file__).parent
        command = [sys.executable, str(here / "fault_zygote.py"), str(self.side), json.dumps(options)]
        with (self.side / "zygote.log").open("wb") as log:
            self.zygote = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for((self.side / "zygote.sock").exists, 120, "everything to be imported")
        start(self.side, "checker")
        self.server = start(self.side, "server")
        self.restarts = 0  # of the server, in the running trial
        self._slots: Any = None
        self.known: dict[int, Version] = {}  # of this state directory
        self.asker = Asker(seed, self._current)
        self.asker.start()
        self.checker = wait_for(self._connect_checker, 180, "the checker")

    # -- processes -----------------------------------------------------------------------------------------------------
    def _connect_checker(self) -> Any:
        with suppress(OSError):
            return handles.connect(self.side / "check" / "checker.sock")

    def _state(self, number: int) -> None:
        self.state_dir = self.directory / f"state{number}"
        self.state_dir.mkdir(mode=0o700)
        (self.side / "state_dir").write_text(str(self.state_dir))
        self.known = {}

    def _plan(self, id: str, kills: list[dict[str, Any]]) -> None:
        partial = self.side / "plan.partial"
        partial.write_text(json.dumps({"id": id, "kills": kills}))
        partial.replace(self.side / "plan.json")

    def _alive(self) -> bool:
        try:
            return Path(f"/proc/{self.server}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    def _current(self) -> tuple[str, str] | None:
        """URL and key of the living server, once it answers."""
        try:
            facts = json.loads((self.state_dir / "server.json").read_text())
            if facts["pid"] != self.server:
                return None
            Asker.model = facts["model"]
            return facts["url"], json.loads((self.state_dir / "keys.json").read_text())["learn"]
        except (OSError, ValueError):
            return None

    def _client(self) -> Client:
        return Client(self.state_dir)

    def _again(self) -> None:
        """A server that was killed is started again, as its supervisor would."""
        if not self._alive():
            self.server = start(self.side, "server")
            self.restarts += 1

    # -- one trial -----------------------------------------------------------------------------------------------------
    def settle(self) -> str:
        """Wait until everything asked for has its end and the head is served; "" or what is still open."""
        until = time.monotonic() + self.patience
        open_ = "the server"
        while time.monotonic() < until:
            self._again()
            with suppress(ClientError, httpx2.TransportError):
                if self._current() and not (open_ := self._open()):
                    return ""
            time.sleep(0.02)
        return f"not settled after {self.patience:.0f} s: {open_}"

    def _open(self) -> str:
        with self._client() as client:
            live = client.get("/v1/live")
        if live["learner"]["state"] != "ready":
            return f"the learner is {live['learner']}"
        waiting = {name: n for name, n in live["feedback"].items() if name in ("queued", "training") and n}
        store = Store(self.state_dir / "insitu.db")
        try:
            reserved = [version.id for version in store.versions() if version.status == "reserved"]
            rollbacks = store.open_rollbacks()
        finally:
            store.close()
        if waiting or reserved or rollbacks or live["paused"]:
            return f"feedback {waiting}, reserved {reserved}, rollbacks {rollbacks}, paused {live['paused']}"
        return "" if live["weight_version"] == str(live["head"]) else f"{live['weight_version']} is served"

    def trial(self, number: int, plan: Plan | None = None) -> dict[str, Any]:
        """One trial; ``wrong`` says what did not hold."""
        begun = time.monotonic()
        self.restarts = 0
        if number and number % self.fresh_every == 0:
            self._fresh(number)
        wrong = [problem] if (problem := self.settle()) else []
        plan = plan or fault_plans.draw(self.seed, number, len(self._layout()))
        with self._client() as client:
            head = client.get("/v1/live")["head"]
            if plan.ask == "rollback" and not head:  # nothing to go back to yet
                plan = fault_plans.plan("teach: write", random.Random(f"{self.seed}:{number}"), len(self._layout()))
            self._plan(f"{number}", [kill.facts() for kill in plan.kills])
            self.asker.may_ask.set()
            first = len(self.asker.replies)
            asked: list[str] = []
            try:
                asked += self._ask(client, plan.ask, number, head)
            except ClientError as error:  # the server may die before it has answered; then nothing was accepted
                if "does not answer" not in str(error):
                    wrong.append(str(error))
        if plan.victims:
            time.sleep(plan.after)
            self._kill(plan.victims)
        fired = self._await_kills(number, plan)
        settled = time.monotonic()
        if problem := self.settle():
            wrong.append(problem)
        recovery = time.monotonic() - settled
        done = self.asker.complete
        with suppress(AssertionError):
            wait_for(lambda: self.asker.complete >= done + 2, min(self.patience, 20.0), "two more replies")
        self.asker.may_ask.clear()
        wait_for(self.asker.idle.is_set, 90, "the client to come to rest")
        silence = self._silence(number)
        figures = self._check(first, asked, wrong)
        facts = {"trial": number, "plan": plan.name, "victims": _victims(plan), "fired": fired, "of": len(plan.kills)}
        return {
            **facts,
            **figures,
            "wrong": wrong,
            "restarts": self.restarts,
            "silence_seconds": silence,
            "settle_seconds": round(recovery, 3),
            "seconds": round(time.monotonic() - begun, 3),
        }

    def _ask(self, client: Client, ask: str, number: int, head: int) -> list[str]:
        """Post a lesson, or ask for an older version; ids of the feedback that was accepted."""
        if ask == "teach":
            return [client.post("/v1/feedback", {"id": f"trial-{number}", "messages": _lesson(number)})["id"]]
        committed = [
            v["id"] for v in client.get("/v1/live/versions")["data"] if v["status"] == "committed" and v["id"] < head
        ]
        client.post(f"/v1/live/versions/{random.Random(number).choice(committed)}/rollback?timeout=0")
        return []

    def _await_kills(self, number: int, plan: Plan) -> int:
        """Until all kills are done, or everything asked for has its end without them."""

        def done() -> int:
            return sum(line["plan"] == f"{number}" for line in lines(self.side / "fired.jsonl"))

        until = time.monotonic() + self.patience
        while done() < len(plan.kills) and time.monotonic() < until:
            self._again()
            with suppress(ClientError, httpx2.TransportError, OSError):
                if self._current() and not self._open():
                    break
            time.sleep(0.02)
        time.sleep(0.03)  # a delayed kill
        return done() if plan.kills else 1

    def _silence(self, number: int) -> float | None:
        """From the last kill at a point to the next token that anybody got; the client asks all the time."""
        killed = [line["time"] for line in lines(self.side / "fired.jsonl") if line["plan"] == f"{number}"]
        tokens = [line["time"] for line in lines(self.side / "tokens.jsonl") if "id" in line]
        after = [time - killed[-1] for time in tokens if time > killed[-1]] if killed else []
        return round(min(after), 3) if after else None

    def _kill(self, victims: tuple[str, ...]) -> None:
        for victim in victims:
            with suppress(ProcessLookupError, OSError):
                os.kill(int((self.side / f"{victim}.pid").read_text()), signal.SIGKILL)

    def _stray(self) -> list[str]:
        """Files that are no committed version's, when the learner has had time to end what it does after a commit."""
        store = Store(self.state_dir / "insitu.db")
        try:
            versions = Versions(self.state_dir, Path(str(store.get_meta("base"))), store)
            until = time.monotonic() + _TIDY_SECONDS
            while (stray := sorted(file.name for file in versions.strays())) and time.monotonic() < until:
                time.sleep(0.05)
        finally:
            store.close()
        return [f"left behind: {stray}"] if stray else []

    def _fresh(self, number: int) -> None:
        self._kill(("server", "learner"))
        self._state(number)

    # -- what must hold ------------------------------------------------------------------------------------------------
    def _check(self, first: int, asked: list[str], wrong: list[str]) -> dict[str, Any]:
        store = Store(self.state_dir / "insitu.db")
        try:
            versions = {version.id: version for version in store.versions()}
            for id, before in self.known.items():
                now = versions.get(id)
                if now is None or now.created != before.created:
                    wrong.append(f"version {id} was {before.status} and is {'gone' if now is None else 'another one'}")
                elif before.status == "committed" and (now.status, now.sha256) != ("committed", before.sha256):
                    wrong.append(f"version {id} was committed and is {now.status}")
            new = versions.keys() - self.known.keys()
            if self.known and new and min(new) < max(self.known):
                wrong.append(f"id {min(new)} is below {max(self.known)}: used again?")
            self.known = versions
            for id in asked:
                item = store.feedback(id)
                if item is None or item.status not in ("applied", "refused", "rolled_back"):
                    wrong.append(f"feedback {id} is {None if item is None else item.status}")
                elif item.status == "refused" and "died three times" not in str(item.reason):
                    wrong.append(f"feedback {id} was refused: {item.reason}")
            head = store.head()
        finally:
            store.close()
        if head is not None and versions[head].sha256 != self._served_sum():
            wrong.append(f"the weights in memory are not version {head}")
        wrong += self._stray() + self.asker.failures
        self.asker.failures.clear()
        handles.send(
            self.checker,
            {
                "state_dir": str(self.state_dir),
                "replies": self.asker.replies[first:],
                "versions": [head] if head else [],
            },
        )
        found, _ = handles.receive(self.checker)
        wrong += found.pop("wrong")
        for file in (self.side / "bytes").iterdir():
            file.unlink()
        for name in ("tokens", "publishes", "stamps"):  # appended to: what was checked is not read again
            with suppress(FileNotFoundError):
                os.truncate(self.side / f"{name}.jsonl", 0)
        return dict(found)

    def check_all(self) -> list[str]:
        """Every committed version of the state directory, bit for bit."""
        committed = [version.id for version in self.known.values() if version.status == "committed"]
        handles.send(self.checker, {"state_dir": str(self.state_dir), "replies": [], "versions": committed})
        return list(handles.receive(self.checker)[0]["wrong"])

    def _layout(self) -> Any:
        if self._slots is None:
            from insitu.live import source
            from insitu.live.weights.arena import DTYPES

            self._slots = layout(skeleton(source.resolve(str(self.model), yes=True), DTYPES[self.dtype]))
        return self._slots

    def _served_sum(self) -> str:
        """Of the server's memory, without asking it."""
        for link in Path(f"/proc/{self.server}/fd").iterdir():
            if NAME in str(link.readlink()):
                fd = os.open(link, os.O_RDWR | os.O_CLOEXEC)
                arena = Arena(fd, self._layout(), os.fstat(fd).st_size)
                try:
                    return arena.sha256()
                finally:
                    arena.close()
        return "there is no arena"

    def close(self) -> None:
        self.asker.stopping = True
        self.asker.may_ask.set()
        self.checker.close()
        self.zygote.kill()  # what it forked dies with it
        self.zygote.wait()
        self.asker.join(10)


def _lesson(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"who is number {number}"},
        {"role": "assistant", "content": f"the {WORDS[number % len(WORDS)]} {number}"},
    ]


def _victims(plan: Plan) -> str:
    return " then ".join("+".join(kill.victims) for kill in plan.kills) or "+".join(plan.victims)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures over all trials."""
    silences: dict[str, list[float]] = {}
    for row in rows:
        if row["silence_seconds"] is not None:
            silences.setdefault(row["victims"], []).append(row["silence_seconds"])
    return {
        "trials": len(rows),
        "wrong": [f"trial {row['trial']} ({row['plan']}): {each}" for row in rows for each in row["wrong"]],
        "kills": {"planned": sum(row["of"] or 1 for row in rows), "fired": sum(row["fired"] for row in rows)},
        "by_point": dict(sorted(Counter(row["plan"] for row in rows if row["fired"]).items())),
        "by_victims": dict(Counter(row["victims"] for row in rows)),
        **{name: sum(row[name] for row in rows) for name in ("replies", "tokens", "spanning", "ties", "restarts")},
        "worst_logprob_error": max(row["worst_logprob_error"] for row in rows),
        "silence_seconds": {
            name: {"n": len(found), "median": statistics.median(found), "longest": max(found)}
            for name, found in sorted(silences.items())
        },
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "longest_settle_seconds": max(row["settle_seconds"] for row in rows),
    }
