"""Gradient release: updates in backward, with the bits of the plain step, and no gradient longer than it is needed."""

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from test_contract import OPTIMIZERS, OURS, Make, Tied, backward, model, same
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

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


@pytest.mark.parametrize("backend", ["reference", "blocked"])
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


# --- what autograd does with a parameter ---


class Shared(nn.Module):
    """``tied`` is used three times, in two checkpointed parts, and ``unused`` never."""

    def __init__(self, reentrant: bool | None, tied: bool = True) -> None:
        super().__init__()
        self.tied, self.own, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.unused = nn.Parameter(torch.ones(3, 3))
        self.reentrant = reentrant
        self.again = self.tied if tied else self.other

    def forward(self, x: Tensor) -> Tensor:
        for part in (lambda x: self.own(self.tied(x)).tanh(), lambda x: self.again(x).tanh() + x):
            x = part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant)
        return x @ self.again.weight


def descend_shared(m: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).requires_grad_()
        m(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def shared(reentrant: bool | None = None, tied: bool = True) -> Shared:
    torch.manual_seed(1)
    return Shared(reentrant, tied)


@pytest.mark.parametrize("reentrant", [None, False], ids=["kept", "recomputed"])
def test_a_parameter_used_often_is_updated_once_and_an_unused_one_never(reentrant: bool | None) -> None:
    plain, released = shared(), shared(reentrant)
    optimizers = [OPTIMIZERS["APOLLO"](m.parameters()) for m in (plain, released)]
    GradientRelease(optimizers[1])
    for m, optimizer in zip((plain, released), optimizers, strict=True):
        descend_shared(m, optimizer)
    assert_same(plain, released, *optimizers)
    assert not optimizers[1].state[released.unused]


def test_reentrant_checkpoints_that_share_nothing() -> None:
    plain, released = (copy.deepcopy(shared(reentrant=True, tied=False)) for _ in range(2))
    for m in (plain, released):
        m.again = copy.deepcopy(m.own)
        m.forward = lambda x, m=m: checkpoint(  # type: ignore[method-assign]
            lambda x: m.again(x).tanh(), checkpoint(lambda x: m.own(m.tied(x)).tanh(), x, use_reentrant=True),
            use_reentrant=True,
        )  # fmt: skip
    optimizers = [OPTIMIZERS["APOLLO"](m.parameters()) for m in (plain, released)]
    GradientRelease(optimizers[1])
    for m, optimizer in zip((plain, released), optimizers, strict=True):
        descend_shared(m, optimizer)
    assert_same(plain, released, *optimizers)


def test_reentrant_checkpoints_that_share_a_parameter_are_refused() -> None:
    # Each part runs a backward of its own, so that the parameter gets two gradients.
    m = shared(reentrant=True)
    optimizer = OPTIMIZERS["APOLLO"](m.named_parameters())
    GradientRelease(optimizer)
    with pytest.raises(ValueError, match=r"the gradient of tied\.(weight|bias) was used and freed"):
        descend_shared(m, optimizer)


def test_a_weight_that_is_still_needed_is_not_changed_unseen() -> None:
    # Used once more where autograd sees only its values: torch itself notices that they have changed.
    w, first = nn.Parameter(torch.eye(3)), nn.Parameter(torch.eye(3))
    optimizer = APOLLOMini([w, first], lr=0.1)
    GradientRelease(optimizer)
    x = first @ torch.ones(3, 3)
    y = x @ w.detach()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y @ w).sum().backward()


def test_two_losses_over_different_parameters_are_one_step() -> None:
    plain, released = shared(tied=False), shared(tied=False)
    optimizers = [OPTIMIZERS["APOLLO"](m.parameters()) for m in (plain, released)]
    GradientRelease(optimizers[1])
    for m, optimizer in zip((plain, released), optimizers, strict=True):
        for _ in range(3):
            for part in (m.own, m.other):
                part(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(plain, released, *optimizers)


# --- a loop that changes ---


def test_after_remove_the_steps_are_plain_ones() -> None:
    plain, m = model(), model()
    optimizers = [OPTIMIZERS["APOLLO"](x.parameters()) for x in (plain, m)]
    release = GradientRelease(optimizers[1])
    train(plain, optimizers[0], range(6))
    train(m, optimizers[1], range(2))
    backward(m, 2)
    release.remove()  # of this step nothing is done twice
    optimizers[1].step()
    backward(m, 3)
    assert all(not is_released(p) for p in m.parameters())
    optimizers[1].step()
    optimizers[1].zero_grad()
    GradientRelease(optimizers[1])
    train(m, optimizers[1], range(4, 6))
    assert_same(plain, m, *optimizers)


def test_parameters_that_come_later_are_released_after_their_first_step() -> None:
    def run(release: bool) -> tuple[Tied, torch.optim.Optimizer]:
        m = model()
        m.up.weight.requires_grad_(False)
        optimizer = OPTIMIZERS["APOLLO"]([m.up.weight, m.table.weight])
        if release:
            GradientRelease(optimizer)
        train(m, optimizer, range(2))
        m.up.weight.requires_grad_(True)
        optimizer.add_param_group({"params": [m.down.weight], "lr": 0.1})
        train(m, optimizer, range(2, 3))
        train(m, optimizer, range(3, 5), lambda: seen.append([is_released(p) for p in (m.up.weight, m.down.weight)]))
        return m, optimizer

    seen: list[list[bool]] = []
    plain, one = run(release=False)
    released, other = run(release=True)
    assert_same(plain, released, one, other)
    assert seen == [[False, False]] * 2 + [[True, True]] * 2


def test_a_gradient_that_was_set_by_hand_is_used_by_step() -> None:
    plain, released = model(), model()
    optimizers = [OPTIMIZERS["APOLLO"](m.parameters()) for m in (plain, released)]
    GradientRelease(optimizers[1])
    for m, optimizer in zip((plain, released), optimizers, strict=True):
        m.gain.requires_grad_(False)
        backward(m, 0)
        m.gain.requires_grad_(True)
        m.gain.grad = torch.tensor(0.5)
        optimizer.step()
    assert_same(plain, released, *optimizers)
    assert released.gain != 1


def test_a_copy_of_the_optimizer_is_a_plain_one() -> None:
    m = model()
    optimizer = OPTIMIZERS["APOLLO"](m.parameters())
    GradientRelease(optimizer)
    train(m, optimizer, range(2))
    n, copied = copy.deepcopy((m, optimizer))
    before = copy.deepcopy(n)
    backward(n, 2)
    assert same(n, before)
    copied.step()
    train(m, optimizer, range(2, 3))
    assert_same(m, n, optimizer, copied)


def test_gradients_may_be_clipped_one_by_one() -> None:
    plain, released = model(), model()
    optimizers = [OPTIMIZERS["APOLLO"](m.parameters()) for m in (plain, released)]
    GradientRelease(optimizers[1])
    for p in released.parameters():
        if p.requires_grad:
            p.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    train(plain, optimizers[0], range(4), lambda: nn.utils.clip_grad_value_(plain.parameters(), 1e-3))
    train(released, optimizers[1], range(4))
    assert_same(plain, released, *optimizers)


def test_a_tensor_learning_rate_is_followed() -> None:
    def run(release: bool) -> nn.Module:
        m = model()
        optimizer = OPTIMIZERS["APOLLO"](m.parameters(), lr=torch.tensor(0.01))
        if release:
            GradientRelease(optimizer)
        for step in range(3):
            train(m, optimizer, range(step, step + 1))
            optimizer.param_groups[0]["lr"].mul_(0.5)
        return m

    assert same(run(release=False), run(release=True))
