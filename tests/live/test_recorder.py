"""Watching a load: real loaders in vLLM's style, and the bytes that the derived layout then finds under each name."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loading import BF16, CHECKPOINT, FP32, MERGED, Load, Loader, Tensors, checkpoint, narrowed, place
from safetensors.torch import save_file

from insitu.live.checkpoint import read
from insitu.live.proof import compare


# -- loaders -----------------------------------------------------------------------------------------------------------
def sliced_source(parameters: dict[str, torch.nn.Parameter], tensors: Tensors) -> None:
    """loaded.narrow(...): each tensor in two parts, the second first, as for a merged matrix on disk."""
    for name, loaded in tensors:
        half = loaded.shape[0] // 2
        for start in (half, 0):
            piece = loaded.narrow(0, start, half)
            place(parameters, name, loaded.shape[0]).narrow(0, start, half).copy_(piece)


def assigned(parameters: dict[str, torch.nn.Parameter], tensors: Tensors) -> None:
    """param.data[rows] = loaded, as the embedding's loader does."""
    for name, loaded in tensors:
        owner, start = MERGED.get(name, (name, 0))
        parameters[owner].data[start : start + loaded.shape[0]] = loaded


def reading_ahead(parameters: dict[str, torch.nn.Parameter], tensors: Tensors) -> None:
    """Every tensor is read before the first is copied, and what was read is let go at once."""
    for name, loaded in list(tensors):
        place(parameters, name, loaded.shape[0]).copy_(loaded)
        del loaded


def one_ahead(parameters: dict[str, torch.nn.Parameter], tensors: Tensors) -> None:
    """The next tensor is already there while this one is copied."""
    source = iter(tensors)
    before = next(source)
    for following in [*source, None]:  # type: ignore[list-item]
        name, loaded = before
        place(parameters, name, loaded.shape[0]).copy_(loaded)
        before = following


def through_views(parameters: dict[str, torch.nn.Parameter], tensors: Tensors) -> None:
    """Flattened, detached and turned twice on the way: still the same elements in the same order."""
    for name, loaded in tensors:
        place(parameters, name, loaded.shape[0]).view(-1).copy_(loaded.detach().t().t().reshape(-1))


LOADERS = [narrowed, sliced_source, assigned, reading_ahead, one_ahead, through_views]


# -- what is found -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
def test_each_tensor_is_found_under_its_own_name_however_it_was_loaded(loader: Loader) -> None:
    tensors = checkpoint()
    done = Load(loader, tensors.items())
    assert done.recorder.sources == CHECKPOINT
    found = done.found()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name
    assert compare(found, tensors.items(), {}) > 0
    found["attn.k_proj.weight"].fill_(7)  # and it is the engine's own memory that is found
    assert (done.views["attn.qkv_proj.weight"][8:12] == 7).all()
    assert not (done.views["attn.qkv_proj.weight"][:8] == 7).any()


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
def test_tensors_that_are_views_of_one_mapped_file_are_told_apart(loader: Loader, tmp_path: Path) -> None:
    tensors = checkpoint()
    save_file(tensors, tmp_path / "model.safetensors")
    found = Load(loader, read([tmp_path / "model.safetensors"])).found()
    assert compare(found, tensors.items(), {}) > 0


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
def test_tensors_that_lie_side_by_side_in_one_storage_are_told_apart(loader: Loader) -> None:
    tensors = checkpoint()
    storage = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    views, start = {}, 0
    for name, tensor in tensors.items():
        views[name] = storage[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    for order in (list(views), list(reversed(views))):
        found = Load(loader, [(name, views[name]) for name in order]).found()
        assert compare(found, tensors.items(), {}) > 0


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.float64])
def test_a_checkpoint_of_another_dtype_is_converted_on_the_way_and_found(stored: torch.dtype) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in checkpoint().items()}
    for loader in (narrowed, sliced_source, assigned):
        found = Load(loader, tensors.items()).found()
        assert found["attn.v_proj.weight"].dtype == BF16
        assert found["norm.weight"].dtype == FP32
        assert compare(found, tensors.items(), {}) > 0


def test_an_address_is_not_used_twice_while_the_load_goes_on() -> None:
    """Tensors that are made and let go one by one would otherwise follow each other in the same memory."""
    tensors = checkpoint()

    def fresh() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            yield name, tensor.clone()

    assert compare(Load(narrowed, fresh()).found(), tensors.items(), {}) > 0


def test_what_a_loader_does_outside_the_parameters_is_not_noted() -> None:
    def busy(parameters: dict[str, torch.nn.Parameter], tensors: Tensors) -> None:
        scratch = torch.empty(12, 12)
        for name, loaded in tensors:
            scratch[: loaded.shape[0], : loaded.shape[-1]].copy_(loaded)
            scratch.copy_(scratch.clone())
            place(parameters, name, loaded.shape[0]).copy_(loaded)
        place(parameters, "norm.weight", 0).copy_(torch.empty(0))  # nothing, copied

    done = Load(busy, checkpoint().items())
    assert len(done.recorder.copies) == len(CHECKPOINT)
    assert compare(done.found(), checkpoint().items(), {}) > 0


def test_after_forget_the_sources_are_let_go_and_the_records_kept() -> None:
    done = Load(narrowed, checkpoint().items())
    copies = list(done.recorder.copies)
    assert done.recorder._sources._held == []
    done.views["norm.weight"].copy_(torch.ones(8))  # outside the load nothing is watched
    assert done.recorder.copies == copies


def test_the_recorder_needs_torch_and_nothing_of_vllm() -> None:
    code = (
        "import sys, insitu.live.vllm_plugin, insitu.live.vllm_plugin.recorder as r; assert r.Recorder;"
        "print(sorted({'vllm', 'transformers', 'fastapi', 'starlette'} & sys.modules.keys()))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
