"""Tests that run on several processes at once.

``@on_ranks(2, 4)`` makes a function a test for each of these numbers of processes. All selected tests of one number share one
set of processes, which is started when the first of them is asked for; each process runs the functions in the same order and
reports every one by itself. What is collected by pytest here only looks up what the processes said.

A process that a test holds up for too long says where it stands and ends itself, so that a deadlock is the failure of that
test; the tests after it then fail as not reached.
"""

import faulthandler
import importlib
import inspect
import json
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

_CASE_SECONDS = 60  # of one test; the longest takes 6, of two processes on one core
_ALL_SECONDS = 540  # of all tests of one number of processes; they take 30 on one core that has nothing else to do
_PRELOAD = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.tensor.parallel",
]


class Case(NamedTuple):
    """One test, in the words of the processes that run it."""

    name: str
    module: str
    function: str
    arguments: dict[str, Any]


def on_ranks(*worlds: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run the function in so many processes.

    Beside what it is parametrised with it may take ``world`` and ``shared_path``, a folder that all processes of the test see.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        taken = list(inspect.signature(function).parameters.values())
        asked = [p for p in taken if p.name not in ("world", "shared_path")]

        def test(
            outcomes: Callable[[int], dict[str, str]], world: int, request: pytest.FixtureRequest, **_: Any
        ) -> None:
            error = outcomes(world)[request.node.nodeid]
            if error:
                pytest.fail(error, pytrace=False)

        fixtures = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in ("outcomes", "world", "request")]
        test.__signature__ = inspect.Signature([*asked, *fixtures])  # type: ignore[attr-defined]
        test.__name__, test.__doc__, test.__module__ = function.__name__, function.__doc__, function.__module__
        test.body = function  # type: ignore[attr-defined]
        # The first test that asks waits for all of them.
        patient = pytest.mark.timeout(_ALL_SECONDS + 30)(test)
        return pytest.mark.parametrize("world", worlds, ids=[f"{n} ranks" for n in worlds])(patient)

    return decorate


def case_of(item: pytest.Item) -> Case | None:
    """What the processes need to know of a collected test; None if it is not one of theirs."""
    function = getattr(item, "function", None)
    if not hasattr(function, "body"):
        return None
    return Case(item.nodeid, function.__module__, function.__name__, dict(item.callspec.params))  # type: ignore[attr-defined]


def run_cases(world: int, cases: Sequence[Case], folder: Path) -> dict[str, str]:
    """Run the tests on ``world`` processes; the answer has what went wrong with each, "" where nothing did."""
    context = multiprocessing.get_context("forkserver")  # one import of torch for all
    context.set_forkserver_preload(
        [*_PRELOAD, *(["transformers.trainer"] if any("trainer" in c.module for c in cases) else [])]
    )
    processes = [context.Process(target=_work, args=(rank, world, cases, folder), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + _ALL_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    said = [_read(folder, rank) for rank in range(world)]
    for of_rank, process in zip(said, processes, strict=True):
        if process.exitcode and len(of_rank) == len(cases):
            of_rank[cases[-1].name] += f"after it, and all others, the process ended with {process.exitcode}"
    return {case.name: _verdict(number, case, said, folder) for number, case in enumerate(cases)}


def _read(folder: Path, rank: int) -> dict[str, str]:
    path = folder / f"{rank}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(map(json.loads, lines))


def _verdict(number: int, case: Case, said: list[dict[str, str]], folder: Path) -> str:
    ranks_of: dict[str, list[int]] = {}
    for rank, of_rank in enumerate(said):
        if case.name in of_rank:
            error = of_rank[case.name]
        elif number == len(of_rank):
            held = folder / f"{rank}.held"
            error = "did not come to the end of it\n" + (held.read_text() if held.exists() else "")
        else:
            error = f"did not reach it, but got stuck after {len(of_rank)} tests"
        if error:
            ranks_of.setdefault(error, []).append(rank)
    return "\n".join(f"ranks {ranks}: {error}" for error, ranks in ranks_of.items())


def _work(rank: int, world: int, cases: Sequence[Case], folder: Path) -> None:
    """What one process does."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        GLOO_SOCKET_IFNAME="lo", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1",  # unset, accelerate warns
    )  # fmt: skip
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # Of an output that nn.Linear has as a view: nobody writes into it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=_CASE_SECONDS))
    with (folder / f"{rank}.jsonl").open("w") as report, (folder / f"{rank}.held").open("w") as held:
        for number, case in enumerate(cases):
            faulthandler.dump_traceback_later(_CASE_SECONDS, exit=True, file=held)
            torch.manual_seed(0)
            error = _error_of(case, folder / str(number))
            print(json.dumps([case.name, error]), file=report, flush=True)
            # Not a collective: one that a failed test has left unanswered must not be taken for it.
            store.set(f"end/{number}/{rank}", "")
            store.wait([f"end/{number}/{r}" for r in range(world)], timedelta(seconds=_CASE_SECONDS))
            faulthandler.cancel_dump_traceback_later()
    dist.barrier()
    dist.destroy_process_group()


def _error_of(case: Case, shared_path: Path) -> str:
    try:
        function = getattr(importlib.import_module(case.module), case.function).body
        wanted = inspect.signature(function).parameters
        shared_path.mkdir(exist_ok=True)
        arguments = {**case.arguments, "shared_path": shared_path}
        function(**{name: value for name, value in arguments.items() if name in wanted})
    except BaseException:
        return traceback.format_exc()
    return ""
