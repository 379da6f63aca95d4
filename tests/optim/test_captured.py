"""A step that is part of a CUDA graph: replays do what steps do, to the bit, whatever changes from step to step.

The graph is played by :class:`tape.Tape`; the same on a GPU is in tests/gpu/test_captured.py.
"""

from typing import Any

import pytest
import torch
from backend_cases import INTERPRETED, MARKS
from tape import Tape, captured
from torch import Tensor, nn

from insitu import APOLLO, ApolloQN, GradientRelease, quantize
from insitu.optim.rounding import hash_numbers
from insitu.optim.seeds import mix, mix_on_device

pytestmark = MARKS
BACKEND = "triton" if INTERPRETED else "reference"
SHAPES = [(24, 20), (24, 20), (24, 20), (18, 33), (3, 16, 17), (37,), (37,)]
STEPS = 9
Trained = tuple[APOLLO, list[nn.Parameter]]


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def optimizer_of(params: list[nn.Parameter], **options: Any) -> APOLLO:
    numbers = {"lr": 1e-2, "rank": 4, "refresh": 3, "weight_decay": 0.1, "nonfinite": "skip", "backend": BACKEND}
    return APOLLO(params, **{**numbers, **options})


def gradients(step: int, dtype: torch.dtype) -> list[Tensor]:
    """As large as they are different; at some steps one is zero, or not finite, so that the updates of the tensors differ."""
    generator = torch.Generator().manual_seed(100 + step)
    made = [(torch.randn(s, generator=generator) * 10.0 ** (-step % 3)).to(dtype) for s in SHAPES]
    if step == 3:
        made[1].zero_()
    if step == 5:
        made[3][2, 1] = float("nan")
        made[6][0] = float("inf")
    return made


def fill(params: list[nn.Parameter], step: int) -> None:
    for p, gradient in zip(params, gradients(step, params[0].dtype), strict=True):
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        p.grad.copy_(gradient)


def device_of(optimizer: APOLLO, params: list[nn.Parameter]) -> list[Tensor]:
    state = [x for p in params for x in optimizer.state[p].values() if isinstance(x, Tensor)]
    return [*params, *(p.grad for p in params if p.grad is not None), *state]


def capture(monkeypatch: pytest.MonkeyPatch, optimizer: APOLLO, params: list[nn.Parameter]) -> Tape:
    with captured(monkeypatch, device_of(optimizer, params)) as tape:
        optimizer.step()
    return tape


def same(a: Trained, b: Trained) -> None:
    for i, (p, q) in enumerate(zip(a[1], b[1], strict=True)):
        assert torch.equal(p, q), f"parameter {i}"
        mine, theirs = a[0].state[p], b[0].state[q]
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[name])), f"{name} of parameter {i}"


def a_step_and_a_replay(step: int, plain: Trained, replayed: Trained, tape: Tape) -> None:
    fill(plain[1], step)
    plain[0].step()
    fill(replayed[1], step)
    replayed[0].advance()
    tape.replay()
    same(replayed, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 1, "granularity": "tensor", "moments": "bfloat16"},
        {"projection": "sketch", "rounding": "compensated", "denominator": "exact"},
        {"projection": "rademacher", "rounding": "nearest", "limiter": None, "maximize": True},
    ],
    ids=str,
)
def test_replays_are_steps_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], dtype: torch.dtype
) -> None:
    expected, params = parameters(dtype), parameters(dtype)
    plain, optimizer = optimizer_of(expected, **options), optimizer_of(params, **options, capturable=True)
    for step in range(2):
        for some, its in ((expected, plain), (params, optimizer)):
            fill(some, step)
            its.step()
    same((optimizer, params), (plain, expected))
    tape = capture(monkeypatch, optimizer, params)
    same((optimizer, params), (plain, expected))  # a capture does nothing
    for step in range(2, STEPS):  # over three refreshes
        a_step_and_a_replay(step, (plain, expected), (optimizer, params), tape)
    updates = [int(plain.state[p]["step"]) for p in expected]
    assert updates == [9, 8, 9, 8, 9, 9, 8]
    assert [int(plain.state[p]["skipped"]) for p in expected] == [0, 0, 0, 1, 0, 0, 1]
    fill(expected, STEPS)  # and back to steps without a graph
    fill(params, STEPS)
    plain.step()
    optimizer.step()
    same((optimizer, params), (plain, expected))


def test_a_tensor_whose_projection_is_due_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, params = parameters(torch.float32), parameters(torch.float32)
    plain, optimizer = optimizer_of(expected), optimizer_of(params, capturable=True)
    for some, its in ((expected, plain), (params, optimizer)):
        fill(some, 0)
        its.step()
    tape = capture(monkeypatch, optimizer, params)
    for step in (1, 2):
        fill(params, step)
        optimizer.advance()
        tape.replay()
    before = [p.detach().clone() for p in params]
    fill(params, 7)
    tape.replay()  # three updates are done: the next has another projection, which nobody has put there
    moved = [not torch.equal(p, old) for p, old in zip(params, before, strict=True)]
    assert moved == [False] * 5 + [True] * 2, "vectors have none"
    fill(params, 4)
    optimizer.advance()
    tape.replay()
    for step in (1, 2, 4):
        fill(expected, step)
        plain.step()
    for p, q in zip(params[:5], expected, strict=False):
        assert torch.equal(p, q)


def test_the_learning_rate_is_a_tensor_that_may_be_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = torch.tensor(1e-2)
    expected, params = parameters(torch.bfloat16), parameters(torch.bfloat16)
    plain, optimizer = optimizer_of(expected), optimizer_of(params, lr=rate, capturable=True)
    for some, its in ((expected, plain), (params, optimizer)):
        fill(some, 0)
        its.step()
    tape = capture(monkeypatch, optimizer, params)
    for step, lr in ((1, 0.5), (2, 1e-4)):
        rate.fill_(lr)
        for group in plain.param_groups:
            group["lr"] = torch.tensor(lr)
        a_step_and_a_replay(step, (plain, expected), (optimizer, params), tape)


@pytest.mark.skipif(INTERPRETED, reason="int8 is the reference's")
def test_int8_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = []
    for model, capturable in zip(models, (False, True), strict=True):
        quantize(model, group_size=16)
        optimizers.append(APOLLO(model.parameters(), rank=2, refresh=2, backend="reference", capturable=capturable))

    def step(number: int, i: int, act: Any) -> None:
        generator = torch.Generator().manual_seed(number)
        for p in models[i].parameters():
            fresh = torch.randn(p.shape, generator=generator)
            if p.grad is None:
                p.grad = torch.zeros_like(fresh)
            p.grad.copy_(fresh)
        act()

    for i in (0, 1):
        step(0, i, optimizers[i].step)
    params = list(models[1].parameters())
    stored = [x for p in params for x in ((p.int_data, p.scale) if hasattr(p, "int_data") else (p,))]
    with captured(monkeypatch, [*stored, *device_of(optimizers[1], params)[len(params) :]]) as tape:
        optimizers[1].step()

    def replay() -> None:
        optimizers[1].advance()
        tape.replay()

    for number in range(1, 6):
        step(number, 0, optimizers[0].step)
        step(number, 1, replay)
    for p, q in zip(models[0].parameters(), params, strict=True):
        pairs = [(p.int_data, q.int_data), (p.scale, q.scale)] if hasattr(p, "int_data") else [(p, q)]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_gradient_that_was_not_finite_in_a_replay_is_refused_by_name_at_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = parameters(torch.float32)
    optimizer = optimizer_of(params, nonfinite="error", capturable=True)
    fill(params, 0)
    optimizer.step()
    tape = capture(monkeypatch, optimizer, params)
    fill(params, 5)
    optimizer.advance()
    before = [p.detach().clone() for p in params]
    tape.replay()
    moved = [not torch.equal(p, old) for p, old in zip(params, before, strict=True)]
    assert moved == [True, True, True, False, True, True, False]
    with pytest.raises(ValueError, match="the gradient of parameter 3 is not finite"):
        optimizer.advance()
    optimizer.advance()  # said once
    fill(params, 1)
    tape.replay()
    assert not torch.equal(params[3], before[3])


def test_a_tape_notices_a_step_that_asks_the_host() -> None:
    params = parameters(torch.float32)
    optimizer = optimizer_of(params)
    fill(params, 0)
    optimizer.step()
    with pytest.raises(AssertionError, match="makes the host wait"), Tape(device_of(optimizer, params)):
        optimizer.step()


def test_a_tape_repeats_numbers_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(3)
    number = 1.0
    with captured(monkeypatch, [x]) as tape:
        x.add_(number)
    assert torch.equal(x, torch.zeros(3))
    number = 5.0
    tape.replay()
    tape.replay()
    assert torch.equal(x, torch.full((3,), 2.0))


def test_what_cannot_be_captured_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    p = nn.Parameter(torch.randn(8, 6))
    p.grad = torch.randn_like(p)
    before = p.detach().clone()
    with pytest.raises(ValueError, match="capturable='yes'"):
        APOLLO([p], rank=2, capturable="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="projection='svd' with capturable=True"):
        APOLLO([p], rank=2, projection="svd", capturable=True)
    for backend, message in (
        ("auto", "parameter 0 is on cpu: expected a CUDA device"),
        ("native", "expected one of 'auto', 'reference', 'triton'"),
    ):
        optimizer = APOLLO([p], rank=2, backend=backend, capturable=True)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    optimizer = APOLLO([p], lr=torch.tensor(1e-3, device="meta"), rank=2, backend="reference", capturable=True)
    with pytest.raises(ValueError, match=r"lr is a tensor on meta.*give lr.to\('cpu'\)"):
        optimizer.step()
    with pytest.raises(TypeError, match="capturable=True: a step takes its number from the host"):
        ApolloQN([p], capturable=True)
    optimizer = APOLLO([p], rank=2, backend="reference", capturable=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="parameter 0 has no state yet"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="before each replay, outside of the graph"):
            optimizer.advance()
    with pytest.raises(ValueError, match="capturable=True with an update in backward"):
        optimizer.one_by_one()
    assert torch.equal(p, before)


@pytest.mark.parametrize("change", [{"rank": 3}, {"rounding": "compensated"}], ids=str)
def test_a_state_is_not_made_in_a_capture(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    p = nn.Parameter(torch.randn(8, 6).bfloat16())
    p.grad = torch.randn_like(p)
    optimizer = APOLLO([p], rank=2, backend=BACKEND, capturable=True)
    optimizer.step()
    optimizer.param_groups[0].update(change)
    with pytest.raises(RuntimeError, match="or none of these options"):
        capture(monkeypatch, optimizer, [p])
    optimizer.step()
    capture(monkeypatch, optimizer, [p])


def test_a_graph_that_is_not_of_this_state_or_these_options_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(torch.float32)
    optimizer = optimizer_of(params, capturable=True)
    fill(params, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="no step of this optimizer was captured"):
        optimizer.advance()
    capture(monkeypatch, optimizer, params)
    optimizer.advance()
    group = optimizer.param_groups[0]
    for name, value, message in (
        ("rank", 3, "rank is 3, but was 4 when the step was captured"),
        ("lr", 0.5, "lr is 0.5, but was 0.01 when.*or give lr as a tensor on the device"),
        ("refresh", 4, "refresh is 4, but was 3"),
    ):
        before, group[name] = group[name], value
        with pytest.raises(RuntimeError, match=message):
            optimizer.advance()
        group[name] = before
    optimizer.advance()
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(6, 5))], "rank": 2})
    with pytest.raises(RuntimeError, match="2 groups, but 1 when"):
        optimizer.advance()
    optimizer.param_groups.pop()
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"or it was before load_state_dict\(\)"):
        optimizer.advance()


def test_with_release_it_is_refused_in_backward() -> None:
    p = nn.Parameter(torch.randn(8, 6))
    release = GradientRelease(APOLLO([p], rank=2, backend="reference", capturable=True))
    with pytest.raises(ValueError, match="expected whole steps"):
        p.square().sum().backward()
    release.remove()


def test_a_state_of_before_the_option_can_be_loaded() -> None:
    params = parameters(torch.float32)
    optimizer = optimizer_of(params)
    fill(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["capturable"]
    again = optimizer_of(params)
    again.load_state_dict(saved)
    assert [group["capturable"] for group in again.param_groups] == [False]
    again.step()


def test_the_hash_on_a_device_is_the_hosts() -> None:
    generator = torch.Generator().manual_seed(3)
    seeds = torch.randint(2**62, (200,), generator=generator) * 2 + 1
    counts = torch.randint(10**6, (200,), generator=generator)
    counts[:3] = torch.tensor([0, 1, 2**40])
    for salts in ((), (797,), (2**64 - 1, -5)):
        expected = [mix(s, c, *salts) for s, c in zip(seeds.tolist(), counts.tolist(), strict=True)]
        assert mix_on_device(seeds, counts, *salts).tolist() == expected
    keys = mix_on_device(seeds, counts)
    for start in (0, 7, 2**33 + 5, 2**40 + 2):
        base, factor, odd = hash_numbers(keys, start)
        found = list(zip(base.tolist(), factor.tolist(), [odd] * 200, strict=True))
        assert found == [hash_numbers(key, start) for key in keys.tolist()]
