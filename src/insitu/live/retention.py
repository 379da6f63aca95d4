"""How much room versions may take: a refusal before the disk is full, and the end of versions that nobody can want back.

The rule: the last ``keep`` versions, every pinned one, the base and the served one stay; what no way to one of them leads over
is pruned. When the files that a complete checkpoint of the oldest kept version would make superfluous are larger than that
checkpoint, it is written, and they go.
"""

import errno
import logging
import shutil
from collections.abc import Iterable

from insitu.live.checkpoint import remove, write_checkpoint
from insitu.live.disk import usage
from insitu.live.routes import History
from insitu.live.versions import Versions

log = logging.getLogger("insitu.versions")

# Of the weights' bytes: what a version takes at most in all that was measured (bf16 0.12, fp32 more), and an undo image.
_LARGEST_DIFFERENCE = 1.0
_IMAGE = 1.0
_RESERVE = 64 << 20  # bytes left to the store and to logs


class NoRoomError(OSError):
    """There is no room for another version; nothing was changed. ``errno`` says whether it is the disk's limit or ours."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(errno, message)
        self._message = message

    def __str__(self) -> str:
        return self._message


def require_room(versions: Versions, weight_bytes: int, limit_gb: float | None) -> None:
    """Raises NoRoomError unless a version of the largest size fits, with a new undo image beside the old one."""
    needed = int((_LARGEST_DIFFERENCE + _IMAGE) * weight_bytes) + _RESERVE
    free = shutil.disk_usage(versions.directory).free
    if free < needed:
        raise NoRoomError(
            errno.ENOSPC,
            f"the disk of {versions.directory} has {free / 1e9:.2f} GB free, a lesson may need {needed / 1e9:.2f} GB; make "
            "room there, or keep fewer versions (--teach.keep-versions); learning goes on by itself",
        )
    if limit_gb is not None and (used := usage(versions.directory)) + needed - _RESERVE > limit_gb * 1e9:
        raise NoRoomError(
            errno.EDQUOT,
            f"{versions.directory} takes {used / 1e9:.2f} GB, a lesson may need {(needed - _RESERVE) / 1e9:.2f} GB more, the "
            f"limit is {limit_gb:g} GB; raise --teach.disk-limit-gb, or keep fewer versions",
        )


def tidy(versions: Versions, keep: int) -> list[int]:
    """Prune what the rule lets go; returns the pruned versions. For the learner alone: nobody may be writing a version.

    Raises:
        OSError: a checkpoint cannot be written; what needs none is pruned all the same.
        VersionError: a version that must stay cannot be rebuilt; nothing that it may need is pruned.
    """
    versions.discard_uncommitted()
    gone = _prune(versions, keep)  # before anything is written: there may be no room
    if (oldest := _worth_a_checkpoint(versions, keep)) is not None:
        recorded = versions.store.version(oldest)
        assert recorded is not None
        origin = {"version": oldest, "sha256": recorded.sha256, "base": str(versions.base)}
        # Not from the undo image, which a power cut may have torn: this is going to be the only copy.
        tensors = versions.rebuild(oldest, versions.full(images=False))
        write_checkpoint(versions.checkpoint(oldest), versions.base, tensors, origin, sha256=recorded.sha256)
        log.info("version %d was written in full", oldest)
        gone += _prune(versions, keep)
    return sorted(gone)


def _last(history: History, keep: int) -> list[int]:
    """The contents of the last versions."""
    return [history.content(id) for id in sorted(history.left())[-keep:]]


def _pinned(history: History) -> set[int]:
    return {id for id, version in history.known.items() if version.pinned}


def _superfluous(versions: Versions, history: History, keep: int, full: Iterable[int]) -> set[int]:
    """Versions over whose files no way from one of ``full`` to one that is kept leads. Rollbacks have no files."""
    kept = {0, *_last(history, keep), *(history.content(id) for id in _pinned(history))}
    ways = history.ways(full)
    used = set()
    for id in kept:
        route = history.route(id, ways)
        used |= {route.start, *(file for file, _ in route.steps)}
    with_files = {id for id in history.left() if versions.path(id).exists() or versions.checkpoint(id).exists()}
    return with_files - used - kept


def _worth_a_checkpoint(versions: Versions, keep: int) -> int | None:
    """The oldest of the last versions, if a checkpoint of it would make more superfluous than it takes."""
    history, full = versions.history(), versions.full(images=False)
    if not history.known or (oldest := min(_last(history, keep))) in full:
        return None
    beyond = _superfluous(versions, history, keep, [*full, oldest])
    saved = sum(usage(path) for id in beyond for path in (versions.path(id), versions.checkpoint(id)))
    return oldest if saved > sum(usage(file) for file in full[0]) else None


def _prune(versions: Versions, keep: int) -> list[int]:
    """First the store says that they are gone, then they go: nobody may find half of one."""
    while True:
        history = versions.history()
        if not history.known:
            return []
        superfluous = _superfluous(versions, history, keep, versions.full(images=False))
        gone = sorted(history.repeating(superfluous))
        if not gone:
            return []
        if versions.store.prune(gone, _pinned(history)):  # else somebody has pinned one meanwhile
            break
    log.info("pruned versions %s", gone)
    for id in superfluous:
        for path in (versions.path(id), versions.checkpoint(id)):
            if path.exists():
                remove(path)
    return gone
