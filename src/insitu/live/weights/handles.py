"""Hand the arena to another process: a JSON manifest and a descriptor over a Unix socket. No pickle, no names in /dev/shm.

The socket is 0600 in a 0700 directory of ours, and both ends check the other's uid.
"""

import json
import os
import socket
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

from insitu.live.weights import cuda
from insitu.live.weights.arena import DTYPES, PAGE, Arena, Slot

_MAX_MESSAGE = 16 << 20
_LENGTH = struct.Struct("<Q")


class HandleError(ValueError):
    """The other side, its directory or its message is not what it must be."""


def private_directory(path: Path) -> Path:
    """Make the directory 0700, or check that it is ours, real (no link) and closed to others."""
    with suppress(FileExistsError):  # whatever is there is looked at below
        path.mkdir(mode=0o700, parents=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise HandleError(f"{path} is not a directory (a link is not followed here); remove it or choose another place")
    if found.st_uid != os.getuid():
        raise HandleError(f"{path} belongs to uid {found.st_uid}, not to you; choose another place")
    if found.st_mode & 0o077:
        raise HandleError(f"{path} is open to others (mode {stat.S_IMODE(found.st_mode):o}); run: chmod 700 {path}")
    return path


def _short(path: Path) -> tuple[str, int]:
    """A name of the socket below the kernel's limit of 107 bytes, through a descriptor of its directory."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    return f"/proc/self/fd/{directory}/{path.name}", directory


def listen(path: Path) -> socket.socket:
    """A listening socket at ``path``, 0600. A dead socket of an earlier life is replaced; the caller holds the directory's
    lock, so it cannot be a living one."""
    private_directory(path.parent)
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    name, directory = _short(path)
    before = os.umask(0o177)
    try:
        server.bind(name)
    finally:
        os.umask(before)
        os.close(directory)
    server.listen(8)
    return server


def connect(path: Path) -> socket.socket:
    """Connect to the socket at ``path`` and check that its owner is us. Raises OSError when nobody listens."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} does not exist")
    private_directory(path.parent)
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    name, directory = _short(path)
    try:
        client.connect(name)
        check_peer(client)
    except BaseException:
        client.close()
        raise
    finally:
        os.close(directory)
    return client


def check_peer(connection: socket.socket) -> int:
    """The pid at the other end; HandleError if another user runs it."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid != os.getuid():
        raise HandleError(f"the other end belongs to uid {uid}; only uid {os.getuid()} may share these weights")
    return int(pid)


def send(connection: socket.socket, message: dict[str, Any], fd: int | None = None) -> None:
    """One message: length, JSON, and a descriptor if given."""
    body = json.dumps(message).encode()
    if fd is None:
        connection.sendall(_LENGTH.pack(len(body)) + body)
    else:
        socket.send_fds(connection, [_LENGTH.pack(len(body))], [fd])
        connection.sendall(body)


def receive(connection: socket.socket, *, want_fd: bool = False) -> tuple[dict[str, Any], int | None]:
    """The next message. Raises ConnectionError at the end of the stream, HandleError on anything but a JSON object."""
    head, fds, _, _ = socket.recv_fds(connection, _LENGTH.size, 1 if want_fd else 0)
    try:
        return _message(connection, head), fds[0] if fds else None
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _message(connection: socket.socket, head: bytes) -> dict[str, Any]:
    """The rest of the message that begins with ``head``."""
    head += _exactly(connection, _LENGTH.size - len(head)) if head else b""
    if not head:
        raise ConnectionError("the other side is gone")
    (length,) = _LENGTH.unpack(head)
    if length > _MAX_MESSAGE:
        raise HandleError(f"a message of {length} bytes was announced; the limit is {_MAX_MESSAGE}")
    try:
        message = json.loads(_exactly(connection, length))
    except (ValueError, RecursionError) as error:
        raise HandleError(f"a message that is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise HandleError(f"a message must be a JSON object, not {type(message).__name__}")
    return message


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = connection.recv(min(count, 1 << 20))
        if not part:
            raise ConnectionError("the other side went away in the middle of a message")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def open_arena(message: dict[str, Any], fd: int) -> Arena:
    """Map the arena of a manifest. Every field is checked: overlapping or misplaced slots are refused by name."""
    if message.get("format") != 1 or message.get("device") not in ("cpu", "cuda"):
        raise HandleError(f"unknown handle: format {message.get('format')!r}, device {message.get('device')!r}")
    num_bytes = message.get("num_bytes")
    if type(num_bytes) is not int:
        raise HandleError(f"num_bytes must be an integer, not {num_bytes!r}")
    slots, end = [], PAGE
    raw = message.get("slots")
    if not isinstance(raw, list) or not raw:
        raise HandleError("the handle names no slots")
    for item in raw:
        match item:
            case {"name": str(name), "offset": int(offset), "dtype": str(dtype), "shape": list(shape)}:
                pass
            case _:
                raise HandleError(f"a slot must have name, offset, dtype and shape: {item!r}")
        if dtype not in DTYPES or not all(type(n) is int and n > 0 for n in shape):
            raise HandleError(f"slot {name!r} has dtype {dtype!r} and shape {shape!r}")
        slot = Slot(name, offset, dtype, tuple(shape))
        if offset < end or offset % DTYPES[dtype].itemsize:
            raise HandleError(f"slot {name!r} at byte {offset} overlaps what lies before it or is not aligned")
        slots.append(slot)
        end = offset + slot.num_bytes
    if len({slot.name for slot in slots}) != len(slots):
        raise HandleError("the handle names a tensor twice")
    if message["device"] == "cpu":
        return Arena(fd, slots, num_bytes)
    try:
        memory = cuda.open_memory(message.get("cuda"))
    except ValueError as error:
        raise HandleError(str(error)) from error
    return Arena(fd, slots, num_bytes, memory)
