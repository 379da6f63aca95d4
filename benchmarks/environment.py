"""What a figure was measured on, stored beside it."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy")


def environment(*packages: str) -> dict[str, Any]:
    """Command, commit (with a mark if the tree has changes), versions (of ``packages`` too), hardware."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "?",
    )
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks", "experiments")
    return {
        "command": " ".join(["python", str(Path(sys.argv[0]).resolve().relative_to(root)), *sys.argv[1:]]),
        "commit": git("rev-parse", "HEAD") + (" with changes" if changed else ""),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in (*_PACKAGES, *packages)},
        "hardware": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
    }
