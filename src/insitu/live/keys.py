"""The two keys of a server: one to ask, one to teach.

They exist from the first start, so a server is never open by omission. They lie in ``<state-dir>/keys.json``, readable by
the owner only, where the command line finds them; ``INSITU_API_KEY`` and ``INSITU_LEARN_KEY`` take their place.
"""

import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from insitu.live.records import StateError

Role = Literal["api", "learn"]

API_VARIABLE = "INSITU_API_KEY"
LEARN_VARIABLE = "INSITU_LEARN_KEY"


@dataclass(frozen=True, slots=True)
class Keys:
    """``api`` may ask (chat, completions, models, look at versions); ``learn`` may do everything. Neither shows in a repr, so
    neither gets into a log by accident."""

    api: str = field(repr=False)
    learn: str = field(repr=False)

    def __post_init__(self) -> None:
        for name, key in (("api", self.api), ("learn", self.learn)):
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise StateError(f"the {name} key must be printable ASCII without spaces: it travels in an HTTP header")
        if hmac.compare_digest(self.api.encode(), self.learn.encode()):
            raise StateError("the API key and the learn key are the same; a client that may only ask could then teach")

    def role_of(self, token: bytes) -> Role | None:
        """What ``token`` may do. Takes the same time whichever key it resembles, and however closely."""
        is_api = hmac.compare_digest(token, self.api.encode())
        is_learn = hmac.compare_digest(token, self.learn.encode())
        if is_learn:
            return "learn"
        return "api" if is_api else None


def digest(token: bytes) -> str:
    """Stands for a key where the key itself must not be written."""
    return hashlib.sha256(token).hexdigest()


def load_keys(state_dir: Path, environ: Mapping[str, str] = os.environ) -> Keys:
    """The keys of a state directory, made at the first call.

    Raises:
        StateError: the file is readable by others, a link, or broken, or a key is unusable.
    """
    api, learn = environ.get(API_VARIABLE), environ.get(LEARN_VARIABLE)
    if api and learn:
        return Keys(api, learn)
    path = state_dir / "keys.json"
    if not path.exists():
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _create(path)
    stored = _read(path)
    return Keys(api or stored.api, learn or stored.learn)


def _create(path: Path) -> None:
    """Write new keys so that no reader ever sees half a file; of two servers that start at once, the first one's win."""
    text = json.dumps({"api": secrets.token_urlsafe(32), "learn": secrets.token_urlsafe(32)})
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            path.hardlink_to(temporary)  # unlike a rename it fails if the file is there
        except FileExistsError:
            return
    finally:
        temporary.unlink()


def _read(path: Path) -> Keys:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:  # a link, or another user's
        raise StateError(f"{path} cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor) as file:
        found = os.fstat(file.fileno())
        if found.st_uid != os.geteuid():
            raise StateError(f"{path} belongs to another user (uid {found.st_uid}); its keys cannot be trusted")
        if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise StateError(
                f"{path} is readable by other users (mode {stat.S_IMODE(found.st_mode):o}); "
                f"delete it to have new keys made, or, if nobody read it: chmod 600 {path}"
            )
        text = file.read()
    try:
        stored = json.loads(text)
        return Keys(str(stored["api"]), str(stored["learn"]))
    except (ValueError, KeyError, TypeError) as error:
        # The parser's own words could quote a key.
        raise StateError(
            f"{path} is not a file of keys ({type(error).__name__}); delete it to have new ones made"
        ) from None
