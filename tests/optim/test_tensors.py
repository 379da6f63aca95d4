"""Tensors of every kind: strides, types, convolutions; options that change; the backends beside each other."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import insitu
from insitu import APOLLO, APOLLOMini
from insitu.optim.rounding import stochastic_round
from insitu.optim.seeds import mix


def stepped(start: torch.Tensor, gradients: list[torch.Tensor], conv: bool = False, **options: Any) -> torch.Tensor:
    """``start`` after some steps, as the optimizer leaves it."""
    W = nn.Parameter(start.clone())  # clone keeps the strides
    group = {"params": [W], "conv": conv}
    optimizer = APOLLO([group], **{"lr": 1e-2, "rank": 3, **options})
    for gradient in gradients:
        W.grad = gradient.to(W.dtype)
        optimizer.step()
    return W.detach()


def some(*shape: int, num: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(*shape, generator=generator) for _ in range(num)]


@pytest.mark.parametrize("backend", ["reference", "blocked", "native", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)], ids=str)
def test_strides_do_not_matter(backend: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    start, gradients = torch.randn(shape).to(dtype), some(*shape)
    turned = start.T.contiguous().T
    assert not turned.is_contiguous()
    plain = stepped(start, gradients, backend=backend)
    assert not torch.equal(plain, start)
    assert torch.equal(stepped(turned, gradients, backend=backend), plain)
    assert torch.equal(stepped(start, [g.T.contiguous().T for g in gradients], backend=backend), plain)
    assert torch.equal(stepped(start, [g.expand(2, *shape)[1] for g in gradients], backend=backend), plain)


@pytest.mark.parametrize("backend", ["reference", "blocked", "native", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (3, 9, 7)], ids=str)
def test_where_a_gradient_lies_does_not_matter(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    start, gradients = torch.randn(shape).to(dtype), [g.to(dtype) for g in some(*shape)]
    plain = stepped(start, gradients, backend=backend)
    for offset in (1, 4, 7):
        moved = [torch.cat([torch.zeros(offset, dtype=dtype), g.flatten()])[offset:].view(shape) for g in gradients]
        assert torch.equal(stepped(start, moved, backend=backend), plain)


@pytest.mark.parametrize(
    ("shape", "matrix", "conv"),
    [
        ((6, 4, 3, 3), (6, 36), False),
        ((6, 4, 3), (6, 12), True),
        ((1, 9, 7), (9, 7), False),
        ((9, 1, 7), (9, 7), False),
    ],
    ids=str,
)
def test_more_dimensions_are_read_as_a_matrix(shape: tuple[int, ...], matrix: tuple[int, int], conv: bool) -> None:
    start, gradients = torch.randn(shape), some(*shape)
    expected = stepped(start.reshape(matrix), [g.reshape(matrix) for g in gradients])
    assert torch.equal(stepped(start, gradients, conv=conv), expected.reshape(shape))
    if len(shape) == 4:
        last = start.to(memory_format=torch.channels_last)
        assert torch.equal(stepped(last, gradients), expected.reshape(shape))


def test_float64_weights_are_not_rounded_to_float32() -> None:
    start = torch.randn(8, 6, dtype=torch.float64)
    zero_rate = stepped(start, some(8, 6), lr=0.0)
    assert torch.equal(zero_rate, start)
    moved = stepped(start, some(8, 6), lr=1e-12)  # far below a float32's last place
    assert (moved != start).float().mean() > 0.9


@pytest.mark.parametrize("limit", [torch.float16, torch.bfloat16], ids=str)
def test_nearest_rounding_is_the_float32_step_rounded(limit: torch.dtype) -> None:
    start, gradient = torch.randn(12, 8).to(limit), torch.randn(12, 8).to(limit)
    exact = stepped(start.float(), [gradient.float()])
    assert torch.equal(stepped(start, [gradient], rounding="nearest"), exact.to(limit))


def test_a_bf16_step_is_the_float32_step_rounded_once() -> None:
    start, gradient = torch.randn(64, 48).bfloat16(), torch.randn(64, 48).bfloat16()
    exact = stepped(start.float(), [gradient.float()], weight_decay=0.1)
    rounded = stepped(start, [gradient], weight_decay=0.1)
    low = (exact.view(torch.int32) & -65536).view(torch.float32)
    high = ((exact.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert ((rounded.float() == low) | (rounded.float() == high)).all()
    assert not torch.equal(rounded, exact.bfloat16()), "nearest, not stochastic"


@pytest.mark.parametrize("options", [{}, {"projection": "sketch"}, {"rank": 1}], ids=str)
@pytest.mark.parametrize("shape", [(700, 200), (200, 700), (90, 70)], ids=str)
def test_the_backends_draw_the_same_bits(shape: tuple[int, int], options: dict[str, Any]) -> None:
    start, gradients = torch.randn(shape).bfloat16(), some(*shape)
    a, b = (stepped(start, gradients, backend=name, **options) for name in ("reference", "blocked"))
    # Sums in another order differ in float32's last places, 2^-16 of a bf16's: seldom enough to change a carry.
    assert (a == b).float().mean() > 0.998
    torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)


def test_a_changed_option_counts_from_the_next_step() -> None:
    def run(changes: dict[str, Any]) -> tuple[torch.Tensor, APOLLO]:
        W = nn.Parameter(some(12, 8)[0])
        optimizer = APOLLO([W], lr=1e-2, rank=3, limiter=None)
        for i, gradient in enumerate(some(12, 8, num=4)):
            if i == 3:
                optimizer.param_groups[0].update(changes)
                before = W.detach().clone()
            W.grad = gradient
            optimizer.step()
        return W.detach() - before, optimizer

    plain, _ = run({})
    doubled, _ = run({"alpha": 2 * (8 / 3) ** 0.5})
    # Differences of weights near 1, so a few last places of those: updates are near 1e-2.
    torch.testing.assert_close(doubled, 2 * plain, rtol=0, atol=1e-6)
    for changes in ({"granularity": "tensor"}, {"denominator": "exact"}, {"refresh": 2}, {"projection": "sketch"}):
        assert not torch.allclose(run(changes)[0], plain, rtol=1e-3), f"{changes} had no effect"
    smaller, optimizer = run({"rank": 2, "seed": 99})
    (state,) = optimizer.state.values()
    assert state["exp_avg"].shape == (12, 2)
    assert int(state["step"]) == 1, "the moments of another rank start afresh"
    assert state["seed"] == mix(0, 0), "drawn once, and kept"
    assert smaller.abs().max() > 0
    with pytest.raises(ValueError, match="rank=0"):
        run({"rank": 0})


def test_a_group_overrides_the_defaults() -> None:
    a, b = (nn.Parameter(torch.ones(12, 8)) for _ in range(2))
    optimizer = APOLLO([{"params": [a]}, {"params": [b], "rank": 2, "lr": 0.0}], rank=3)
    for p in (a, b):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[a]["exp_avg"].shape == (12, 3)
    assert optimizer.state[b]["exp_avg"].shape == (12, 2)
    assert (b == 1).all()
    assert (a != 1).all()
    with pytest.raises(ValueError, match=r"alpha=scale\*\*0\.5"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 4))], "scale": 128})
    assert len(optimizer.param_groups) == 2, "a refused group must not stay"


def test_mini_of_a_layer_with_one_output_does_not_warn() -> None:
    APOLLOMini(nn.Linear(8, 1).parameters())


def test_the_warning_points_at_the_users_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        APOLLO([nn.Parameter(torch.zeros(8, 8))], rank=5)
    assert Path(caught[0].filename) == Path(__file__)


@pytest.mark.parametrize("dense", ["adamw", "apollo", "sgd"])
def test_nothing_is_read_back_from_gradients(monkeypatch: pytest.MonkeyPatch, dense: str) -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 12), nn.Linear(12, 8)).bfloat16()
    # As on a device that would have to be waited for; the blocks are for CPUs.
    monkeypatch.setattr("insitu.optim.base.readable", lambda tensor: False)
    optimizer = APOLLO(insitu.param_groups(model), rank=2, weight_decay=0.1, backend="reference", dense=dense)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()

    def refuse(self: torch.Tensor, *_: object) -> None:
        raise AssertionError("a tensor was read back to the host")

    # int() stays allowed: the count of updates, which a CUDA device delivers beforehand.
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    optimizer.step()


def test_two_optimizers_loaded_from_one_dict_share_nothing_and_keep_float32() -> None:
    W = nn.Parameter(torch.randn(12, 8).bfloat16())
    first = APOLLO([W], rank=3)
    W.grad = torch.randn(12, 8).bfloat16()
    first.step()
    saved = first.state_dict()
    kept = copy.deepcopy(saved["state"])
    for _ in range(2):
        other = APOLLO([W], rank=3)
        other.load_state_dict(saved)
        assert other.state[W]["exp_avg"].dtype == torch.float32
        assert torch.equal(other.state[W]["exp_avg"], kept[0]["exp_avg"])
        other.step()
        assert torch.equal(saved["state"][0]["exp_avg"], kept[0]["exp_avg"])


def test_torchs_checkpointing_materialises_saves_and_restores_the_state() -> None:
    def make() -> tuple[nn.Module, APOLLO]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)).bfloat16()
        return model, APOLLO(insitu.param_groups(model), rank=2, refresh=2)

    def train(model: nn.Module, optimizer: APOLLO, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(torch.full((3, 8), 1.0 + step, dtype=torch.bfloat16)).square().sum().backward()
            optimizer.step()

    model, optimizer = make()
    start = [p.detach().clone() for p in model.parameters()]
    get_optimizer_state_dict(model, optimizer)  # steps once on zero gradients
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
    train(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), get_optimizer_state_dict(model, optimizer)))
    train(model, optimizer, range(3, 6))

    resumed, resumed_optimizer = make()
    resumed.load_state_dict(saved[0])
    set_optimizer_state_dict(resumed, resumed_optimizer, saved[1])
    train(resumed, resumed_optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_the_head_is_found_by_its_place_and_width() -> None:
    # Not every layer that happens to be as wide as a table: here the square one is as wide as the positions.
    width = 16
    model = nn.ModuleDict(
        {
            "positions": nn.Embedding(width, width),
            "words": nn.Embedding(50, width),
            "square": nn.Linear(width, width),
            "head": nn.Linear(width, 50),
        }
    )
    role = {name: g["role"] for g in insitu.param_groups(model) for name in g["param_names"]}
    assert role["square.weight"] == "matrix"
    assert role["words.weight"] == role["positions.weight"] == role["head.weight"] == "dense"
    named = {name: g["role"] for g in insitu.param_groups(model, head="square") for name in g["param_names"]}
    assert named["square.weight"] == "dense"
    assert named["head.weight"] == "matrix"
    with pytest.raises(ValueError, match="head='nowhere'"):
        insitu.param_groups(model, head="nowhere")


@pytest.mark.parametrize("start", [2**33 - 100, 2**33, 2**40 + 3])
def test_the_random_bits_of_huge_tensors_go_on(start: int) -> None:
    x = torch.full((4000,), 1.0 + 0.5 * 2.0**-7)
    whole = stochastic_round(x, seed=1, step=1, start=start)
    assert 0.45 < (whole.float() > 1).float().mean() < 0.55
    assert not torch.equal(whole, stochastic_round(x, seed=1, step=1, start=start % 2**33)) or start < 2**33
    for offset in (1, 100, 101, 3001):
        assert torch.equal(stochastic_round(x[offset:], 1, 1, start + offset), whole[offset:])


def test_infinities_and_nans_stay_what_they_are() -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0]).repeat(2000)
    rounded = stochastic_round(x, seed=0, step=0)
    assert torch.equal(rounded.view(torch.int16)[x.isfinite()], x.bfloat16().view(torch.int16)[x.isfinite()])
    assert torch.equal(rounded[x.isinf()], x[x.isinf()].bfloat16())
    assert rounded[x.isnan()].isnan().all()


def test_a_step_inside_a_cuda_graph_capture_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    p = nn.Parameter(torch.randn(8, 6))
    p.grad = torch.randn_like(p)
    optimizer = APOLLO([p], rank=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = p.detach().clone()
    for act in (optimizer.step, optimizer.prepare, optimizer.one_by_one):
        with pytest.raises(RuntimeError, match=r"inside a CUDA graph capture.*call step\(\) between replays"):
            act()
    assert torch.equal(p, before)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    optimizer.step()
    assert not torch.equal(p, before)
