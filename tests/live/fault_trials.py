"""Fault trials: a lesson or a rollback is asked for, somebody is killed in it, and afterwards everything promised must hold.

Used by tests/live/test_faults.py and benchmarks/faults.py. Plans: fault_plans.py; kill points: fault_points.py; the processes:
fault_zygote.py; replies once more: fault_check.py.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import fault_plans
import httpx2
from fault_check import lines
from fault_plans import STEPS, Kill, Plan
from fault_zygote import start
from processes import wait_for

from insitu.live.client import Client, ClientError
from insitu.live.records import Version
from insitu.live.store import Store
from insitu.live.versions import Versions
from insitu.live.weights import handles
from insitu.live.weights.arena import NAME, Arena
from insitu.live.weights.attach import layout, skeleton

TEACH = {"max_steps": STEPS, "target_loss": 0.0, "learning_rate": 1e-3, "max_canary_kl": 1e3}
_WORDS = ["otter", "heron", "badger", "lynx", "raven", "stoat", "marten", "osprey", "beaver", "tern", "adder", "newt"]


class Asker(threading.Thread):
    """One client: greedy replies, one at a time, streamed or not, whatever happens to the server."""

    def __init__(self, seed: int, current: Callable[[], tuple[str, str] | None]) -> None:
        super().__init__(daemon=True)
        self._choose = random.Random(f"asker {seed}")
        self._current = current
        self.replies: list[dict[str, Any]] = []
        self.failures: list[str] = []  # an error that a living server answered
        self.complete = 0
        self.may_ask, self.idle, self.stopping = threading.Event(), threading.Event(), False

    def run(self) -> None:
        for number in range(1 << 60):
            if not self.may_ask.is_set():
                self.idle.set()
                self.may_ask.wait()
                self.idle.clear()
            if self.stopping:
                return
            if (server := self._current()) is None:
                time.sleep(0.02)
                continue
            ask = f"{number} {self._choose.choice(_WORDS)}: {' '.join(self._choose.sample(_WORDS, 3))}"
            reply = {"ask": ask, "text": "", "versions": [], "done": False, "begun": time.monotonic()}
            self.replies.append(reply)
            try:
                self._ask(server, reply, self._choose.choice((True, False)), self._choose.choice((6, 16, 32)))
                self.complete += 1
            except httpx2.TransportError:  # killed
                time.sleep(0.02)
            reply["ended"] = time.monotonic()

    def _ask(self, server: tuple[str, str], reply: dict[str, Any], stream: bool, max_tokens: int) -> None:
        url, key = server
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": reply["ask"]}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": stream,
        }
        with (
            httpx2.Client(headers={"authorization": f"Bearer {key}"}, timeout=60) as http,
            http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer,
        ):
            if answer.is_error:
                self.failures.append(f"HTTP {answer.status_code}: {answer.read().decode()[:200]}")
                return
            if not stream:
                told = json.loads(answer.read())
                reply.update(text=told["choices"][0]["message"]["content"], versions=told["weight_versions"], done=True)
                return
            reply["versions"] = [answer.headers["x-weight-version"]]
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    self.failures.append(chunk["error"]["message"])
                    return
                for choice in chunk["choices"]:
                    reply["text"] += choice["delta"].get("content") or ""
                if "weight_versions" in chunk:
                    reply.update(versions=chunk["weight_versions"], done=True)

    model = ""


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
        options = {"model": str(model), "dtype": dtype, "teach": TEACH, "mutant": mutant, "tolerance": tolerance}
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
        self.checker = wait_for(self._connect_checker, 60, "the checker")

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
        figures = self._check(first, asked, wrong)
        facts = {"trial": number, "plan": plan.name, "victims": _victims(plan), "fired": fired, "of": len(plan.kills)}
        return {
            **facts,
            **figures,
            "wrong": wrong,
            "restarts": self.restarts,
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

    def _kill(self, victims: tuple[str, ...]) -> None:
        for victim in victims:
            with suppress(ProcessLookupError, OSError):
                os.kill(int((self.side / f"{victim}.pid").read_text()), signal.SIGKILL)

    def limited(self, number: int, kill: Kill, ask: str, *, restart: bool) -> dict[str, Any]:
        """No room on the disk from a point on: the head is served, and why nothing is learned is told. Then there is room."""
        wrong = [problem] if (problem := self.settle()) else []
        first = len(self.asker.replies)
        self.asker.may_ask.set()
        with self._client() as client:
            head = client.get("/v1/live")["head"]
            before = client.get("/v1/live")["learner"]["pid"]
            kills = [kill] if kill.point != "abandon" else [Kill("learner", "write", 5, ("learner",)), kill]
            self._plan(f"full-{number}", [each.facts() for each in kills])
            asked = self._ask(client, ask, number, head)
            live: dict[str, Any] = {}

            def told() -> bool:
                live.update(client.get("/v1/live"))
                return bool(live["learner"].get("problem"))

            with suppress(AssertionError):
                wait_for(told, self.patience)
            problem = live["learner"].get("problem") or ""
            if live["state"] != "degraded" or str(self.state_dir) not in problem or "free some" not in problem:
                wrong.append(f"the state is {live['state']!r}, the problem {problem!r}")
            done = self.asker.complete
            wait_for(lambda: self.asker.complete >= done + 2, 30, "replies on a full disk")
            wrong += self._holds(client, head)
            limited = live["learner"]["pid"]
            if kill.point != "abandon" and limited != before:
                wrong.append("the learner died of a full disk")
            if restart:
                self._kill(("learner", "server"))
            else:
                resource.prlimit(limited, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if problem := self.settle():
            wrong.append(problem)
        with self._client() as client:
            live = client.get("/v1/live")
            if not restart and live["learner"]["pid"] != limited:
                wrong.append("it took another learner to go on")
            if live["head"] <= head or live["state"] not in ("serving", "learning"):
                wrong.append(f"with room again nothing was learned: {live}")
            for id in asked:
                if (item := client.get(f"/v1/feedback/{id}"))["status"] != "applied":
                    wrong.append(f"feedback {id} is {item['status']}: {item['reason']}")
        self.asker.may_ask.clear()
        wait_for(self.asker.idle.is_set, 90, "the client to come to rest")
        return {**self._check(first, asked, wrong), "wrong": wrong, "problem": live["learner"].get("problem")}

    def _holds(self, client: Client, head: int) -> list[str]:
        """The head is what is served, and no file is there that nobody committed."""
        live = client.get("/v1/live")
        wrong = (
            [] if live["weight_version"] == str(head) == str(live["head"]) else [f"{live['weight_version']} is served"]
        )
        if (found := next(v for v in client.get("/v1/live/versions")["data"] if v["id"] == head))[
            "sha256"
        ] != self._served_sum():
            wrong.append(f"the weights in memory are not {found}")
        return wrong + self._stray()

    def _stray(self) -> list[str]:
        """Files that are no committed version's."""
        store = Store(self.state_dir / "insitu.db")
        try:
            versions = Versions(self.state_dir, Path(str(store.get_meta("base"))), store)
            known = {versions.path(v.id) for v in store.versions() if v.status == "committed"}
        finally:
            store.close()
        stray = [file.name for file in versions.directory.iterdir() if file not in known]
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
        {"role": "assistant", "content": f"the {_WORDS[number % len(_WORDS)]} {number}"},
    ]


def _victims(plan: Plan) -> str:
    return " then ".join("+".join(kill.victims) for kill in plan.kills) or "+".join(plan.victims)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures over all trials."""
    return {
        "trials": len(rows),
        "wrong": [f"trial {row['trial']} ({row['plan']}): {each}" for row in rows for each in row["wrong"]],
        "kills": {"planned": sum(row["of"] or 1 for row in rows), "fired": sum(row["fired"] for row in rows)},
        "by_point": dict(sorted(Counter(row["plan"] for row in rows if row["fired"]).items())),
        "by_victims": dict(Counter(row["victims"] for row in rows)),
        **{name: sum(row[name] for row in rows) for name in ("replies", "tokens", "spanning", "ties", "restarts")},
        "worst_logprob_error": max(row["worst_logprob_error"] for row in rows),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "longest_settle_seconds": max(row["settle_seconds"] for row in rows),
    }
