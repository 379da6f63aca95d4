"""The C++ kernels as a file: compiled while the package is installed where there is a compiler, else when they are asked for.

Standard library only: the build of the package (hatch_build.py) reads this file by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).with_name("cpp")
# Beside the source: the library that was made at installation, and what it was made of and for.
INSTALLED, RECORD = SOURCE.with_name("libnative.so"), SOURCE.with_name("libnative.json")
_FLAGS = (
    *("-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-ffp-contract=off"),
    *("-fno-strict-aliasing", "-fopenmp", "-fPIC", "-std=c++17"),
)
# What a compiler may use of the machine; what else /proc/cpuinfo lists changes with the kernel and the hypervisor.
_INSTRUCTIONS = re.compile(
    r"(sse|ssse|avx|amx|fma|f16c|bmi|abm|movbe|popcnt|gfni|vaes|vpclmul|pclmul|aes|adx|sha|cx16|lahf|rdrand|rdseed).*"
)


def find_compiler() -> tuple[str | None, str]:
    """The C++ compiler, or None, and what was looked for."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None), ", ".join(names)


def compile_to(out: Path) -> str | None:
    """Compile the kernels for this machine into ``out``; None, or why it could not be done."""
    compiler, names = find_compiler()
    if compiler is None:
        return f"no C++ compiler ({names})"
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor() as pool:
        objects = {str(source): str(Path(directory) / source.stem) for source in sorted(SOURCE.glob("*.cpp"))}
        commands = [[compiler, *_FLAGS, "-c", source, "-o", made] for source, made in objects.items()]
        # Their names (square, apply) are ordinary words: another library's must not be called in their place.
        link = [compiler, *_FLAGS, "-shared", "-Wl,-Bsymbolic", *objects.values(), "-o", str(out)]
        for ran in (*pool.map(_run, commands), _run(link)):
            if ran.returncode:
                said = (ran.stderr.strip() or "no message").splitlines()[0]
                return f"a C++ compiler that cannot make the kernels ({compiler} {' '.join(_FLAGS)}: {said})"
    return None


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def install() -> str | None:
    """Make the library beside the source; None, or why it could not be done, and then there is none."""
    INSTALLED.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=SOURCE.parent) as directory:
        out = Path(directory) / INSTALLED.name
        if (reason := compile_to(out)) is not None:
            return reason
        record = {"source": _digest(SOURCE), "library": _digest(out), "instructions": sorted(instructions())}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        out.replace(INSTALLED)
    return None


def installed() -> Path | None:
    """The library that was made at installation; None if there is none, or it is of another source or another machine."""
    try:
        record = json.loads(RECORD.read_text())
        whole = record["library"] == _digest(INSTALLED) and record["source"] == _digest(SOURCE)
        return INSTALLED if whole and set(record["instructions"]) <= instructions() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def instructions() -> set[str]:
    """The instruction sets of this machine's CPU, as Linux names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    words = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    arm = any(line.startswith("Features") for line in lines)
    return {word for word in words if arm or _INSTRUCTIONS.fullmatch(word)}


def _digest(path: Path) -> str:
    """sha256 of a file, or of the files of a folder with their names."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    found = "".join(f"{_digest(file)} {file.name}\n" for file in sorted(path.iterdir()))
    return hashlib.sha256(found.encode()).hexdigest()
