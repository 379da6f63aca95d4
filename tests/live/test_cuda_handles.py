"""A CUDA handle is JSON of one shape: anything else is refused before torch sees it. What needs a GPU is in tests/gpu."""

import base64
import json
from typing import Any

import pytest
import torch

from insitu.live.weights import cuda

GOOD: dict[str, Any] = {
    "uuid": "GPU-0",
    "handle": base64.b64encode(bytes(range(64))).decode(),
    "ref_counter": base64.b64encode(b"/torch_1_2_3").decode(),
    "event": base64.b64encode(bytes(64)).decode(),
    "size": 1 << 30,
    "offset": 0,
    "ref_counter_offset": 3,
    "synchronize": False,
}


def test_a_handle_survives_json_and_is_decoded() -> None:
    fields = cuda.parse(json.loads(json.dumps(GOOD)))
    assert fields["handle"] == bytes(range(64))
    assert fields["ref_counter"] == b"/torch_1_2_3"
    assert {name: fields[name] for name in ("uuid", "size", "ref_counter_offset")} == {
        "uuid": "GPU-0",
        "size": 1 << 30,
        "ref_counter_offset": 3,
    }


@pytest.mark.parametrize(
    "change",
    [
        {"uuid": 0},
        {"handle": None},
        {"handle": "not base64!"},
        {"handle": "A" * 1028},
        {"event": 7},
        {"size": "1"},
        {"size": True},
        {"size": -1},
        {"offset": 0.0},
        {"synchronize": 1},
        {"pickle": "gASV"},
    ],
    ids=str,
)
def test_a_handle_with_one_wrong_field_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"handle|base64|padding"):
        cuda.parse(GOOD | change)


@pytest.mark.parametrize("missing", sorted(GOOD))
def test_a_handle_that_lacks_a_field_is_refused(missing: str) -> None:
    with pytest.raises(ValueError, match="exactly the fields"):
        cuda.parse({name: value for name, value in GOOD.items() if name != missing})


@pytest.mark.parametrize("message", [None, [], "handle", 7])
def test_what_is_no_object_is_refused(message: Any) -> None:
    with pytest.raises(ValueError, match="exactly the fields"):
        cuda.parse(message)


def test_a_gpu_that_is_not_visible_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"GPU-0.*CUDA_VISIBLE_DEVICES"):
        cuda.open_memory(GOOD)
