"""What torch promises of an optimizer, asked of every one of ours, with torch's own AdamW as a check of the questions."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from insitu import APOLLO, APOLLOMini, ApolloQN, ApolloQNW

Make = Callable[..., torch.optim.Optimizer]


def quietly(cls: type[torch.optim.Optimizer], **fixed: Any) -> Make:
    def make(params: Any, **options: Any) -> torch.optim.Optimizer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ranks, which are large beside these tensors
            return cls(params, **{**fixed, **options})

    return make


OPTIMIZERS: dict[str, Make] = {
    "AdamW": quietly(torch.optim.AdamW, lr=1e-2),
    "APOLLO": quietly(APOLLO, lr=1e-2, rank=3, refresh=2),
    "APOLLO svd": quietly(APOLLO, lr=1e-2, rank=3, refresh=2, projection="svd"),
    "APOLLO sketch, bf16 moments": quietly(APOLLO, lr=1e-2, rank=3, refresh=2, projection="sketch", moments="bfloat16"),
    "APOLLO compensated": quietly(APOLLO, lr=1e-2, rank=3, rounding="compensated"),
    "APOLLOMini": quietly(APOLLOMini, lr=1e-2, refresh=2),
    "ApolloQN": quietly(ApolloQN, lr=0.01, warmup=0),
    "ApolloQN belief, bf16": quietly(ApolloQN, lr=0.01, warmup=0, rebound="belief", moments="bfloat16"),
    "ApolloQNW": quietly(ApolloQNW, lr=0.01, warmup=2, weight_decay=1e-3),
}
OURS = [name for name in OPTIMIZERS if name != "AdamW"]


@pytest.fixture(params=OPTIMIZERS)
def make(request: pytest.FixtureRequest) -> Make:
    return OPTIMIZERS[request.param]


@pytest.fixture(params=OURS)
def make_ours(request: pytest.FixtureRequest) -> Make:
    return OPTIMIZERS[request.param]


class Tied(nn.Module):
    """Every kind of tensor: tied table, matrices, a stack, a convolution, vectors, a scalar, an empty one, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.experts = nn.Parameter(torch.randn(3, 8, 5) * 0.3)
        self.back = nn.Parameter(torch.randn(3, 5, 8) * 0.3)
        self.norm = nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.nothing = nn.Parameter(torch.zeros(0, 4))
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        x = x + self.down(torch.relu(self.up(x)))
        x = x + self.conv(x.T[None])[0].T
        x = x + torch.einsum("ti,eij,ejk->tk", x, self.experts, self.back) * self.gain
        return self.head(self.norm(x) * self.frozen) + self.nothing.sum()


def model(dtype: torch.dtype = torch.float32) -> Tied:
    torch.manual_seed(3)
    return Tied().to(dtype)


def backward(m: nn.Module, step: int) -> torch.Tensor:
    tokens = torch.randint(0, 11, (9,), generator=torch.Generator().manual_seed(step))
    loss = nn.functional.cross_entropy(m(tokens).float(), tokens.roll(1))
    loss.backward()
    return loss


def train(m: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        losses.append(backward(m, step % 2).item())
        optimizer.step()
    return losses


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_learns(make: Make, dtype: torch.dtype) -> None:
    m = model(dtype)
    losses = train(m, make(m.parameters()), range(60))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_resume_is_bit_exact(make: Make, dtype: torch.dtype, stop: int) -> None:
    whole = model(dtype)
    train(whole, make(whole.parameters()), range(9))
    first = model(dtype)
    optimizer = make(first.parameters())
    train(first, optimizer, range(stop))
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second = model(dtype)
    second.load_state_dict(weights)
    resumed = make(second.parameters())
    resumed.load_state_dict(state)
    train(second, resumed, range(stop, 9))
    assert same(second, whole)
    assert not same(first, whole)


def test_copies_and_pickles_step_alike(make: Make) -> None:
    m = model()
    optimizer = make(m.parameters())
    train(m, optimizer, range(3))
    other, copied = copy.deepcopy((m, optimizer))
    third, unpickled = pickle.loads(pickle.dumps((m, optimizer)))  # noqa: S301 - our own bytes
    for each, its in ((m, optimizer), (other, copied), (third, unpickled)):
        train(each, its, range(3, 7))
    assert same(m, other)
    assert same(m, third)


def test_the_closure_has_gradients_and_its_loss_comes_back(make: Make) -> None:
    m, n = model(), model()
    a, b = make(m.parameters()), make(n.parameters())

    def closure() -> torch.Tensor:
        a.zero_grad()
        return backward(m, 0)

    loss = a.step(closure)
    assert torch.equal(loss, backward(n, 0))
    b.step()
    assert same(m, n)


def test_maximize_is_descent_on_the_negative(make: Make) -> None:
    m, n = model(), model()
    up, down = make(m.parameters(), maximize=True), make(n.parameters())
    for step in range(5):
        for each, optimizer, sign in ((m, up, -1), (n, down, 1)):
            optimizer.zero_grad()
            backward(each, step)
            for p in each.parameters():
                if p.grad is not None:
                    p.grad.mul_(sign)
            optimizer.step()
    assert same(m, n)


def test_a_tensor_learning_rate_is_a_number_and_a_scheduler_moves_it(make: Make) -> None:
    m, n = model(), model()
    a, b = make(m.parameters(), lr=torch.tensor(0.01)), make(n.parameters(), lr=torch.tensor(0.01).item())
    for each, optimizer in ((m, a), (n, b)):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
        for step in range(5):
            train(each, optimizer, range(step, step + 1))
            scheduler.step()
    for p, q in zip(m.parameters(), n.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert float(a.param_groups[0]["lr"]) == pytest.approx(1e-4)


def test_a_learning_rate_of_zero_keeps_the_weights(make: Make) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        m, untouched = model(dtype), model(dtype)
        train(m, make(m.parameters(), lr=0.0), range(3))
        assert same(m, untouched)


def test_tensors_without_gradient_stand_still_and_come_back(make: Make) -> None:
    m = model()
    optimizer = make(m.parameters())
    train(m, optimizer, range(2))
    kept = m.up.weight.detach().clone()
    for step in range(2):
        optimizer.zero_grad()
        backward(m, step)
        m.up.weight.grad = None
        optimizer.step()
    assert torch.equal(m.up.weight, kept)
    train(m, optimizer, range(1))
    assert not torch.equal(m.up.weight, kept)


def test_a_group_can_be_added_later(make: Make) -> None:
    m = model()
    optimizer = make([m.up.weight])
    train(m, optimizer, range(2))
    before = m.down.weight.detach().clone()
    optimizer.add_param_group({"params": [m.down.weight], "lr": 0.1})
    train(m, optimizer, range(2))
    assert (m.down.weight - before).abs().max() > 0.05
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [m.up.weight]})


def test_named_parameters_are_taken(make: Make) -> None:
    m, n = model(), model()
    train(m, make(m.named_parameters()), range(3))
    train(n, make(n.parameters()), range(3))
    assert same(m, n)


def test_hooks_are_called(make: Make) -> None:
    m = model()
    optimizer = make(m.parameters())
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(m, optimizer, range(1))
    assert calls == ["before", "after"]


def test_frozen_and_empty_tensors_are_harmless(make: Make) -> None:
    m = model()
    train(m, make(m.parameters()), range(2))
    assert torch.equal(m.frozen, torch.ones(8))


def test_a_module_is_refused_with_the_way_out(make_ours: Make) -> None:
    with pytest.raises(TypeError, match=r"params is a module \(Tied\).*insitu.param_groups\(model\)"):
        make_ours(model())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_zero_gradient_makes_the_state_and_changes_nothing(make_ours: Make, dtype: torch.dtype) -> None:
    m, untouched = model(dtype), model(dtype)
    optimizer = make_ours(m.parameters(), weight_decay=0.1)
    for p in m.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    assert same(m, untouched)
    assert all(len(optimizer.state[p]) > 2 for p in m.parameters() if p.requires_grad and p.numel())
    fresh = model(dtype)
    train(fresh, make_ours(fresh.parameters(), weight_decay=0.1), range(4))
    train(m, optimizer, range(4))
    assert same(m, fresh), "the zero step was felt afterwards"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["up.weight", "up.bias", "experts", "gain", "table.weight"])
def test_a_gradient_that_is_not_finite_is_refused_before_anything_changes(
    make_ours: Make, bad: float, which: str
) -> None:
    m = model(torch.bfloat16)
    optimizer = make_ours(m.named_parameters())
    train(m, optimizer, range(2))
    before, state = copy.deepcopy(m), copy.deepcopy(optimizer.state_dict())
    backward(m, 3)
    m.get_parameter(which).grad.view(-1)[0] = bad
    with pytest.raises(ValueError, match=f"the gradient of {which} is not finite.*nonfinite='skip'"):
        optimizer.step()
    assert same(m, before)
    after = optimizer.state_dict()
    for index, entries in state["state"].items():
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][index][key])), key


@pytest.mark.parametrize("backend", ["reference", "blocked", "native", "fused"])
@pytest.mark.parametrize("which", ["up.weight", "up.bias", "experts", "gain", "table.weight"])
def test_skip_leaves_the_tensor_out_and_counts_it(make_ours: Make, backend: str, which: str) -> None:
    m, n = model(torch.bfloat16), model(torch.bfloat16)
    skipping, plain = (make_ours(x.parameters(), nonfinite="skip", backend=backend) for x in (m, n))
    for step in range(6):
        for each, optimizer in ((m, skipping), (n, plain)):
            optimizer.zero_grad()
            backward(each, step)
            p = each.get_parameter(which)
            if step == 3:
                if each is m:
                    p.grad.view(-1)[-1] = float("nan")
                else:
                    p.grad = None
            optimizer.step()
    assert same(m, n)
    counts = {name: int(skipping.state[p]["skipped"]) for name, p in m.named_parameters() if p in skipping.state}
    assert counts[which] == 1
    assert sum(counts.values()) == 1
    assert int(skipping.state[m.get_parameter(which)]["step"]) == 5


def test_where_reading_waits_for_the_device_the_error_comes_one_step_later(
    make_ours: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ("base", "counting", "kept"):
        monkeypatch.setattr(f"insitu.optim.{room}.readable", lambda tensor: False)
    m = model()
    optimizer = make_ours(m.named_parameters(), backend="reference")
    train(m, optimizer, range(2))
    optimizer.zero_grad()
    backward(m, 0)
    m.up.weight.grad[0, 0] = float("nan")
    before = m.up.weight.detach().clone()
    optimizer.step()
    assert torch.equal(m.up.weight, before)
    with pytest.raises(ValueError, match=r"the gradient of up\.weight is not finite"):
        train(m, optimizer, range(1))
    train(m, optimizer, range(1))
    assert not torch.equal(m.up.weight, before)
    assert all(p.isfinite().all() for p in m.parameters())


def test_float64_parameters_keep_their_precision(make_ours: Make) -> None:
    p = nn.Parameter(torch.randn(12, 8, dtype=torch.float64))
    start = p.detach().clone()
    optimizer = make_ours([p], lr=1e-12)
    for _ in range(2):
        p.grad = torch.randn(12, 8, dtype=torch.float64)
        optimizer.step()
    assert (p != start).float().mean() > 0.9
