"""The model on views of the arena is the model of the checkpoint, to the last bit, or there is no model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny, on_arena
from transformers import AutoModelForCausalLM

from insitu.data.products import widen
from insitu.live.checkpoint import VersionError, checkpoint_files, read
from insitu.live.server import Server
from insitu.live.store import Store
from insitu.live.versions import Versions
from insitu.live.weights import attach
from insitu.live.weights.arena import Arena, plan
from insitu.live.weights.attach import AttachError

IDS = torch.arange(80).view(2, 40) * 7 % 240
K = "model.layers.0.self_attn.k_proj.weight"
V = "model.layers.0.self_attn.v_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture
def checkpoint(tiny: Path) -> dict[str, torch.Tensor]:
    return load_file(tiny / "model.safetensors")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("served", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_exactly_those_of_from_pretrained(
    tmp_path: Path, tied: bool, stored: torch.dtype, served: torch.dtype
) -> None:
    make_tiny(tmp_path, dtype=stored, tied=tied)
    arena, model = on_arena(tmp_path, dtype=served)
    expected = logits(widen(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=served).eval()))
    assert expected.std() > 0.1
    assert torch.equal(logits(model), expected)
    assert {parameter.dtype for parameter in model.parameters()} == {served}
    arena.close()


@pytest.mark.parametrize("requires_grad", [True, False])
def test_every_parameter_lies_in_the_arena_and_nothing_is_left_on_meta(tiny: Path, requires_grad: bool) -> None:
    arena, model = on_arena(tiny, requires_grad=requires_grad)
    names = {name for name, _ in model.named_parameters()}
    assert names == {slot.name for slot in arena.slots}
    places = {view.data_ptr(): name for name, view in arena.views().items()}
    for name, parameter in model.named_parameters():
        assert places.pop(parameter.data_ptr()) == name
        assert parameter.requires_grad is requires_grad
    assert not places
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert not model.training
    arena.close()


def test_what_is_written_to_the_arena_is_what_the_model_computes_with(tiny: Path, tmp_path: Path) -> None:
    arena, model = on_arena(tiny)
    before = logits(model)
    for name, tensor in read(checkpoint_files(make_tiny(tmp_path, seed=1))):
        arena.views()[name].copy_(tensor)
    other = logits(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert not torch.equal(before, other)
    assert torch.equal(logits(model), other)
    arena.close()


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not(tiny: Path, untied: Path) -> None:
    arena, model = on_arena(tiny)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert HEAD not in arena.views()
    assert attach.tied(model) == {HEAD: EMBEDDING}
    arena.close()
    arena, model = on_arena(untied)
    assert model.lm_head.weight.data_ptr() == arena.views()[HEAD].data_ptr()
    assert model.model.embed_tokens.weight.data_ptr() == arena.views()[EMBEDDING].data_ptr()
    assert attach.tied(model) == {}
    arena.close()


def test_each_process_has_buffers_and_a_config_of_its_own(tiny: Path) -> None:
    arena, one = on_arena(tiny)
    other = attach.build(tiny, arena, requires_grad=True)
    assert one.config is not other.config
    assert {p.data_ptr() for p in one.parameters()} == {p.data_ptr() for p in other.parameters()}
    mine = {b.data_ptr() for b in one.buffers()}
    assert mine
    assert not mine & {b.data_ptr() for b in other.buffers()}
    assert not any(arena.holds(b) for b in one.buffers())
    arena.close()


# -- views that do not fit the model -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda views: views.pop(K), rf"lacks '{K}'"),
        (lambda views: views.update(stranger=torch.zeros(2)), r"'stranger'.*no parameter"),
        (lambda views: views.update({K: views[K].T}), rf"'{K}'.*\[64, 32\].*\[32, 64\]"),
        (lambda views: views.update({K: views[K][:-1]}), rf"'{K}'.*\[31, 64\].*\[32, 64\]"),
        (lambda views: views.update({K: views[K].float()}), rf"'{K}'.*float32.*bfloat16"),
        (lambda views: views.update({HEAD: views.pop(EMBEDDING)}), rf"'{HEAD}'.*no parameter"),
    ],
    ids=["missing", "extra", "turned", "shorter", "dtype", "alias for owner"],
)
def test_views_that_do_not_fit_are_refused_by_name(
    tiny: Path, change: Callable[[dict[str, torch.Tensor]], Any], said: str
) -> None:
    model = attach.skeleton(tiny, torch.bfloat16)
    views = {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    attach.assign(attach.skeleton(tiny, torch.bfloat16), views, requires_grad=False)  # good until then
    change(views)
    with pytest.raises(AttachError, match=said):
        attach.assign(model, views, requires_grad=False)


def test_an_arena_of_two_dtypes_is_refused(tiny: Path) -> None:
    model = attach.skeleton(tiny, torch.bfloat16)
    tensors = [(n, torch.float32 if n == K else p.dtype, p.shape) for n, p in model.named_parameters()]
    arena = Arena.create(plan(tensors))
    with pytest.raises(AttachError, match=r"bfloat16.*float32"):
        attach.build(tiny, arena, requires_grad=False)
    arena.close()


@pytest.mark.parametrize(
    ("model", "arena", "fits"),
    [
        (torch.bfloat16, torch.float32, True),
        (torch.float16, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.float16, False),
        (torch.float16, torch.bfloat16, False),
    ],
)
def test_a_vector_may_be_fp32_in_a_narrower_model_and_nothing_else(
    tiny: Path, model: torch.dtype, arena: torch.dtype, fits: bool
) -> None:
    skeleton = attach.skeleton(tiny, model)
    views = {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in skeleton.named_parameters()}
    views[NORM] = torch.ones(64, dtype=arena)
    if not fits:
        with pytest.raises(AttachError, match=rf"'{NORM}'.*{arena}.*{model}".replace("torch.", r"torch\.")):
            attach.assign(skeleton, views, requires_grad=False)
        return
    attach.assign(skeleton, views, requires_grad=False)
    assert skeleton.model.norm.weight.data_ptr() == views[NORM].data_ptr()
    assert skeleton.model.norm.weight.dtype == arena


def test_an_arena_whose_first_slot_is_an_fp32_vector_is_built_in_the_dtype_of_its_matrices(tiny: Path) -> None:
    tensors = [(n, p.dtype, p.shape) for n, p in attach.skeleton(tiny, torch.bfloat16).named_parameters() if n != NORM]
    arena = Arena.create(plan([(NORM, torch.float32, (64,)), *tensors]))
    model = attach.build(tiny, arena, requires_grad=True)
    assert {n for n, p in model.named_parameters() if p.dtype == torch.float32} == {NORM}
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    assert all(arena.holds(p) for p in model.parameters())
    arena.close()


def test_a_parameter_outside_the_arena_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena, _ = on_arena(tiny)
    views = arena.views()
    views[K] = views[K].clone()
    monkeypatch.setattr(arena, "views", lambda: views)
    with pytest.raises(AttachError, match=rf"'{K}' does not lie in the arena"):
        attach.build(tiny, arena, requires_grad=False)
    arena.close()


# -- checkpoints that do not fit the arena -----------------------------------------------------------------------------
@pytest.fixture
def empty(checkpoint: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Views that hold nothing yet, each with a version counter of its own."""
    return {name: torch.full_like(tensor, torch.nan) for name, tensor in checkpoint.items()}


def test_fill_writes_each_view_exactly_once_with_the_bytes_of_the_checkpoint(
    checkpoint: dict[str, torch.Tensor], empty: dict[str, torch.Tensor]
) -> None:
    before = {name: view._version for name, view in empty.items()}
    attach.fill(empty, checkpoint.items(), {HEAD: EMBEDDING})
    for name, view in empty.items():
        assert torch.equal(view.view(torch.int16), checkpoint[name].view(torch.int16)), name
        assert view._version == before[name] + 1, name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda items: [(n, t) for n, t in items if n != K], rf"lacks '{K}' \(1 tensors"),
        (lambda items: [*items, ("stranger", torch.zeros(2))], r"'stranger' is unknown"),
        (lambda items: [*items, (K, torch.zeros(32, 64))], rf"'{K}' is unknown.*or came twice"),
        (lambda items: [(n, t.T if n == K else t) for n, t in items], rf"'{K}'.*\[64, 32\].*\[32, 64\]"),
        (lambda items: [(n, t[:1] if n == K else t) for n, t in items], rf"'{K}'.*\[1, 64\].*\[32, 64\]"),
        (lambda items: [(n, t[0, 0] if n == K else t) for n, t in items], rf"'{K}'.*\[\].*\[32, 64\]"),
        (lambda items: [(n, t.to(torch.int8) if n == K else t) for n, t in items], rf"'{K}'.*int8"),
        (lambda items: [], "lacks 'model.embed_tokens.weight' \\(20 tensors"),
    ],
    ids=["missing", "extra", "twice", "turned", "would broadcast", "scalar", "quantized", "empty"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    checkpoint: dict[str, torch.Tensor],
    empty: dict[str, torch.Tensor],
    change: Callable[[Any], list[tuple[str, torch.Tensor]]],
    said: str,
) -> None:
    with pytest.raises(AttachError, match=said):
        attach.fill(empty, change(checkpoint.items()), {HEAD: EMBEDDING})


@pytest.mark.parametrize("first", [True, False])
def test_a_tied_tensor_that_the_checkpoint_holds_twice_must_agree(
    checkpoint: dict[str, torch.Tensor], empty: dict[str, torch.Tensor], first: bool
) -> None:
    def items(head: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        return [(HEAD, head), *checkpoint.items()] if first else [*checkpoint.items(), (HEAD, head)]

    attach.fill(empty, items(checkpoint[EMBEDDING]), {HEAD: EMBEDDING})
    other = checkpoint[EMBEDDING].clone()
    other[17, 3] += 1
    for head in (other, checkpoint[EMBEDDING][:-1]):
        with pytest.raises(AttachError, match=rf"'{HEAD}'.*'{EMBEDDING}'"):
            attach.fill(empty, items(head), {HEAD: EMBEDDING})


# -- the right shapes with the wrong content ---------------------------------------------------------------------------
@pytest.fixture
def life(tmp_path: Path) -> Iterator[Callable[[], Server]]:
    """The part of a server's start that puts the last committed version into the arena, as often as it is started."""
    base = make_tiny(tmp_path / "base")
    (tmp_path / "state").mkdir(mode=0o700)
    opened: list[Server] = []

    def start() -> Server:
        server = object.__new__(Server)  # everything else of a start (port, engine, learner) is left out
        server.state_dir = tmp_path / "state"
        server.model_name = "tiny"
        server.store = Store(tmp_path / "state" / "insitu.db")
        server.versions = Versions(tmp_path / "state", base, server.store)
        skeleton = attach.skeleton(base, torch.bfloat16)
        server.arena = Arena.create(attach.layout(skeleton))
        server._views = server.arena.views()
        server._aliases = attach.tied(skeleton)
        opened.append(server)
        server._load(base)
        return server

    yield start
    for server in opened:
        server.store.close()
        server.arena.close()


def test_a_checkpoint_whose_k_and_v_changed_places_is_refused_at_the_next_start(
    tmp_path: Path, life: Callable[[], Server]
) -> None:
    first = life()
    assert life().arena.sha256() == first.arena.sha256()  # unchanged, it starts again
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors[K], tensors[V] = tensors[V], tensors[K]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(VersionError, match="belongs to another model"):
        life()


def test_a_version_whose_k_and_v_changed_places_is_refused_at_the_next_start(life: Callable[[], Server]) -> None:
    first = life()
    version = first.store.reserve("teach", 0)
    first._views[K].mul_(2)
    file = first.versions.write(version, first._views)
    first.store.commit(version, first.arena.sha256(), {}, file)
    assert life().arena.sha256() == first.arena.sha256()
    tensors = {name: view.clone() for name, view in first._views.items()}
    tensors[K], tensors[V] = tensors[V], tensors[K]
    other = first.store.reserve("teach", 0)
    first.versions.write(other, tensors)  # a file that is whole, and holds other bytes
    first.versions.path(other).replace(first.versions.path(version))
    with pytest.raises(VersionError, match="version 1 do not hold the bytes that were committed"):
        life()
