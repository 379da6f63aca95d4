"""Steps on int8 weights: a float step and a write by the oracle, bit for bit; what must change nothing; resume; memory."""

import io
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import oracle_int8 as oracle
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import insitu
from insitu.optim.int8 import quantize_nearest
from insitu.optim.quantized import Int8Weight
from insitu.optim.seeds import mix

BACKENDS = ["reference", "blocked"]
CASES = [(shape, "stochastic") for shape in ((40, 24), (21, 33), (1, 50), (30, 1))] + [((21, 33), "nearest")]
ARMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "apollo": (insitu.APOLLO, {"rank": 3, "weight_decay": 0.1, "refresh": 2}),
    "sketch": (insitu.APOLLO, {"rank": 3, "projection": "sketch", "denominator": "exact", "moments": "bfloat16"}),
    "mini": (insitu.APOLLOMini, {"weight_decay": 0.1}),
    "adamw": (insitu.APOLLO, {"role": "adamw", "weight_decay": 0.1}),
    "sgd": (insitu.APOLLO, {"role": "dense", "dense": "sgd", "weight_decay": 0.1}),
    "quasi-newton": (insitu.ApolloQN, {"warmup": 100, "init_lr": 1e-2, "decay": "decoupled", "weight_decay": 0.1}),
}


def int8(W: Tensor, size: int | None) -> nn.Parameter:
    q, groups = quantize_nearest(W, size)
    return nn.Parameter(Int8Weight(q, groups.scale, groups.size, W.dtype))


def made(arm: str, p: nn.Parameter, **more: Any) -> torch.optim.Optimizer:
    make, options = ARMS[arm]
    options = {**options, **more}
    role = options.pop("role", "matrix")
    return make([{"params": [p], "role": role}], **{"lr": 1e-2, **options})


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits(p: nn.Parameter) -> tuple[Tensor, Tensor]:
    assert isinstance(p, Int8Weight)
    return p.int_data.clone(), p.scale.clone()


def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.filterwarnings("ignore:rank=", "ignore:warmup=")
@pytest.mark.parametrize(("shape", "rounding"), CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arm", ARMS)
def test_a_step_is_a_float_step_and_the_oracles_write(
    arm: str, shape: tuple[int, int], backend: str, rounding: str
) -> None:
    size, seed = 16, 5
    p = int8(some(*shape, seed=1), size)
    twin = nn.Parameter(p.dequantize())
    optimizers = [made(arm, q, backend=backend, rounding=rounding, seed=seed) for q in (p, twin)]
    start = bits(p)
    for step in range(4):
        before = p.scale.double().numpy()
        with torch.no_grad():
            twin.copy_(p.dequantize())
        for q, optimizer in zip((p, twin), optimizers, strict=True):
            q.grad = some(*shape, seed=10 + step)
            optimizer.step()
        key = mix(mix(seed, 0), step) if rounding == "stochastic" else None
        expected, scale = oracle.write(twin.detach().numpy(), before, p.group_size, key)
        assert np.array_equal(p.int_data.numpy(), expected)
        assert np.array_equal(p.scale.double().numpy(), scale)
    assert not same(bits(p), start)
    one, other = (optimizer.state[q] for optimizer, q in zip(optimizers, (p, twin), strict=True))
    assert one.keys() == other.keys(), "the state is that of a float parameter: no float copy of the weights"
    for name, value in one.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name


@pytest.mark.filterwarnings("ignore:rank=", "ignore:warmup=")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_gradient_without_a_direction_changes_nothing(arm: str, backend: str, bad: float) -> None:
    p = int8(some(21, 33, seed=1), 8)
    optimizer = made(arm, p, backend=backend, nonfinite="skip")
    for step in range(3):  # weights that were written stochastically, of which a careless write would make others
        p.grad = some(21, 33, seed=step)
        optimizer.step()
    before, state = bits(p), {k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()}
    p.grad = torch.zeros(21, 33) if bad == 0 else some(21, 33, seed=9).index_fill(0, torch.tensor([2]), bad)
    optimizer.step()
    assert same(bits(p), before)
    for name, value in optimizer.state[p].items():
        assert torch.equal(torch.as_tensor(value), state[name] + (name == "skipped" and bad != 0)), name


@pytest.mark.filterwarnings("ignore:rank=", "ignore:warmup=")
@pytest.mark.parametrize("arm", ARMS)
def test_a_matrix_of_several_blocks_is_cut_between_rows(arm: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # blocks of up to 65,536 elements: here 648 rows, then 52
    try:
        both = []
        for backend in BACKENDS:
            p = int8(some(700, 101, seed=1), 16)
            start = p.int_data.clone()
            optimizer = made(arm, p, backend=backend)
            for step in range(2):
                p.grad = some(700, 101, seed=10 + step)
                optimizer.step()
            assert all((p.int_data != start)[rows].any() for rows in (slice(648), slice(648, 700)))
            both.append(p.dequantize())
        # A sum in another order may carry a number over the edge of its rounding, which is one step of its scale.
        assert ((both[0] - both[1]).abs() > 1e-6).float().mean() < 1e-3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_learning_rate_and_no_decay_keep_every_bit(backend: str) -> None:
    p = int8(some(40, 24, seed=1), 8)
    optimizer = made("apollo", p, backend=backend, weight_decay=0.0)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.0 if step >= 3 else 1e-2
        before = bits(p)
        p.grad = some(40, 24, seed=step)
        optimizer.step()
        assert same(bits(p), before) == (step >= 3)


def test_small_updates_move_the_weights_on_average_where_nearest_rounding_does_not() -> None:
    W = some(64, 128, seed=1)
    moved = {}
    for rounding in ("stochastic", "nearest"):
        p = int8(W, 32)
        start = p.dequantize().double()
        optimizer = made("sgd", p, lr=1e-4, weight_decay=0.0, rounding=rounding)
        for _ in range(100):  # of 1e-4 each, where a step of the scale is about 2e-2
            p.grad = torch.ones(64, 128)
            optimizer.step()
        moved[rounding] = (start - p.dequantize().double()).mean().item()
    # 8192 weights, each 100 draws of a share 0.005: a deviation of the mean of 0.02 * 0.7 / 90 = 1.6e-4.
    assert moved["stochastic"] == pytest.approx(1e-2, abs=8e-4)
    assert moved["nearest"] == 0


@pytest.mark.filterwarnings("ignore:warmup=")
@pytest.mark.parametrize("arm", ["apollo", "mini", "adamw", "quasi-newton"])
def test_a_resume_is_bit_identical(arm: str) -> None:
    def train(layer: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            layer.weight.grad = some(24, 40, seed=step)
            optimizer.step()

    def layer_and_optimizer(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        layer = nn.Sequential(nn.Linear(40, 24, bias=False))
        insitu.quantize(layer, group_size=16)
        return layer[0], made(arm, layer[0].weight)

    whole, optimizer = layer_and_optimizer(1)
    train(whole, optimizer, range(3))
    file = io.BytesIO()
    torch.save([whole.state_dict(), optimizer.state_dict()], file)
    train(whole, optimizer, range(3, 7))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, resumed = layer_and_optimizer(2)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(other, resumed, range(3, 7))
    assert same(bits(other.weight), bits(whole.weight))


def test_options_without_a_meaning_are_refused_by_name() -> None:
    p = int8(some(8, 8, seed=1), 8)
    with pytest.raises(
        ValueError, match=r"rounding='compensated' for parameter 0, which is int8: expected 'stochastic'"
    ):
        insitu.APOLLO([p], rank=2, rounding="compensated")
    optimizer = insitu.APOLLO([{"params": [p], "param_names": ["a.weight"]}], rank=2)
    optimizer.param_groups[0]["rounding"] = "compensated"
    p.grad = some(8, 8, seed=2)
    with pytest.raises(ValueError, match=r"for a\.weight, which is int8"):
        optimizer.step()


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adafactor])
@pytest.mark.parametrize("foreach", [False, True])
def test_optimizers_that_do_not_know_int8_fail(make: Any, foreach: bool) -> None:
    p = int8(some(8, 8, seed=1), 8)
    before = bits(p)
    optimizer = make([p], lr=0.1, foreach=foreach)
    p.grad = some(8, 8, seed=2)
    with pytest.raises(NotImplementedError, match=r"is not defined for int8 weights.*an optimizer of insitu"):
        optimizer.step()
    assert same(bits(p), before)


class FloatTensors(TorchDispatchMode):
    """Counts the storages of floating tensors of at least ``size`` elements that are alive at a time."""

    def __init__(self, size: int, ignored: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.size, self.most = size, 0
        self.ignored = {x.untyped_storage()._cdata for x in ignored}
        self._alive: dict[int, list[weakref.ref[Tensor]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else (out,):
            if type(x) is Tensor and x.is_floating_point() and x.numel() >= self.size:
                self._alive.setdefault(x.untyped_storage()._cdata, []).append(weakref.ref(x))
        self._alive = {k: kept for k, v in self._alive.items() if (kept := [r for r in v if r() is not None])}
        self.most = max(self.most, len(self._alive.keys() - self.ignored))
        return out


@pytest.mark.parametrize(("group_size", "scales"), [(128, 5), (None, 1)])
def test_a_weight_costs_a_byte_and_its_scales(group_size: int | None, scales: int) -> None:
    model = nn.Sequential(nn.Linear(600, 64))
    insitu.quantize(model, group_size=group_size)
    weight = model[0].weight
    assert weight.int_data.nbytes + weight.scale.nbytes == 64 * 600 + 64 * scales * 2
    assert sum(t.nbytes for name, t in model.state_dict().items() if "bias" not in name) == 64 * (600 + scales * 2) + 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_step_makes_float_copies_of_more_than_one_weight(backend: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the scratch of the blocked backend has 65,536 elements for each
    try:
        side, layers = 300, 5
        model = nn.Sequential(*[nn.Linear(side, side, bias=False) for _ in range(layers)])
        insitu.quantize(model)
        optimizer = insitu.APOLLO(insitu.param_groups(model, head="4"), rank=2, backend=backend, dense="apollo")
        assert sum(isinstance(p, Int8Weight) for p in model.parameters()) == layers
        for _ in range(2):
            with FloatTensors(side * side) as forward:
                loss = model(torch.randn(3, side)).square().sum()
            assert forward.most == 1
            assert not forward._alive, "a float weight is kept for the backward pass"
            with FloatTensors(side * side) as backward:
                loss.backward()
            assert layers <= backward.most <= layers + 1  # the gradients, and one weight
            with FloatTensors(side * side, [p.grad for p in model.parameters()]) as step:
                optimizer.step()
            # The reference has a weight in float32 and its gradient, cleared where there is none; blocks are smaller.
            assert step.most <= (2 if backend == "reference" else 0)
            optimizer.zero_grad()
    finally:
        torch.set_num_threads(threads)
