"""Gradient release in all kinds of loops: shared and unused parameters, checkpointing, and loops that change on their way."""

import copy

import pytest
import torch
from test_contract import OPTIMIZERS, Tied, backward, model, same
from test_release import assert_same, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from insitu import APOLLOMini, GradientRelease
from insitu.optim.released import is_released


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
