"""Keys exist from the first start, are nobody else's to read, and are compared without telling how close a guess was."""

import json
import multiprocessing
import stat
from pathlib import Path

import pytest

from insitu.live.keys import Keys, digest, load_keys
from insitu.live.records import StateError


def test_keys_are_made_at_the_first_start_and_stay(tmp_path: Path) -> None:
    state = tmp_path / "new" / "state"
    keys = load_keys(state, {})
    assert load_keys(state, {}) == keys
    assert keys.api != keys.learn
    assert min(len(keys.api), len(keys.learn)) >= 40
    file = state / "keys.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert json.loads(file.read_text()) == {"api": keys.api, "learn": keys.learn}
    assert [path.name for path in state.iterdir()] == ["keys.json"]


def test_every_state_directory_has_its_own_keys(tmp_path: Path) -> None:
    first, second = load_keys(tmp_path / "a", {}), load_keys(tmp_path / "b", {})
    assert len({first.api, first.learn, second.api, second.learn}) == 4


def test_the_environment_takes_the_place_of_either_key(tmp_path: Path) -> None:
    stored = load_keys(tmp_path, {})
    assert load_keys(tmp_path, {"INSITU_API_KEY": "mine"}) == Keys("mine", stored.learn)
    assert load_keys(tmp_path, {"INSITU_LEARN_KEY": "mine"}) == Keys(stored.api, "mine")
    both = {"INSITU_API_KEY": "ask", "INSITU_LEARN_KEY": "teach"}
    assert load_keys(tmp_path / "unused", both) == Keys("ask", "teach")
    assert not (tmp_path / "unused").exists()
    assert load_keys(tmp_path, {}) == stored


def test_an_empty_variable_does_not_open_the_server(tmp_path: Path) -> None:
    assert load_keys(tmp_path, {"INSITU_API_KEY": "", "INSITU_LEARN_KEY": ""}) == load_keys(tmp_path, {})


@pytest.mark.parametrize("key", ["two words", "schlüssel", "line\nbreak", ""])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        Keys("fine", key)


def test_one_key_for_both_is_refused() -> None:
    with pytest.raises(ValueError, match="the same"):
        Keys("same", "same")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o620])
def test_a_file_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    load_keys(tmp_path, {})
    (tmp_path / "keys.json").chmod(mode)
    with pytest.raises(ValueError, match="readable by other users"):
        load_keys(tmp_path, {})


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    load_keys(tmp_path / "a", {})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "keys.json").symlink_to(tmp_path / "a" / "keys.json")
    with pytest.raises(StateError, match=r"keys.json cannot be read.*symbolic"):
        load_keys(tmp_path / "b", {})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"api": "secret-one"}', '{"api": "secret-one", "learn": ""}'])
def test_a_broken_file_is_refused_without_quoting_it(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.json"
    file.touch(0o600)
    file.write_text(text)
    with pytest.raises(ValueError, match="delete it") as error:
        load_keys(tmp_path, {})
    assert "secret" not in str(error.value)
    assert error.value.__suppress_context__


def _load(state: Path, barrier: "multiprocessing.synchronize.Barrier", out: "multiprocessing.Queue[Keys]") -> None:
    barrier.wait()
    out.put(load_keys(state, {}))


def test_servers_that_start_at_once_agree_on_the_keys(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, out = context.Barrier(6), context.Queue()
    processes = [context.Process(target=_load, args=(tmp_path, barrier, out)) for _ in range(6)]
    for process in processes:
        process.start()
    found = [out.get(timeout=20) for _ in processes]
    for process in processes:
        process.join()
    assert len({(keys.api, keys.learn) for keys in found}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["keys.json"]


def test_each_key_has_its_role_and_nothing_else_has_one() -> None:
    keys = Keys("ask-key", "teach-key")
    assert keys.role_of(b"ask-key") == "api"
    assert keys.role_of(b"teach-key") == "learn"
    for guess in (b"", b"ask-ke", b"ask-key ", b"ask-keyteach-key", b"\xff\x00", "schlüssel".encode()):
        assert keys.role_of(guess) is None


def test_comparison_never_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both keys, through compare_digest, whatever the first comparison said."""
    import hmac

    asked: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def record(a: bytes, b: bytes) -> bool:
        asked.append((a, b))
        return real(a, b)

    keys = Keys("ask-key", "teach-key")
    monkeypatch.setattr("insitu.live.keys.hmac.compare_digest", record)
    for token in (b"ask-key", b"teach-key", b"other"):
        asked.clear()
        keys.role_of(token)
        assert asked == [(token, b"ask-key"), (token, b"teach-key")]


def test_keys_do_not_show() -> None:
    keys = Keys("ask-key", "teach-key")
    assert "key" not in repr(keys).replace("Keys", "")
    assert digest(b"ask-key") != "ask-key"
    assert len(digest(b"ask-key")) == 64
