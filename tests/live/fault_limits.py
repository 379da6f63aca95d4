"""Trials without room on the disk: from a point on a learner can write no more, and nobody dies."""

import resource
from contextlib import suppress
from typing import Any

from fault_plans import Kill
from fault_trials import Trials
from processes import wait_for

from insitu.live.client import Client


def limited(trials: Trials, number: int, kill: Kill, ask: str, *, restart: bool) -> dict[str, Any]:
    """No room on the disk from a point on: the head is served, and why nothing is learned is told. Then there is room."""
    wrong = [problem] if (problem := trials.settle()) else []
    first = len(trials.asker.replies)
    trials.asker.may_ask.set()
    with trials._client() as client:
        head = client.get("/v1/live")["head"]
        before = client.get("/v1/live")["learner"]["pid"]
        kills = [kill] if kill.point != "abandon" else [Kill("learner", "write", 5, ("learner",)), kill]
        trials._plan(f"full-{number}", [each.facts() for each in kills])
        asked = trials._ask(client, ask, number, head)
        live: dict[str, Any] = {}

        def told() -> bool:
            live.update(client.get("/v1/live"))
            return bool(live["learner"].get("problem"))

        with suppress(AssertionError):
            wait_for(told, trials.patience)
        problem = live["learner"].get("problem") or ""
        if live["state"] != "degraded" or str(trials.state_dir) not in problem or "free some" not in problem:
            wrong.append(f"the state is {live['state']!r}, the problem {problem!r}")
        done = trials.asker.complete
        wait_for(lambda: trials.asker.complete >= done + 2, 30, "replies on a full disk")
        wrong += _holds(trials, client, head)
        limited = live["learner"]["pid"]
        if kill.point != "abandon" and limited != before:
            wrong.append("the learner died of a full disk")
        if restart:
            trials._kill(("learner", "server"))
        else:
            resource.prlimit(limited, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if problem := trials.settle():
        wrong.append(problem)
    with trials._client() as client:
        live = client.get("/v1/live")
        if not restart and live["learner"]["pid"] != limited:
            wrong.append("it took another learner to go on")
        if live["head"] <= head or live["state"] not in ("serving", "learning"):
            wrong.append(f"with room again nothing was learned: {live}")
        for id in asked:
            if (item := client.get(f"/v1/feedback/{id}"))["status"] != "applied":
                wrong.append(f"feedback {id} is {item['status']}: {item['reason']}")
    trials.asker.may_ask.clear()
    wait_for(trials.asker.idle.is_set, 90, "the client to come to rest")
    return {**trials._check(first, asked, wrong), "wrong": wrong, "problem": live["learner"].get("problem")}


def _holds(trials: Trials, client: Client, head: int) -> list[str]:
    """The head is what is served, and no file is there that nobody committed."""
    live = client.get("/v1/live")
    wrong = trials._stray()
    if not live["weight_version"] == str(head) == str(live["head"]):
        wrong.append(f"{live['weight_version']} is served")
    found = next(v for v in client.get("/v1/live/versions")["data"] if v["id"] == head)
    if found["sha256"] != trials._served_sum():
        wrong.append(f"the weights in memory are not {found}")
    return wrong
