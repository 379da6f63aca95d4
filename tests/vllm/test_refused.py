"""Command lines that are refused: the flag to change is named, nothing is served, and nothing is left running."""

import re
import socket
from pathlib import Path

import pytest
from models import make
from refusing import insitu_refuses, refused

from conftest import VLLM_ARGS, Serve

pytestmark = pytest.mark.timeout(600)

VLLM_SERVE = ("vllm.entrypoints.cli.main", "serve", "--load-format", "insitu", "--port", "0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("refused") / "model")


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--tensor-parallel-size 2", "--tensor-parallel-size"),
        ("--enable-lora", "--enable-lora"),
        ("--enable-sleep-mode", "Sleep mode"),  # on CPU vLLM is first to say no, and does not name its flag
    ],
)
def test_a_vllm_option_that_moves_weights_is_refused_by_its_name(
    serve: Serve, flag: str, named: str, model: Path, state_dir: Path, tmp_path: Path
) -> None:
    assert named in insitu_refuses(tmp_path, model, state_dir, vllm_args=flag)


def test_development_routes_are_refused(serve: Serve, model: Path, state_dir: Path, tmp_path: Path) -> None:
    told = insitu_refuses(tmp_path, model, state_dir, VLLM_SERVER_DEV_MODE="1")
    assert "VLLM_SERVER_DEV_MODE" in told


def test_a_mixture_of_experts_is_refused(serve: Serve, state_dir: Path, tmp_path: Path) -> None:
    told = insitu_refuses(tmp_path, make("qwen3-moe", tmp_path / "moe"), state_dir)
    assert "mixture-of-experts" in told


def test_plain_vllm_without_the_plugin_in_its_list_is_refused(
    serve: Serve, model: Path, state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    told = refused(tmp_path, *VLLM_SERVE, str(model), *VLLM_ARGS.split(), INSITU_STATE=str(state_dir))
    assert re.search("RefusedError: .*VLLM_PLUGINS=insitu", told)


def test_a_directory_or_a_port_that_is_taken_is_refused_and_its_owner_serves_on(
    serve: Serve, model: Path, state_dir: Path, tmp_path: Path
) -> None:
    other, here = make("llama-mha", tmp_path / "other"), tmp_path / "here"
    here.mkdir()
    with serve(model, state_dir) as client:
        told = insitu_refuses(here, model, state_dir)
        assert "another server already runs" in told
        assert "--state-dir" in told
        port = client.facts["url"].rpartition(":")[2]
        assert "--port" in insitu_refuses(here, model, tmp_path / "second", port=port)
        # The directory's lock is insitu's own; a vLLM that somebody starts by hand meets the worker's.
        told = refused(
            here, *VLLM_SERVE, str(model), *VLLM_ARGS.split(), INSITU_STATE=str(state_dir), VLLM_PLUGINS="insitu"
        )
        assert re.search("RefusedError: another vLLM already serves from .*INSITU_STATE", told)
        assert client.reply([{"role": "user", "content": "still there?"}], 4)[1] == "0"
    told = insitu_refuses(here, other, state_dir)
    assert "belongs to another model" in told
    assert "--state-dir" in told


def test_a_state_directory_that_others_can_read_is_refused(
    serve: Serve, model: Path, state_dir: Path, tmp_path: Path
) -> None:
    state_dir.mkdir(mode=0o755)
    assert f"chmod 700 {state_dir}" in insitu_refuses(tmp_path, model, state_dir)
    assert list(state_dir.iterdir()) == []


def test_a_socket_at_which_nobody_listens_is_refused(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "run").mkdir(mode=0o700)
    dead = tmp_path / "state" / "run" / "engine.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(dead))
    for attach, reason in (
        (dead, "nobody listens"),
        (dead.with_name("weights.sock"), "is not the control socket"),
        (tmp_path / "nowhere" / "run" / "engine.sock", "is not the control socket"),
        (Path("engine.sock"), "is not the control socket"),
    ):
        told = refused(tmp_path, "insitu.cli", "serve", "--attach", str(attach))
        assert told.startswith("insitu: "), told
        assert reason in told
        assert str(attach) in told
        assert "chmod" not in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"], "a wrong path is not made"
    assert "--attach" in refused(tmp_path, "insitu.cli", "serve", "smollm2", "--attach", str(dead))
