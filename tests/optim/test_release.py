"""Gradient release: updates in backward, with the bits of the plain step, and no gradient longer than it is needed."""

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from test_contract import OPTIMIZERS, OURS, Make, backward, model, same
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import insitu
from insitu import APOLLO, APOLLOMini, GradientRelease
from insitu.optim.released import is_released
from insitu.optim.schedule import warmup_linear


@pytest.fixture(params=OURS)
def make(request: pytest.FixtureRequest) -> Make:
    return OPTIMIZERS[request.param]


def train(
    m: nn.Module, optimizer: torch.optim.Optimizer, steps: range, after: Callable[[], None] | None = None
) -> None:
    """``after`` is called between backward and step."""
    for step in steps:
        backward(m, step)
        if after:
            after()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(a: nn.Module, b: nn.Module, one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    """Weights and state, bit for bit."""
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
        mine, theirs = one.state[p], other.state[q]
        assert mine.keys() == theirs.keys(), name
        for key, value in mine.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key])), f"{key} of {name}"


def assert_released(m: nn.Module, before: nn.Module) -> None:
    """Everything with a gradient was updated already, and nothing of a gradient is left."""
    for (name, p), q in zip(m.named_parameters(), before.named_parameters(), strict=True):
        if p.requires_grad and p.numel():
            assert is_released(p), name
            assert p.ndim < 2 or not torch.equal(p, q[1]), name  # a bf16 scalar may round to what it was


# --- the same as the plain step ---


@pytest.mark.parametrize("kind", [APOLLO, APOLLOMini])
def test_int8_weights_are_released_too(kind: type[APOLLO]) -> None:
    plain, released = (nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 30), nn.Linear(30, 9)) for _ in "ab")
    released.load_state_dict(plain.state_dict())
    optimizers = []
    for m in (plain, released):
        assert insitu.quantize(m, group_size=16)
        options = {} if kind is APOLLOMini else {"rank": 4}
        optimizers.append(kind(insitu.param_groups(m), lr=0.02, **options))
    release = GradientRelease(optimizers[1])
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    for step in range(5):
        x = torch.randn(6, 24, generator=torch.Generator().manual_seed(step))
        for m, optimizer in zip((plain, released), optimizers, strict=True):
            m(x).square().mean().backward()
            if m is released:
                assert all(is_released(p) for p in m.parameters())
            optimizer.step()
            optimizer.zero_grad()
    release.remove()
    for (name, mine), theirs in zip(plain.state_dict().items(), released.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert not torch.equal(plain.state_dict()["0.weight_int8"], start["0.weight_int8"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_plain_step_bit_for_bit(make: Make, dtype: torch.dtype) -> None:
    plain, released = model(dtype), model(dtype)
    optimizers = [make(m.named_parameters(), weight_decay=0.01, lr=0.02) for m in (plain, released)]
    GradientRelease(optimizers[1])
    schedulers = [warmup_linear(optimizer, warmup=2, total=9) for optimizer in optimizers]
    for step in range(7):
        before = copy.deepcopy(released)
        train(plain, optimizers[0], range(step, step + 1))
        train(released, optimizers[1], range(step, step + 1), lambda before=before: assert_released(released, before))
        for scheduler in schedulers:
            scheduler.step()
    assert_same(plain, released, *optimizers)
    assert not same(plain, model(dtype))


@pytest.mark.parametrize("backend", ["reference", "blocked", "native", "fused"])
@pytest.mark.parametrize("how", ["accumulate", "last"])
def test_under_accumulation_gradients_are_kept_until_the_last_micro_batch(how: str, backend: str) -> None:
    plain, released = model(), model()
    optimizers = [OPTIMIZERS["APOLLO"](m.parameters(), backend=backend) for m in (plain, released)]
    last = False
    release = GradientRelease(optimizers[1], last=(lambda: last) if how == "last" else None)
    for step in range(4):
        for micro in range(3):
            last = micro == 2
            backward(plain, 3 * step + micro)
            before = copy.deepcopy(released)
            if how == "accumulate" and not last:
                with release.accumulate():
                    backward(released, 3 * step + micro)
            else:
                backward(released, 3 * step + micro)
            if last:
                assert_released(released, before)
            else:
                assert same(released, before)
                assert all(torch.equal(p.grad, q.grad) for p, q in _with_gradient(plain, released))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(plain, released, *optimizers)


def _with_gradient(a: nn.Module, b: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return ((p, q) for p, q in pairs if p.grad is not None and q.grad is not None)


def test_a_step_whose_micro_batches_were_all_accumulated_is_made_by_step() -> None:
    plain, released = model(), model()
    optimizers = [APOLLOMini(m.parameters()) for m in (plain, released)]
    release = GradientRelease(optimizers[1])
    for step in range(3):
        backward(plain, step)
        with release.accumulate():
            backward(released, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(plain, released, *optimizers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("stop", "then"), [(1, "plain"), (4, "released")])
def test_a_resume_is_bit_exact(make: Make, dtype: torch.dtype, stop: int, then: str) -> None:
    whole = model(dtype)
    unbroken = make(whole.parameters())
    GradientRelease(unbroken)
    train(whole, unbroken, range(8))

    first = model(dtype)
    optimizer = make(first.parameters())
    GradientRelease(optimizer)
    train(first, optimizer, range(stop))
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second = model(dtype)
    second.load_state_dict(weights)
    resumed = make(second.parameters())
    if then == "released":
        GradientRelease(resumed)  # before the state is loaded, which replaces the groups
    resumed.load_state_dict(state)
    train(second, resumed, range(stop, 8))
    assert_same(whole, second, unbroken, resumed)


# --- memory ---


class Live:
    """Bytes of the gradients that exist, whoever holds them, looked at whenever one arrives."""

    def __init__(self, m: nn.Module) -> None:
        self.storages: list[tuple[StorageWeakRef, int]] = []
        self.most = 0
        for p in m.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self.look)

    def look(self, p: Tensor) -> None:
        assert p.grad is not None
        self.storages = [(held, size) for held, size in self.storages if not held.expired()]
        self.storages.append((StorageWeakRef(p.grad.untyped_storage()), p.grad.nbytes))
        self.most = max(self.most, sum(size for _, size in self.storages))


@pytest.mark.parametrize("released", [True, False])
def test_no_more_than_one_gradient_lives_at_a_time(released: bool) -> None:
    torch.manual_seed(0)
    m = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(9)], nn.Linear(64, 200, bias=False))
    live = Live(m)  # before the release, to see every gradient
    optimizer = APOLLO(insitu.param_groups(m, adamw=["0.*"]), rank=4)
    if released:
        GradientRelease(optimizer)
    for _ in range(3):
        m(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert live.most == (4 * 64 * 200 if released else 4 * (9 * 64 * 64 + 64 * 200))
