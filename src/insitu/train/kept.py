"""The last good checkpoint, out of reach of Trainer's rotation: ``good-STEP`` beside ``checkpoint-STEP``.

Its files are hard links, so it takes no room while the checkpoint is there, and stays when that is rotated away.
"""

import os
import re
import shutil
from pathlib import Path

from insitu.data.durable import fsync, sync

_NAME = re.compile(r"good-(\d+)(\.old)?")


def keep(checkpoint: Path) -> Path:
    """Keep ``checkpoint-STEP`` as ``good-STEP`` and let go of the good ones before it.

    The new one is whole before the old one goes, and an old one of the same name has another first: a kill at any line leaves
    one that :func:`last_good` finds.
    """
    step = int(checkpoint.name.rpartition("-")[2])
    good, beside = checkpoint.parent / f"good-{step}", checkpoint.parent / f".good-{step}.new"
    if beside.exists():
        shutil.rmtree(beside)
    shutil.copytree(checkpoint, beside, copy_function=_link)
    sync(beside)
    older = all_kept(checkpoint.parent)
    if good in older:
        old = good.with_name(good.name + ".old")
        if old in older:
            shutil.rmtree(old)
        older = [old if path == good else path for path in older if path != old]
        good.rename(old)
    beside.rename(good)
    fsync(checkpoint.parent)
    for path in older:
        shutil.rmtree(path)
    return good


def all_kept(output_dir: Path) -> list[Path]:
    """The good checkpoints in ``output_dir``, by their steps."""
    found = [(match, path) for path in output_dir.glob("good-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda pair: (int(pair[0][1]), not pair[0][2]))]


def last_good(output_dir: Path) -> Path | None:
    """The newest good checkpoint; ``Trainer.train(resume_from_checkpoint=...)`` takes it."""
    found = all_kept(output_dir)
    return found[-1] if found else None


def part_from(output_dir: Path, step: int) -> None:
    """Before a run starts again at ``step``: it will write checkpoint-N for N > step anew, into the files that it finds there,
    and a good one must not change with them. So those get files of their own."""
    for good in all_kept(output_dir):
        match = _NAME.fullmatch(good.name)
        assert match
        if int(match[1]) > step:
            for path in [path for path in good.rglob("*") if path.is_file() and path.stat().st_nlink > 1]:
                beside = path.with_name(path.name + ".new")
                shutil.copy2(path, beside)
                fsync(beside)
                beside.replace(path)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links: the same files, at the price of their bytes
        shutil.copy2(source, target)
