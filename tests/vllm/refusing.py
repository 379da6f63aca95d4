"""Commands that must end by themselves, with one line that says why."""

import os
import subprocess
import sys
from pathlib import Path

from processes import wait_for

from conftest import VLLM_ARGS


def left_running(directory: Path) -> list[str]:
    """Processes that work in ``directory``: everything that was started there, whatever it calls itself now."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").readlink() == directory:
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has ended
            continue
    return found


def refused(directory: Path, *command: str, **variables: str) -> str:
    """What ``python -m COMMAND`` says before it ends with an error, started in ``directory``."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=directory,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode not in (0, None), done.stdout
    wait_for(lambda: not left_running(directory), 10, f"the end of {left_running(directory)}")
    return done.stdout


def insitu_refuses(
    directory: Path, model: Path, state_dir: Path, *options: str, vllm_args: str = "", port: str = "0", **variables: str
) -> str:
    """The one line of ``insitu serve --engine vllm`` about it."""
    command = [
        "insitu.cli",
        "serve",
        str(model),
        "--engine",
        "vllm",
        "--port",
        port,
        "--state-dir",
        str(state_dir),
        *options,
    ]
    told = refused(directory, *command, f"--vllm-args={VLLM_ARGS} {vllm_args}", **variables)
    lines = [line for line in told.splitlines() if line.startswith("insitu: ")]
    assert len(lines) == 1, told
    assert "Traceback" not in told
    return lines[0]
