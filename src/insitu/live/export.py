"""A version as a checkpoint of its own, for Transformers, vLLM or anybody else; no server need run."""

from pathlib import Path
from typing import Any

from insitu.live.checkpoint import VersionError, write_checkpoint
from insitu.live.store import Store
from insitu.live.versions import Versions


def export(state_dir: Path, version: int, directory: Path) -> dict[str, Any]:
    """Write ``version`` of a state directory to a new ``directory``. Returns what is written to its insitu-version.json.

    Raises:
        VersionError: there is no such version here, or its files are damaged.
        FileExistsError: ``directory`` exists.
        OSError: no room.
    """
    database = state_dir / "insitu.db"
    if not database.exists():  # opening it would make one
        raise VersionError(f"{state_dir} is not a state directory: it has no insitu.db")
    store = Store(database)
    try:
        base = store.get_meta("base")
        if base is None:
            raise VersionError(f"{state_dir} has never served a model")
        versions = Versions(state_dir, Path(base), store)
        content = versions.content(version)  # refuses one that does not exist before anything is written
        recorded = store.version(version)
        assert recorded is not None
        first = store.version(0)
        origin = {
            "version": version,
            "sha256": recorded.sha256,
            "base": "" if first is None else first.report.get("source", ""),
            "base_sha256": None if first is None else first.sha256,
        }
        # The base as it is on disk may be of another dtype than what is served, and has no digest then.
        sha256 = recorded.sha256 if content else None
        write_checkpoint(directory.absolute(), Path(base), versions.iter_version(version), origin, sha256=sha256)
        return origin
    finally:
        store.close()
