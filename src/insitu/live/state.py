"""The state directory as a server finds it: private, real, whole, or refused in one sentence. Nothing in it is ever mended."""

import re
from pathlib import Path

from insitu.live.records import StateError
from insitu.live.store import Store
from insitu.live.weights import handles


def state_directory(given: Path) -> Path:
    """The directory, made if need be. StateError if it is a link or cannot be made, HandleError if others may enter it."""
    path = given.expanduser().absolute()
    if path.is_symlink():
        # Who can move the link can move the server to weights and keys of their choice. Links above it are the system's.
        raise StateError(
            f"{path} is a link to {path.readlink()}; a state directory must be a real one: name {path.resolve()} instead"
        )
    try:
        return handles.private_directory(path.resolve())
    except OSError as error:
        raise StateError(f"{path} cannot be made: {error.strerror}; choose another --state-dir") from error


def open_store(state_dir: Path) -> Store:
    """The store, read in full and compared with what lies beside it. For the start of a server; StateError, nothing changed."""
    path = state_dir / "insitu.db"
    versions = sorted(file.name for file in (state_dir / "versions").glob("*"))
    if versions and (not path.exists() or not path.stat().st_size):
        raise _without_versions(path, versions)
    store = Store(path)
    try:
        store.check()
        if versions and store.head() is None:
            raise _without_versions(path, versions)
        _refuse_unknown(path, versions, {version.id for version in store.versions()})
    except BaseException:
        store.close()
        raise
    return store


def _without_versions(path: Path, versions: list[str]) -> StateError:
    """A new store would be begun, and the files of versions it does not know would be deleted."""
    return StateError(
        f"{path} is missing or empty, but versions/ holds {len(versions)} files ({versions[0]}, ...); put a copy of the "
        f"whole state directory back, or move {path.parent} away to start anew"
    )


def _refuse_unknown(path: Path, versions: list[str], known: set[int]) -> None:
    """A version's id is in the store before its file is begun, so an unknown one is of a newer store: of a copy that was put
    back alone, or without its -wal. Left at that, the files it does not know would be deleted."""
    for name in versions:
        if (found := re.match(r"v(\d+)\b", name)) and int(found[1]) not in known:
            raise StateError(
                f"{path} does not know the version of versions/{name}: it is older than the files beside it. Put a copy of the "
                f"whole state directory back (insitu.db together with insitu.db-wal), or move versions/{name} away to go on "
                "without it"
            )
