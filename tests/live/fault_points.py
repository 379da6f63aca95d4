"""Where the processes of a fault trial may be killed, and what they note for the check. Installed in forked children only.

A plan (``side/plan.json``) is a list of kills: ``{"process", "point", "pass", "delay", "victims"}``. Whoever passes the point
for the n-th time kills the victims, once; what was not fired before a restart can still fire after it.
"""

import contextlib
import json
import os
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import insitu.optim.base as optim_base
import insitu.optim.bundles as optim_bundles
from insitu.live import server as server_module
from insitu.live.control import EngineClient
from insitu.live.engines.batching import Batcher
from insitu.live.engines.embedded import EmbeddedEngine
from insitu.live.store import Store
from insitu.live.versions import Versions
from insitu.live.weights import attach
from insitu.live.weights.arena import Arena


class Label(str):
    """The name of the weights, and which publish gave it: a trial that was lost and done again has the same name twice."""

    serial: int

    def __new__(cls, name: str, serial: int = 0) -> "Label":
        label = super().__new__(cls, name)
        label.serial = serial
        return label


@contextlib.contextmanager
def unlimited() -> Iterator[None]:
    """The trial's own notes are no part of what it tries."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kept[1], kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


class Journal:
    """Lines of JSON that survive a SIGKILL of their writer."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, **facts: Any) -> None:
        with unlimited():
            os.write(self._fd, json.dumps({"time": time.monotonic(), **facts}).encode() + b"\n")


class Points:
    """The plan of the running trial, as one process sees it."""

    def __init__(self, role: str, side: Path) -> None:
        self.role = role
        self.side = side
        (side / f"{role}.pid").write_text(str(os.getpid()))
        self._fired = Journal(side / "fired.jsonl")
        self._counts: Counter[str] = Counter()
        self._seen = -1
        self._plan: dict[str, Any] = {"id": "", "kills": []}

    def at(self, point: str) -> None:
        file = self.side / "plan.json"
        if (seen := file.stat().st_mtime_ns) != self._seen:
            self._seen, self._plan = seen, json.loads(file.read_text())
            self._counts.clear()
        self._counts[point] += 1
        for number, kill in enumerate(self._plan["kills"]):
            if (kill["process"], kill["point"], kill["pass"]) == (self.role, point, self._counts[point]):
                once = self.side / "once" / f"{self._plan['id']}-{number}"
                if once.exists():
                    continue
                once.touch()
                self._fired.note(plan=self._plan["id"], which=number, **kill)
                if kill["limit"] is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (kill["limit"], resource.RLIM_INFINITY))
                elif kill["delay"]:
                    threading.Timer(kill["delay"], self._kill, [kill["victims"]]).start()
                else:
                    self._kill(kill["victims"])

    def _kill(self, victims: list[str]) -> None:
        for victim in sorted(victims, key=lambda name: name == self.role):  # itself last
            with contextlib.suppress(ProcessLookupError):  # it is dead already
                os.kill(int((self.side / f"{victim}.pid").read_text()), signal.SIGKILL)


def wrap(owner: Any, name: str, before: Callable[..., Any] | None, after: Callable[..., Any] | None = None) -> None:
    """Call ``before`` and ``after``, with the same arguments, around a function."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **options: Any) -> Any:
        if before is not None:
            before(*args, **options)
        result = original(*args, **options)
        if after is not None:
            after(*args, **options)
        return result

    setattr(owner, name, wrapped)


def pass_by(owner: Any, name: str, points: Points, before: str = "", after: str = "") -> None:
    wrap(
        owner,
        name,
        (lambda *_, **__: points.at(before)) if before else None,
        (lambda *_, **__: points.at(after)) if after else None,
    )


def _count_tensors(points: Points) -> None:
    """A restore passes a point before each tensor."""
    original = attach.fill

    def fill(views: Any, tensors: Iterable[Any], aliases: Any) -> None:
        def passing() -> Iterator[Any]:
            for item in tensors:
                points.at("restore")
                yield item

        original(views, passing(), aliases)

    attach.fill = fill


def in_learner(points: Points) -> None:
    side = points.side
    stamps = Journal(side / "stamps.jsonl")
    pass_by(Store, "reserve", points, before="before reserve", after="reserved")
    pass_by(EngineClient, "pause", points, before="before pause", after="paused")
    pass_by(EngineClient, "publish", points, before="before publish", after="published")
    pass_by(EngineClient, "resume", points, before="before resume")
    pass_by(Arena, "mark_writing", points, after="marked")
    pass_by(Versions, "bring_near", points, before="before near", after="near")
    pass_by(Versions, "write", points, before="before file", after="before commit")
    pass_by(os, "fsync", points, before="fsync")
    pass_by(os, "replace", points, before="rename")
    pass_by(Store, "commit", points, after="committed")
    pass_by(Store, "update_rollback", points, before="before note")
    pass_by(Store, "abandon", points, before="abandon")
    _count_tensors(points)
    optim_bundles._ELEMENTS = 1  # tensors go one by one, so that a kill can come between any two
    run = optim_base.run

    def run_and_pass(*args: Any, **options: Any) -> list[Callable[[Any], None]]:
        def passing(write: Callable[[Any], None]) -> Callable[[Any], None]:
            def one(backend: Any) -> None:
                points.at("write")
                write(backend)

            return one

        return [passing(write) for write in run(*args, **options)]

    optim_base.run = run_and_pass  # type: ignore[assignment]

    def keep_bytes(arena: Arena, version: int, step: int = 0) -> None:
        if step:
            file = side / "bytes" / f"{time.monotonic_ns()}.safetensors"
            with unlimited():
                save_file(arena.views(), file)
            stamps.note(label=f"{version}+{step}", file=file.name)

    wrap(Arena, "stamp", keep_bytes, lambda *_: points.at("stamped"))


def in_server(points: Points) -> None:
    side = points.side
    publishes, tokens = Journal(side / "publishes.jsonl"), Journal(side / "tokens.jsonl")
    pass_by(Batcher, "recompute", points, before="recompute", after="recomputed")
    pass_by(server_module, "repair", points, before="repair", after="repaired")
    _count_tensors(points)
    life = f"{os.getpid()}-{time.monotonic_ns()}"
    serials = iter(range(1, 1 << 60))
    publish, stream = EmbeddedEngine.publish, EmbeddedEngine._stream

    def publish_as(self: EmbeddedEngine, version: str) -> Any:
        label = Label(version, next(serials))
        publishes.note(life=life, serial=label.serial, label=version)
        return publish(self, label)

    async def noted(self: EmbeddedEngine, prompt_ids: list[int], params: Any) -> Any:
        request = f"{life}-{next(serials)}"
        tokens.note(request=request, life=life, prompt=prompt_ids)
        async with aclosing(stream(self, prompt_ids, params)) as made:
            async for token in made:
                serial = getattr(token.version, "serial", 0)
                tokens.note(request=request, id=token.id, logprob=token.logprob, label=token.version, serial=serial)
                yield token

    EmbeddedEngine.publish = publish_as  # type: ignore[method-assign]
    EmbeddedEngine._stream = noted  # type: ignore[method-assign, assignment]


def mutate(mutant: str) -> None:
    """Break one promise, to see that the trials find it out."""
    if mutant == "no-write-mark":
        Arena.mark_writing = lambda self: None  # type: ignore[method-assign]
    elif mutant == "no-repair":

        def resume_only(engine: Any, header: Any, head: int, restore: Any, paused: bool) -> None:
            if paused:
                engine.resume()

        server_module.repair = resume_only
    elif mutant == "stale-cache":
        Batcher.recompute = lambda self: 0  # type: ignore[method-assign]
    elif mutant:
        raise ValueError(f"unknown mutant {mutant!r}")
