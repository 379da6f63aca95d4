"""Which process is killed where, drawn from a seed: the same seed, the same plan."""

import random
from dataclasses import asdict, dataclass
from typing import Any

STEPS = 3  # of every job


@dataclass(frozen=True)
class Kill:
    """``process`` passes ``point`` for the ``number``-th time, and ``delay`` seconds later the victims are gone. With a
    ``limit`` nobody dies: from there on the process can write no file beyond so many bytes."""

    process: str
    point: str
    number: int
    victims: tuple[str, ...]
    delay: float = 0.0
    limit: int | None = None

    def facts(self) -> dict[str, Any]:
        facts = asdict(self)
        return {"pass": facts.pop("number"), **facts}


@dataclass(frozen=True)
class Plan:
    """What is asked for (a lesson, or a rollback), and the kills on the way. ``after`` is the seconds to a kill at a random
    time, from outside; then there are no points."""

    name: str
    ask: str
    kills: tuple[Kill, ...] = ()
    after: float = 0.0
    victims: tuple[str, ...] = ()


# Point -> how often a job passes it, at least. "write" and "restore" are passed once for each tensor.
_IN_A_JOB = {
    "reserved": 1,
    "before pause": STEPS,
    "paused": STEPS,
    "marked": STEPS,
    "write": 0,
    "stamped": STEPS,
    "before publish": STEPS,
    "published": STEPS,
    "before resume": STEPS,
    "before file": 1,
    "fsync": 1,
    "rename": 1,
    "before commit": 1,
    "committed": 1,
}
_IN_A_ROLLBACK = {
    "before near": 1,
    "near": 1,
    "reserved": 1,
    "marked": 1,
    "restore": 0,
    "committed": 1,
    "stamped": 2,
    "before publish": 1,
    "before resume": 1,
}
_IN_THE_SERVER = {"recompute": STEPS, "recomputed": STEPS}
_VICTIMS = (("learner",), ("server",), ("learner", "server"))


def names() -> list[str]:
    """Every scenario once."""
    return [
        *(f"teach: {point}" for point in _IN_A_JOB),
        "teach: write, and again",
        *(f"rollback: {point}" for point in _IN_A_ROLLBACK),
        *(f"server: {point}" for point in _IN_THE_SERVER),
        *(f"repair: {point}" for point in ("repair", "restore", "recompute", "repaired")),
        "start: restore",
        "give up: abandon",
        *["any time"] * 4,
    ]


def draw(seed: int, number: int, tensors: int) -> Plan:
    """The plan of trial ``number``: all scenarios in a random order, then again in another."""
    every = names()
    turn, place = divmod(number, len(every))
    name = random.Random(f"{seed}/{turn}").sample(every, len(every))[place]
    return plan(name, random.Random(f"{seed}:{number}"), tensors)


def plan(name: str, choose: random.Random, tensors: int) -> Plan:
    kind, _, point = name.partition(": ")
    victims = choose.choice(_VICTIMS)
    # A thread kills in the middle of whatever comes next; without a delay, just here.
    delay = choose.choice((0.0, 0.0, choose.uniform(0.0, 0.02)))

    def often(passes: int, least: int = 1) -> int:
        return choose.randint(least, passes or tensors)

    if kind == "teach" and point == "write, and again":
        first = Kill("learner", "write", often(STEPS * tensors), ("learner",))
        return Plan(name, "teach", (first, Kill("learner", "write", often(STEPS * tensors), victims)))
    if kind == "teach":
        passes = STEPS * tensors if point == "write" else _IN_A_JOB[point]
        return Plan(name, "teach", (Kill("learner", point, often(passes), victims, delay),))
    if kind == "rollback":
        return Plan(name, "rollback", (Kill("learner", point, often(_IN_A_ROLLBACK[point]), victims, delay),))
    if kind == "server":
        return Plan(name, "teach", (Kill("server", point, often(_IN_THE_SERVER[point]), victims, delay),))
    torn = Kill("learner", "write", often(STEPS * tensors, 2), ("learner",))
    if kind == "repair":  # the server dies while it undoes what the learner left behind
        passes = tensors if point == "restore" else 1
        again = choose.choice((("server",), ("server",), ("learner", "server")))
        if point == "recompute":  # the publish after the restore: the job's own come before it
            torn = Kill("learner", "write", often(tensors, 2), ("learner",))
        return Plan(name, "teach", (torn, Kill("server", point, often(passes), again)))
    if kind == "start":  # a server dies while it brings the version up, after both were killed in a write
        both = Kill("learner", "write", torn.number, ("learner", "server"))
        return Plan(name, "teach", (both, Kill("server", "restore", often(2 * tensors), ("server",))))
    if kind == "give up":  # the next learner dies as it notes what the first one lost
        return Plan(name, "teach", (torn, Kill("learner", point, 1, victims)))
    return Plan(name, choose.choice(("teach", "teach", "rollback")), after=choose.uniform(0.0, 1.5), victims=victims)
