"""Handing the arena over: whom it is given to, and that no message of any shape does more than raise."""

import ast
import fcntl
import json
import math
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import insitu
from insitu.live.weights import handles
from insitu.live.weights.arena import DTYPES, PAGE, Arena, plan
from insitu.live.weights.handles import HandleError

PACKAGE = Path(next(iter(insitu.__path__)))
LENGTH = struct.Struct("<Q")


@pytest.fixture
def line() -> Iterator[tuple[socket.socket, socket.socket]]:
    ends = socket.socketpair()
    for end in ends:
        end.settimeout(10)
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = make_arena()
    yield arena
    arena.close()


@pytest.fixture
def any_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def make_arena() -> Arena:
    return Arena.create(
        plan([("a", torch.bfloat16, (3, 5)), ("b", torch.float32, (1100,)), ("c", torch.bfloat16, (2,))])
    )


def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says that another user is at the other end."""
    peer = struct.pack("3i", os.getpid(), os.getuid() + 1, 0)
    monkeypatch.setattr(socket.socket, "getsockopt", lambda *_: peer)


# -- places ------------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("any_umask")
def test_a_new_directory_is_closed_to_others_whatever_the_umask(tmp_path: Path) -> None:
    made = handles.private_directory(tmp_path / "state" / "run")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert handles.private_directory(made) == made  # and is accepted the next time


@pytest.mark.parametrize("mode", [0o777, 0o702, 0o770, 0o750, 0o704, 0o701])
def test_a_directory_that_others_may_enter_is_refused_with_the_way_out(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(HandleError, match=f"mode {mode:o}.*chmod 700"):
        handles.private_directory(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == mode


def test_anything_but_a_real_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch(mode=0o600)
    for name in ("link", "dangling", "file"):
        with pytest.raises(HandleError, match=f"{name} is not a directory"):
            handles.private_directory(tmp_path / name)
    assert not (tmp_path / "nowhere").exists()


def test_another_users_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(HandleError, match=f"belongs to uid {owner}"):
        handles.private_directory(tmp_path / "run")


@pytest.mark.parametrize("use", [handles.listen, handles.connect])
def test_neither_end_uses_a_directory_that_is_a_link_or_open(tmp_path: Path, use: Callable[[Path], Any]) -> None:
    handles.listen(tmp_path / "real" / "s").close()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(HandleError, match="link"):
        use(tmp_path / "link" / "s")
    (tmp_path / "real").chmod(0o755)
    with pytest.raises(HandleError, match="open to others"):
        use(tmp_path / "real" / "s")
    assert stat.S_ISSOCK((tmp_path / "real" / "s").lstat().st_mode)  # untouched


@pytest.mark.usefixtures("any_umask")
def test_the_socket_is_for_the_owner_only_and_the_umask_is_put_back(tmp_path: Path) -> None:
    with handles.listen(tmp_path / "run" / "engine.sock"):
        assert stat.S_IMODE((tmp_path / "run" / "engine.sock").stat().st_mode) == 0o600
    assert os.umask(0) == 0


def test_the_socket_of_an_earlier_life_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run" / "engine.sock"
    handles.listen(path).close()
    with pytest.raises(ConnectionRefusedError):
        handles.connect(path)
    with handles.listen(path), handles.connect(path):
        pass


def test_connecting_where_nobody_ever_listened_makes_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "s", handles.private_directory(tmp_path / "run") / "s"):
        with pytest.raises(OSError, match=r"exist|No such file"):
            handles.connect(path)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_path_longer_than_the_kernels_limit_works_at_both_ends(tmp_path: Path) -> None:
    path = tmp_path / ("long" * 30) / ("longer" * 20) / "engine.sock"
    assert len(bytes(path)) > 108
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with handles.listen(path) as listener, handles.connect(path) as client:
        server, _ = listener.accept()
        with server:
            handles.send(client, {"hello": 1})
            assert handles.receive(server) == ({"hello": 1}, None)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    with socket.socket(socket.AF_UNIX) as plain, pytest.raises(OSError, match="too long"):
        plain.bind(str(path))  # so it was no short path by luck


# -- people ------------------------------------------------------------------------------------------------------------
def test_the_peers_pid_is_told(line: tuple[socket.socket, socket.socket]) -> None:
    assert handles.check_peer(line[0]) == os.getpid()


def test_another_users_process_is_refused_at_the_other_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with handles.listen(tmp_path / "run" / "s") as listener:
        foreign(monkeypatch)
        with pytest.raises(HandleError, match=f"uid {os.getuid() + 1}"):
            handles.connect(tmp_path / "run" / "s")
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.recv(1) == b""  # the refused connection was closed
            with pytest.raises(HandleError, match=f"uid {os.getuid() + 1}"):
                handles.check_peer(accepted)


# -- messages ----------------------------------------------------------------------------------------------------------
def framed(body: bytes) -> bytes:
    return LENGTH.pack(len(body)) + body


def received(data: bytes, *, want_fd: bool = False) -> dict[str, Any]:
    """What comes of these bytes, sent by somebody who then hangs up."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(10)
        with theirs:
            theirs.sendall(data)
        message, fd = handles.receive(ours, want_fd=want_fd)
    assert fd is None
    return message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.binary(max_size=64),
        st.binary(max_size=64).map(framed),
        json_values.map(lambda value: framed(json.dumps(value).encode())),
        st.tuples(st.integers(0, 2**64 - 1), st.binary(max_size=32)).map(lambda pair: LENGTH.pack(pair[0]) + pair[1]),
        st.builds(lambda value, end: framed(json.dumps(value).encode())[:end], json_values, st.integers(0, 30)),
    ),
    st.booleans(),
)
def test_bytes_of_any_kind_are_an_object_or_a_refusal(data: bytes, want_fd: bool) -> None:
    try:
        message = received(data, want_fd=want_fd)
    except (ConnectionError, HandleError):
        return
    assert isinstance(message, dict)


@pytest.mark.parametrize("data", [b"", b"\x05", LENGTH.pack(5), LENGTH.pack(5) + b'{"a"'])
def test_a_message_cut_short_is_a_lost_connection(data: bytes) -> None:
    with pytest.raises(ConnectionError):
        received(data)


@pytest.mark.parametrize("length", [(16 << 20) + 1, 2**63, 2**64 - 1])
def test_a_huge_length_is_refused_before_anything_is_read(length: int) -> None:
    with pytest.raises(HandleError, match=f"{length} bytes"):
        received(LENGTH.pack(length) + b"{}")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"nul", b"1" * 5000, b"[" * 50_000, b'{"a":' * 20_000])
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(HandleError, match="not JSON"):
        received(framed(body))


@pytest.mark.parametrize("value", [None, True, 7, 1.5, "x", [], [{}]])
def test_json_that_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(HandleError, match="JSON object"):
        received(framed(json.dumps(value).encode()))


def test_messages_that_arrive_in_pieces_or_together_are_told_apart(line: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = line
    stream = framed(b'{"first": 1}') + framed(b'{"second": [2]}')
    for piece in (stream[:3], stream[3:9], stream[9:25], stream[25:]):
        theirs.sendall(piece)
    assert handles.receive(ours) == ({"first": 1}, None)
    assert handles.receive(ours) == ({"second": [2]}, None)

    def drop_by_drop() -> None:
        for at in range(len(stream)):
            theirs.sendall(stream[at : at + 1])

    thread = threading.Thread(target=drop_by_drop)
    thread.start()
    assert handles.receive(ours) == ({"first": 1}, None)
    assert handles.receive(ours) == ({"second": [2]}, None)
    thread.join()


def test_the_descriptor_that_arrives_is_the_same_memory(
    line: tuple[socket.socket, socket.socket], arena: Arena
) -> None:
    ours, theirs = line
    handles.send(theirs, arena.manifest(), arena.fd)
    message, fd = handles.receive(ours, want_fd=True)
    assert fd is not None
    assert fd != arena.fd
    other = handles.open_arena(message, fd)
    arena.views()["b"].fill_(2.5)
    assert other.slots == arena.slots
    assert other.header == arena.header
    assert torch.equal(other.views()["b"], torch.full((1100,), 2.5))
    other.close()


@pytest.mark.parametrize(
    ("body", "want_fd"), [(b"{}", False), (b"no json", False), (b"no json", True), (b"[]", True), (None, True)]
)
def test_a_descriptor_nobody_wanted_or_that_came_with_nonsense_is_not_kept(
    line: tuple[socket.socket, socket.socket], arena: Arena, body: bytes | None, want_fd: bool
) -> None:
    ours, theirs = line
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    announced = 2**40 if body is None else len(body)
    socket.send_fds(theirs, [LENGTH.pack(announced)], [arena.fd])
    theirs.sendall(body or b"")
    try:
        assert handles.receive(ours, want_fd=want_fd) == ({}, None)
    except HandleError:
        assert body != b"{}"
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


# -- layouts -----------------------------------------------------------------------------------------------------------
def _slot(index: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda message: message["slots"][index].update(changes)


def _swap(message: dict[str, Any]) -> None:
    message["slots"].reverse()


def _drop(field: str) -> Callable[[dict[str, Any]], None]:
    return lambda message: message["slots"][1].pop(field) and None


# Of the arena above: a at 4096 (30 bytes), b at 8192 (4400 bytes), c at 16384 (4 bytes), 20480 bytes in all.
BAD_LAYOUTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "overlaps the one before": _slot(1, offset=4096 + 28),
    "overlaps the one after": _slot(0, shape=[3, 1000]),
    "out of order": _swap,
    "misaligned": _slot(1, offset=8192 + 2),
    "negative": _slot(0, offset=-4096),
    "true as offset": _slot(0, offset=True),
    "false as offset": _slot(0, offset=False),
    "a float as offset": _slot(0, offset=4096.0),
    "text as offset": _slot(0, offset="4096"),
    "at the header": _slot(0, offset=0),
    "inside the header page": _slot(0, offset=PAGE - 32),
    "past the end": _slot(2, offset=20480),
    "far past the end": _slot(2, offset=2**62),
    "reaches past the end": _slot(2, shape=[2**20]),
    "more bytes than a machine has": _slot(2, shape=[2**62, 2**62, 2**62]),
    "a dimension of 0": _slot(1, shape=[0]),
    "a negative dimension": _slot(1, shape=[-1, -1100]),
    "true as dimension": _slot(2, shape=[True, 2]),
    "a float as dimension": _slot(2, shape=[2.0]),
    "shape of text": _slot(2, shape="2"),
    "an unknown dtype": _slot(1, dtype="int8"),
    "a dtype that is no text": _slot(1, dtype=7),
    "a name that is no text": _slot(1, name=None),
    "a name twice": _slot(2, name="a"),
    "no name": _drop("name"),
    "no offset": _drop("offset"),
    "no dtype": _drop("dtype"),
    "no shape": _drop("shape"),
    "a slot that is text": lambda message: message["slots"].append("d"),
    "no slots": lambda message: message.update(slots=[]),
    "slots that are an object": lambda message: message.update(slots={"a": {}}),
    "slots that are a number": lambda message: message.update(slots=5),
    "slots left out": lambda message: message.pop("slots") and None,
    "another format": lambda message: message.update(format=2),
    "no format": lambda message: message.pop("format") and None,
    "another device": lambda message: message.update(device="cuda"),
    "no size": lambda message: message.pop("num_bytes") and None,
    "nothing as size": lambda message: message.update(num_bytes=None),
    "true as size": lambda message: message.update(num_bytes=True),
    "a float as size": lambda message: message.update(num_bytes=20480.0),
    "text as size": lambda message: message.update(num_bytes="20480"),
    "a size of 0": lambda message: message.update(num_bytes=0),
    "a negative size": lambda message: message.update(num_bytes=-20480),
    "a size that ends in the last slot": lambda message: message.update(num_bytes=16386),
    "a size less than the memory's": lambda message: message.update(num_bytes=16388),
    "a size more than the memory's": lambda message: message.update(num_bytes=20480 + PAGE),
    "a size more than a machine has": lambda message: message.update(num_bytes=2**70),
}


@pytest.mark.parametrize("damage", BAD_LAYOUTS.values(), ids=BAD_LAYOUTS.keys())
def test_a_bad_layout_is_refused(arena: Arena, damage: Callable[[dict[str, Any]], None]) -> None:
    message = json.loads(json.dumps(arena.manifest()))
    handles.open_arena(message, arena.fd)  # good until then
    damage(message)
    with pytest.raises(ValueError, match=r"slot|arena|handle|tensor|num_bytes"):
        handles.open_arena(message, arena.fd)


@pytest.mark.parametrize("size", [None, True, 20480.0, "20480", [20480]])
def test_a_size_that_is_no_integer_is_refused_as_such(arena: Arena, size: object) -> None:
    with pytest.raises(HandleError, match="num_bytes must be an integer"):
        handles.open_arena({**arena.manifest(), "num_bytes": size}, arena.fd)


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_bytes_that_belong_to_no_slot_are_allowed_anywhere(arena: Arena, left_out: int) -> None:
    message = json.loads(json.dumps(arena.manifest()))
    del message["slots"][left_out]
    other = handles.open_arena(message, os.dup(arena.fd))
    assert other.num_bytes == arena.num_bytes == 20480
    assert [slot.name for slot in other.slots] == [name for i, name in enumerate("abc") if i != left_out]
    for name, view in other.views().items():
        arena.views()[name].fill_(5)
        assert (view == 5).all()
    other.close()


gaps = st.sampled_from([0, 0, 0, 2, 4, 60, 1, -1, -2, -4, -PAGE])
tensors = st.tuples(gaps, st.sampled_from(sorted(DTYPES)), st.lists(st.integers(1, 40) | st.just(0), max_size=2))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(tensors, min_size=1, max_size=4))
def test_a_layout_is_accepted_exactly_if_its_slots_lie_apart_behind_the_header(
    wanted: list[tuple[int, str, list[int]]],
) -> None:
    slots, offset, sound = [], PAGE, True
    for i, (gap, dtype, shape) in enumerate(wanted):
        size = {"bfloat16": 2, "float16": 2, "float32": 4}[dtype]
        offset += gap
        sound = sound and gap >= 0 and offset % size == 0 and 0 not in shape
        slots.append({"name": str(i), "offset": offset, "dtype": dtype, "shape": shape})
        offset += size * math.prod(shape)
    last = slots[-1]["offset"]
    whole = last + -(-(offset - last) // PAGE) * PAGE
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, max(whole, 0))
        fcntl.fcntl(fd, 1033, 7)  # sealed, so that only the layout can be what is wrong
        message = {"format": 1, "device": "cpu", "num_bytes": whole, "slots": slots}
        if not sound:
            with pytest.raises(ValueError, match=r"slot|arena"):
                handles.open_arena(message, fd)
            return
        end = PAGE
        arena = handles.open_arena(message, fd)
        for view in arena.views().values():
            start = view.data_ptr() - arena._bytes.data_ptr()
            assert start >= end
            end = start + view.numel() * view.element_size()
        assert end <= arena.num_bytes == whole
    finally:
        os.close(fd)


# -- no pickle ---------------------------------------------------------------------------------------------------------
_PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "multiprocessing"}
_LOADERS = {("torch", "load"), ("torch", "save"), ("torch", "multiprocessing"), ("numpy", "load"), ("np", "load")}


def unsafe(source: str) -> list[str]:
    """What in this module could unpickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [
                    n.name for n in names if n.name.split(".")[0] in _PICKLES or n.name == "torch.multiprocessing"
                ]
            case ast.ImportFrom(module=str(module), names=names):
                root, _, rest = module.partition(".")
                found += [module] if root in _PICKLES or (root, rest.split(".")[0]) in _LOADERS else []
                found += [f"{module}.{n.name}" for n in names if (module, n.name) in _LOADERS]
            case ast.Attribute(value=ast.Name(id=owner), attr=attr) if (owner, attr) in _LOADERS:
                found.append(f"{owner}.{attr}")
            case ast.Call(
                func=ast.Name(id="__import__") | ast.Attribute(attr="import_module"), args=[ast.Constant(value=v)]
            ):
                found += [v] if str(v).split(".")[0] in _PICKLES else []
            case ast.keyword(arg="allow_pickle" | "weights_only", value=value):
                safe = {"allow_pickle": False, "weights_only": True}[str(node.arg)]
                found += [] if isinstance(value, ast.Constant) and value.value is safe else [str(node.arg)]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, pickle as p",
        "from pickle import loads",
        "def f():\n    import cloudpickle",
        "import multiprocessing.shared_memory",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "read = torch.load",
        "from torch.multiprocessing import reductions",
        "importlib.import_module('pickle')",
        "load(f, weights_only=False)",
    ],
)
def test_the_search_for_pickle_finds_it(source: str) -> None:
    assert unsafe(source)


def test_nothing_in_the_package_can_unpickle() -> None:
    modules = sorted(PACKAGE.rglob("*.py"))
    assert len(modules) > 20
    assert {str(m.relative_to(PACKAGE)): unsafe(m.read_text()) for m in modules if unsafe(m.read_text())} == {}
