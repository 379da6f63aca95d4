"""The state directory as a server finds it: private, real, whole, or refused in one sentence. Nothing in it is ever mended."""

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
    versions = sorted(file.name for file in (state_dir / "versions").glob("*") if file.suffix != ".partial")
    if versions and (not path.exists() or not path.stat().st_size):
        raise _without_versions(path, versions)
    store = Store(path)
    try:
        store.check()
        if versions and store.head() is None:
            raise _without_versions(path, versions)
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
