"""Runs that are killed, each in a process forked from this one: started once by the test, because imports take seconds.

Reads trials as JSON lines: {"config": sections, "resume": bool, "kill": null | number}. ``kill`` n is SIGKILL at the n-th time
that the run is about to change something under its output directory: open a file to write, rename, remove, make a directory.
Answers with {"status": exit code or -signal, "writes": how many there were}.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from insitu.train.config import resolve
from insitu.train.prepare import prepare

_EVENTS = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "shutil.rmtree": 0}


def run(trial: dict[str, Any], report: int) -> None:
    output_dir, count = str(Path(trial["config"]["training"]["output_dir"]).absolute()), 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in _EVENTS:
            path = arguments[_EVENTS[event]]
        else:
            return
        # Removing a tree names its parts relative to an open directory.
        if not str(path).startswith(output_dir) and event not in ("os.remove", "os.rmdir"):
            return
        count += 1
        if count == trial["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    prepare(resolve(trial["config"]), resume=trial["resume"]).train()
    os.write(report, str(count).encode())


def main() -> None:
    torch.set_num_threads(1)  # a forked process must not miss the threads of this one
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run(json.loads(line), write)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(write)
        _, status = os.waitpid(child, 0)
        told = os.read(read, 100).decode()
        os.close(read)
        answer = {"status": os.waitstatus_to_exitcode(status), "writes": int(told) if told else None}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


main()
