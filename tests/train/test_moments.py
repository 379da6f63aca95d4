"""Moments in narrow types: exact rounding, real bytes, AdamW that stays AdamW, and a resume that rounds the same."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monitored import run, tiny_model, trainer, varied
from torch import nn

import insitu
from insitu.train.moments import BLOCK, FORMATS, decode, encode, store_moments

KINDS = list(FORMATS)


def every(kind: str) -> torch.Tensor:
    """All finite numbers of the type, float32, sorted."""
    if kind == "fp8":
        found = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    else:
        found = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(FORMATS[kind].dtype).float()
    return found[found.isfinite()].unique()


# -- rounding ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_number_becomes_one_of_its_two_neighbours_and_either_by_its_nearness(kind: str, data: Any) -> None:
    """Against the list of all numbers of the type, which torch makes."""
    format = FORMATS[kind]._replace(largest=None)
    numbers = every(kind)
    span = (-400.0, 400.0) if kind == "fp8" else (-6e4, 6e4)
    x = data.draw(
        st.floats(*span, width=32)
        | st.floats(-(2.0**-7), 2.0**-7, width=32)
        | st.floats(-(2.0**-20), 2.0**-20, width=32)
    )
    if kind == "bf16" and 0 < abs(x) < 2.0**-120:
        return
    u = data.draw(st.floats(0, 1, exclude_max=True, width=32))
    (found,), _ = encode(torch.tensor([x]), format, torch.tensor([u]))
    above = int(torch.searchsorted(numbers, torch.tensor(x), right=True))
    low, high = float(numbers[above - 1]), float(numbers[min(above, len(numbers) - 1)])
    if x == low:
        assert float(found) == low
        return
    share = (x - low) / (high - low)
    assert float(found) in (low, high)
    if abs(share - (1 - u)) > 1e-4:
        assert float(found) == (high if share > 1 - u else low)


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_of_the_type_stays_what_it_is_whatever_is_drawn(kind: str) -> None:
    format = FORMATS[kind]._replace(largest=None)
    x = every(kind)
    found, _ = encode(x, format, torch.full_like(x, 1 - 2**-24))
    assert torch.equal(found.float(), x)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_kept_where_rounding_to_nearest_would_lose_it(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.full((200 * BLOCK,), 1.0 + 1e-3)
    x[::BLOCK] = 448.0 if kind == "fp8" else 3.0  # so that the scale is known
    kept = decode(*encode(x, FORMATS[kind], torch.rand(x.shape)))
    others = torch.arange(len(x)) % BLOCK != 0
    step = {"bf16": 2**-7, "fp16": 2**-10, "fp8": 2**-3}[kind]
    assert float(kept[others].mean()) == pytest.approx(1 + 1e-3, abs=4 * step / math.sqrt(int(others.sum())))
    assert float(kept[others].max() - kept[others].min()) > 0.4 * step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1,), (255,), (256,), (257,), (3, 100), (2, 3, 512)])
def test_any_shape_comes_back_within_a_place_of_its_block(kind: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.logspace(-6, 3, math.prod(shape)).view(shape)
    numbers, scales = encode(x, FORMATS[kind], torch.rand(shape))
    assert numbers.shape == x.shape
    assert numbers.dtype == FORMATS[kind].dtype
    kept = decode(numbers, scales)
    assert kept.dtype == torch.float32
    relative = {"bf16": 2**-7, "fp16": 2**-10, "fp8": 2**-3}[kind]
    if scales is None:
        assert bool(((kept - x).abs() <= relative * x.abs()).all())
        return
    assert scales.shape == (-(-x.numel() // BLOCK),)
    smallest = {"fp16": 2.0**-24, "fp8": 2.0**-9}[kind]  # the last place of the type's subnormal numbers
    per_number = scales.repeat_interleave(BLOCK)[: x.numel()].view(shape)
    assert bool(((kept - x).abs() <= relative * x.abs() * 1.001 + smallest * per_number).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exponent", range(-45, -30))
def test_a_block_that_has_decayed_to_nothing_is_nothing(kind: str, exponent: int) -> None:
    x = torch.zeros(300)
    x[:3] = torch.tensor([1.0, -0.5, 0.25]) * 10.0**exponent
    found = decode(*encode(x, FORMATS[kind], torch.rand(300)))
    assert found.isfinite().all()
    assert (found - x).abs().max() <= max(float(x[0]) / 8, 1e-33)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zero(kind: str) -> None:
    numbers, scales = encode(torch.zeros(300), FORMATS[kind], torch.rand(300))
    assert torch.equal(decode(numbers, scales), torch.zeros(300))


# -- an optimizer ------------------------------------------------------------------------------------------------------
def stepped(kind: str, steps: int = 30, **options: Any) -> tuple[nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    layer = nn.Linear(64, 40)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, **options)
    store_moments(optimizer, kind)
    data = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(16, 64, generator=data)
        (layer(x) - x[:, :40]).square().mean().backward()
        optimizer.step()
    return layer, optimizer


def num_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What lies in memory, all but the step counts."""
    kept = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    return sum(t.untyped_storage().nbytes() for t in kept)


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}, {"amsgrad": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_adamw_with_narrow_moments_stays_near_adamw(kind: str, options: dict[str, Any]) -> None:
    exact, _ = stepped("fp32", **options)
    start, _ = stepped("fp32", 0)
    layer, optimizer = stepped(kind, **options)
    moments = 3 if "amsgrad" in options else 2
    for p, q, begin in zip(layer.parameters(), exact.parameters(), start.parameters(), strict=True):
        state = optimizer.state[p]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == FORMATS[kind].dtype
        distance = float(((p - q).norm() / (q - begin).norm()).detach())
        assert 0 < distance < {"bf16": 0.02, "fp16": 0.005, "fp8": 0.2}[kind]
    elements = sum(p.numel() for p in layer.parameters())
    blocks = sum(-(-p.numel() // BLOCK) for p in layer.parameters())
    per = FORMATS[kind].dtype.itemsize
    assert num_bytes(optimizer) == moments * (per * elements + (4 * blocks if kind != "bf16" else 0))


def test_bytes_of_state_for_each_precision() -> None:
    """Of a real model: 8, 4, 4 and 2 bytes a parameter, and a scale for 256 where there is one."""
    told = {}
    for kind in ("fp32", *KINDS):
        model = tiny_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        store_moments(optimizer, kind)
        model(input_ids=torch.tensor([[2, 3, 4]]), labels=torch.tensor([[2, 3, 4]])).loss.backward()
        optimizer.step()
        told[kind] = num_bytes(optimizer) / sum(p.numel() for p in model.parameters())
    assert told["fp32"] == 8
    assert told["bf16"] == 4
    assert told["fp16"] == pytest.approx(4 + 2 * 4 / BLOCK, rel=0.02)
    assert told["fp8"] == pytest.approx(2 + 2 * 4 / BLOCK, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_moment_decays_though_a_step_changes_it_by_a_thousandth(kind: str) -> None:
    """After a large gradient and then none, v is beta_2^t of what it was; rounded to nearest it would stay for ever."""
    p = nn.Parameter(torch.zeros(64 * BLOCK))
    optimizer = torch.optim.AdamW([p], lr=0.0)
    store_moments(optimizer, kind)
    for step in range(400):
        p.grad = torch.full_like(p, 1.0 if step == 0 else 0.0)
        optimizer.step()
    state = optimizer.state[p]
    v = decode(state["exp_avg_sq"], state.get("exp_avg_sq_scale")).square()
    assert float(v.mean()) == pytest.approx(1e-3 * 0.999**399, rel=0.05)


def test_a_second_moment_that_is_small_beside_its_block_does_not_vanish_before_its_first() -> None:
    """Gradients of 1 and of 1e-3 in one block: rounded as v, the small one's (1e-6 of the largest) would be 0 in float8, and
    m / sqrt(v) a step of m / eps."""
    p = nn.Parameter(torch.zeros(BLOCK))
    optimizer = torch.optim.AdamW([p], lr=1.0, weight_decay=0.0)
    store_moments(optimizer, "fp8")
    gradient = torch.full_like(p, 1e-3)
    gradient[0] = 1.0
    for _ in range(20):
        p.grad = gradient.clone()
        optimizer.step()
    assert float(torch.tensor(1e-6 * 448).to(torch.float8_e4m3fn)) == 0
    assert float(p.detach().abs().max()) < 40  # about a unit of lr each step


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_exactly(tmp_path: Path, kind: str) -> None:
    class Narrow(trainer_class()):  # type: ignore[misc]
        def create_optimizer(self, *args: Any) -> Any:
            made = super().create_optimizer(*args)
            store_moments(made, kind, seed=3)
            return made

    def made(path: Path, **changes: Any) -> Any:
        arguments = trainer(path, varied(32), max_steps=8, **changes).args
        return Narrow(model=tiny_model(), args=arguments, train_dataset=varied(32))

    whole = made(tmp_path / "whole", save_strategy="steps", save_steps=3)
    losses = run(whole)
    saved = torch.load(tmp_path / "whole" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert saved["state"][0]["exp_avg"].dtype == FORMATS[kind].dtype
    again = made(tmp_path / "again")
    assert run(again, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")) == losses
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


def trainer_class() -> type:
    from transformers import Trainer

    return Trainer


# -- other optimizers --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("optimizer", [insitu.APOLLO, insitu.ApolloQN])
def test_this_packages_optimizers_do_it_themselves(optimizer: Any) -> None:
    layer = nn.Linear(64, 64)
    made = optimizer(layer.parameters(), lr=1e-3, **({"rank": 8} if optimizer is insitu.APOLLO else {}))
    store_moments(made, "bf16")
    layer(torch.randn(4, 64)).square().mean().backward()
    made.step()
    kinds = {v.dtype for v in made.state[layer.weight].values() if isinstance(v, torch.Tensor) and v.numel() > 100}
    assert kinds == {torch.bfloat16}
    for kind in ("fp16", "fp8"):
        with pytest.raises(
            ValueError, match=rf"precision\.moments='{kind}': Apollo|APOLLO keeps its moments in 'fp32' or 'bf16'"
        ):
            store_moments(made, kind)


def test_state_that_is_not_known_is_refused_by_name() -> None:
    layer = nn.Linear(8, 8)
    optimizer = torch.optim.RMSprop(layer.parameters(), lr=1e-3)
    store_moments(optimizer, "fp8")
    layer(torch.randn(4, 8)).square().mean().backward()
    with pytest.raises(ValueError, match="RMSprop keeps 'square_avg', and how that may be rounded is not known"):
        optimizer.step()


def test_an_unknown_kind_is_refused_and_fp32_does_nothing() -> None:
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match=r"precision\.moments='int4'; expected 'fp32', 'bf16', 'fp16' or 'fp8'"):
        store_moments(optimizer, "int4")
    store_moments(optimizer, "fp32")
    assert not optimizer._optimizer_step_post_hooks
