"""Defects of the plugin, put into the processes of real servers: none of them may lead to answers from other weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import make
from processes import post_lesson, settle, versions
from refusing import insitu_refuses

from conftest import Serve

pytestmark = pytest.mark.timeout(600)
Inject = Callable[[str], None]
# Large steps, so that the weights move far in one job; a right server follows them.
FAR = (
    "--teach.learning-rate",
    "5e-3",
    "--teach.warmup-steps",
    "0",
    "--teach.max-steps",
    "8",
    "--teach.target-loss",
    "0",
)
NOT_THE_VERSION = "in the arena is not what the version holds"


@pytest.mark.parametrize(
    ("defect", "family", "tensor", "reason"),
    [
        ("swapped", "llama-mha", "model.layers.0.self_attn.k_proj.weight", NOT_THE_VERSION),
        ("shifted", "llama", "lm_head.weight", NOT_THE_VERSION),
        ("packed", "llama", "model.layers.0.self_attn.qkv_proj.weight", "vLLM has moved"),
        ("packed_head", "llama", "lm_head.weight", "vLLM reads a private copy of"),
    ],
)
def test_a_server_with_a_defect_never_turns_ready_and_names_the_tensor(
    defect: str, family: str, tensor: str, reason: str, inject: Inject, tmp_path: Path
) -> None:
    inject(defect)
    told = insitu_refuses(tmp_path, make(family, tmp_path / "model"), tmp_path / "state")
    assert repr(tensor) in told
    assert reason in told
    assert not (tmp_path / "state" / "server.json").exists()
    requests = (tmp_path / "state" / "vllm.log").read_text()
    assert '"GET /health HTTP/1.1" 200' not in requests


def gap_of_a_lesson(serve: Serve, family: str, tmp_path: Path) -> tuple[str, float]:
    """What became of a job that moves every weight far, and by how many nats a token server and learner then disagree."""
    model = make(family, tmp_path / "model")
    with serve(model, tmp_path / "state", *FAR, "--teach.max-canary-kl", "100") as client:
        items = settle(client, post_lesson(client))
        job = versions(client)[-1]
        assert job["report"]["gap_before"] < 0.1, "before the first update nothing shows"
        if job["status"] == "refused":
            assert "server and learner came to disagree" in items[0]["reason"]
            live = client.get("/v1/live")
            assert (live["weight_version"], live["trial"]) == ("0", False)
        return job["status"], float(job["report"]["gap"])


# Elsewhere vLLM does not pack the convolution, and there is nothing to refresh.
packs_convolutions = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no AVX512_BF16: vLLM leaves convolutions plain"
)


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3.5", marks=packs_convolutions)])
def test_a_right_server_follows_a_lesson_that_moves_every_weight_far(family: str, serve: Serve, tmp_path: Path) -> None:
    status, gap = gap_of_a_lesson(serve, family, tmp_path)
    assert (status, gap < 0.1) == ("committed", True)


def test_packed_matrices_that_the_worker_does_not_see_are_found_by_the_audit(
    serve: Serve, inject: Inject, tmp_path: Path
) -> None:
    """What the probe at attach writes is an element of a norm, which is never packed: it does not find this."""
    inject("packed_unseen")
    status, gap = gap_of_a_lesson(serve, "llama", tmp_path)
    assert (status, gap > 0.2) == ("refused", True)


@packs_convolutions
def test_packed_convolutions_that_are_not_refreshed_are_found_by_the_audit(
    serve: Serve, inject: Inject, tmp_path: Path
) -> None:
    inject("stale_convolution")
    status, gap = gap_of_a_lesson(serve, "qwen3.5", tmp_path)
    assert (status, gap > 0.2) == ("refused", True)
