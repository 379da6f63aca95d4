"""Every backend beside the reference: types, shapes, options; what is compiled how often; what is refused.

Triton runs in its interpreter, which must be asked for before triton is imported: the same cases in a process of their own.
"""

import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from insitu import APOLLO
from insitu.optim import step as steps
from insitu.optim.options import BACKENDS
from insitu.optim.projection import Sketch, layout, make
from insitu.optim.step import kernels, native

# Inductor, when it is first imported, defines what torch itself calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = ["triton"] if INTERPRETED else ["blocked", "native", "fused", "compiled"]
SHAPES = [(34, 20), (20, 34), (17, 17), (3, 11, 7), (2, 5, 12), (1, 19), (19, 1), (37,)]
OPTIONS: list[dict[str, Any]] = [
    {"rank": 1},
    {"rank": 5},
    {"rank": 5, "projection": "sketch"},
    {"rank": 5, "projection": "rademacher", "limiter": None},
    {"rank": 1, "granularity": "channel", "denominator": "exact"},
    {"rank": 5, "denominator": "exact", "weight_decay": 0.1, "projection": "sketch"},
    {"rank": 1, "weight_decay": 0.1, "maximize": True},
    {"rank": 5, "rounding": "compensated", "moments": "bfloat16"},
    {"rank": 5, "betas": (0.0, 0.0), "limiter": None},
]
# Every kind of graph costs a second or two to compile, and the interpreter milliseconds per program: fewer of both.
FEW = [0, 2, 5, 7]
CASES = [
    pytest.param(backend, shape, options, id=f"{backend}-{shape}-{options}")
    for backend in HERE
    for i, options in enumerate(OPTIONS)
    for shape in SHAPES
    if backend in ("blocked", "native", "fused") or (i in FEW and (shape in SHAPES[:2] or i == 0))
]


@pytest.fixture(autouse=True)
def _without_warnings_of_ranks() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rank=")
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel of Triton is launched from here on."""
    from triton.runtime.interpreter import InterpretedFunction

    counted: Counter[str] = Counter()
    run = InterpretedFunction.run

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        counted[self.fn.__name__] += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", counting)
    return counted


def stepped(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, **options: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Three tensors of one shape (so that some go together) after three steps, the second with one gradient of zeros."""
    generator = torch.Generator().manual_seed(sum(shape))
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for _ in range(3)]
    optimizer = APOLLO(params, **{"lr": 1e-2, "backend": backend, "refresh": 2, **options})
    for i in range(3):
        for p in params:
            p.grad = (torch.randn(shape, generator=generator) * (1.0, 2.0, 1e-4)[i]).to(dtype)
        if i == 1:
            params[1].grad = torch.zeros_like(params[1])
        optimizer.step()
    return torch.stack([p.detach() for p in params]), optimizer.state[params[2]]


@pytest.mark.parametrize(("backend", "shape", "options"), CASES)
def test_float32_is_the_reference_to_its_last_places(
    backend: str, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    expected, state = stepped("reference", shape, torch.float32, **options)
    found, its = stepped(backend, shape, torch.float32, **options)
    # Sums in another order: a few last places of float32 in s (1e-6), of updates near 1e-2; weights are near 4 at most.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for name in ("exp_avg", "exp_avg_sq"):
        # A bf16 moment may be rounded the other way where the sum before it differed in a last place.
        tolerance = 1e-5 if state[name].dtype == torch.float32 else 2**-7
        torch.testing.assert_close(its[name], state[name], rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize(("backend", "shape", "options"), CASES)
def test_bf16_draws_the_bits_of_the_reference(backend: str, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    expected, _ = stepped("reference", shape, torch.bfloat16, **options)
    found, _ = stepped(backend, shape, torch.bfloat16, **options)
    # Where a sum differs in float32's last places, 2^-16 of a bf16's, a carry may differ, and the next steps with it: other
    # bits would differ in half of the elements.
    assert (found == expected).float().mean() > 0.99
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(34, 20), (20, 34), (37,)], ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_float16_and_float64(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    expected, _ = stepped("reference", shape, dtype, rank=5)
    found, _ = stepped(backend, shape, dtype, rank=5)
    assert found.dtype == dtype
    # float16 has 11 bits, weights are below 4: a place is 2^-9. Of float64 weights the update is computed in float32.
    torch.testing.assert_close(found, expected, rtol=0, atol=2**-9 if dtype == torch.float16 else 1e-6)
    assert (found == expected).float().mean() > (0.99 if dtype == torch.float16 else 0)


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("backend", HERE)
def test_rounding_alone_is_bit_identical_from_any_element_on(backend: str, odd: int) -> None:
    from insitu.optim.rounding import Precision, stochastic_round
    from insitu.optim.seeds import mix

    # Exact arithmetic (W = 0, eta = 1), so nothing but the bits can differ; the index counts beyond int32, and near 2^32 words.
    for start in (odd, 2**31 - 6 + odd, 2**32 - 40 + odd, 2**33 - 2000 + odd, 2**33 - 100 + odd):
        G = -torch.randn(1, 31, 23)
        W = torch.zeros_like(G, dtype=torch.bfloat16)
        one = torch.ones(1, 1, 1)
        made = steps.choose(backend, torch.device("cpu"))
        made.apply([W], [G], one, None, one.view(1), [Precision(mix(3, 4), start)])
        assert torch.equal(W, stochastic_round(-G, 3, 4, start))


@pytest.mark.parametrize("backend", HERE)
def test_a_gradient_of_nan_changes_nothing_where_the_host_does_not_look(backend: str) -> None:
    # As on a device: ``live`` says so, and nothing else may.
    from insitu.optim.rounding import Precision

    G = torch.full((1, 12, 8), float("nan"))
    W = torch.randn(1, 12, 8)
    before, live = W.clone(), torch.zeros(1)
    made = steps.choose(backend, torch.device("cpu"))
    made.apply([W], [G], torch.zeros(1, 12, 1), torch.zeros(1), live, [Precision()])
    R, M, V = (torch.rand(1, 12, 3) for _ in range(3))
    kept = M.clone(), V.clone()
    made.direct(R * float("nan"), [M], [V], live, -1, step=1, betas=(0.9, 0.999), eps=1e-8)
    assert torch.equal(W, before)
    assert torch.equal(M, kept[0])
    assert torch.equal(V, kept[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((34, 20), {"rank": 1}),
        ((26, 34), {"rank": 2, "projection": "sketch"}),
        ((2, 27, 26), {"rank": 2, "denominator": "exact"}),
        ((37,), {"moments": "bfloat16"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", [name for name in HERE if name != "compiled"])
def test_of_three_that_go_together_zeros_and_nan_stay_and_the_other_moves(
    backend: str, shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    # Decay would show where a tensor is written at all. Of matrices this large three fit into a bundle.
    found: list[list[torch.Tensor]] = []
    for name in ("reference", backend):
        generator = torch.Generator().manual_seed(5)
        params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for _ in range(3)]
        optimizer = APOLLO(params, lr=1e-2, backend=name, nonfinite="skip", weight_decay=0.1, **options)
        for step in range(2):
            before = [p.detach().clone() for p in params]
            for p in params:
                p.grad = torch.randn(shape, generator=generator).to(dtype)
            if step:
                params[0].grad[..., -1] = float("nan")
                params[1].grad.zero_()
            optimizer.step()
            stands = [torch.equal(p, x) for p, x in zip(params, before, strict=True)]
            assert stands == [step > 0, step > 0, False]
        found.append([p.detach().float() for p in params])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-6 if dtype == torch.bfloat16 else 0, atol=1e-6)
        assert (one == other).float().mean() > 0.98 or dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["one", "dense", "each its own", "sketch"])
@pytest.mark.parametrize("channel_dim", [-2, -1], ids=["tall", "wide"])
@pytest.mark.parametrize("backend", [name for name in HERE if name != "compiled"])
def test_stacks_of_matrices_in_several_tensors(backend: str, channel_dim: int, kind: str, dtype: torch.dtype) -> None:
    from insitu.optim.rounding import Precision
    from insitu.optim.seeds import mix

    num, b, n, m, rank, side = 3, 2, 40, 30, 1 if kind == "one" else 5, -3 - channel_dim
    shape = (n, m) if channel_dim == -2 else (m, n)
    results: list[list[torch.Tensor]] = []
    for name in ("reference", backend):
        generator = torch.Generator().manual_seed(11)

        def normal(*shape: int, _from: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(shape, generator=_from)

        made = steps.choose(name, torch.device("cpu"))
        live = torch.tensor([1.0, 0.0, 1.0])
        W, G = ([normal(b, *shape).to(dtype) for _ in range(num)] for _ in range(2))
        if kind == "sketch":
            P: list[Any] = [make("sketch", seed, 0, layout(*shape, rank)) for seed in range(num)]
        else:
            P = [normal(*([b] if kind == "each its own" else []), rank, m) for _ in range(num)]
        R = torch.full((num * b, *((n, rank) if channel_dim == -2 else (rank, n))), 7.0)
        G_sq = made.measure(G, P, channel_dim, R)
        results.append([G_sq, R.clone()])
        M, V = ([normal(*R[:b].shape).abs() for _ in range(num)] for _ in range(2))
        if INTERPRETED:  # the reference's, in the same call
            V[2] = V[2].mT.contiguous().mT
        numerator = made.direct(R, M, V, live, side, step=2, betas=(0.9, 0.99), eps=1e-8)
        results[-1] += [numerator.view(num, -1)[live > 0], *M, *V]  # what is not live has none
        G[1].fill_(float("nan"))
        key = mix(3) if dtype == torch.bfloat16 else None
        per_matrix = live.repeat_interleave(b)
        decay = torch.rand(num * b, generator=generator) * per_matrix
        for eta, start in (((1, 1), 0), ((n, 1) if channel_dim == -2 else (1, n), 2**33 - 5000)):
            eta_s = normal(num * b, *eta) * per_matrix[:, None, None]
            precisions = [Precision(key, start + 1001 * i) for i in range(num)]
            made.apply(W, G, eta_s, decay, live, precisions)
            results[-1] += [w.float() for w in W]
    for one, other in zip(*results, strict=True):
        stored = dtype == torch.bfloat16 and one.shape == G[0].shape
        torch.testing.assert_close(other, one, rtol=2**-6 if stored else 1e-5, atol=1e-5)
        assert not stored or (one == other).float().mean() > 0.99


@pytest.mark.parametrize("backend", HERE)
def test_tensors_of_several_types_in_one_call(backend: str, request: pytest.FixtureRequest) -> None:
    from insitu.optim.rounding import Precision
    from insitu.optim.seeds import mix

    counted = request.getfixturevalue("launches") if INTERPRETED else Counter()
    indices = torch.randperm(77)  # of a part whose elements do not follow one another
    kinds: list[tuple[torch.dtype, torch.dtype, dict[str, Any]]] = [
        (torch.float32, torch.float32, {}),
        (torch.bfloat16, torch.bfloat16, {"key": mix(1), "start": 3}),
        (torch.float64, torch.float64, {}),
        (torch.bfloat16, torch.bfloat16, {"residual": torch.bfloat16}),
        (torch.float16, torch.float32, {}),
        (torch.bfloat16, torch.bfloat16, {"key": mix(2), "start": indices}),
        (torch.bfloat16, torch.bfloat16, {"key": mix(4), "start": 2**33 - 5}),
        (torch.bfloat16, torch.float32, {"key": mix(5), "start": 8}),
        (torch.float32, torch.float32, {}),
        (torch.bfloat16, torch.bfloat16, {"key": mix(6), "start": 2**31}),
        (torch.float32, torch.float32, {"gaps": True}),
    ]
    num = len(kinds)
    results: list[list[torch.Tensor]] = []
    for name in ("reference", backend):
        generator = torch.Generator().manual_seed(2)
        made = steps.choose(name, torch.device("cpu"))
        W, G, M, V, precisions = [], [], [], [], []
        for stored, gradient, how in kinds:
            w, g, m, v = (torch.randn(77, generator=generator) for _ in range(4))
            W.append(torch.stack([w, w], 1)[:, 0] if "gaps" in how else w.to(stored))
            G.append(g.to(gradient))
            M.append(m)
            V.append(v.abs())
            rest = how.get("residual")
            residual = None if rest is None else (torch.randn(77, generator=generator) * 1e-3).to(rest)
            precisions.append(Precision(how.get("key"), how.get("start", 0), residual))
        M[7], V[9], V[8] = M[7].bfloat16(), V[9].bfloat16(), V[8].bfloat16()
        moments = [
            tuple(Precision(i, 1) if x.dtype == torch.bfloat16 else Precision() for x in (M[i], V[i]))
            for i in range(num)
        ]
        live = torch.ones(num)
        live[8] = 0.0
        eta_s = torch.rand(num, 1, 1, generator=generator) * live[:, None, None]
        matrices = [[x.view(1, 7, 11) for x in each] for each in (W, G)]
        if name == backend:
            counted.clear()
        made.apply(*matrices, eta_s, None, live, precisions)
        made.adamw(
            W, G, M, V, live, precisions, moments,
            step=3, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, maximize=False,
        )  # fmt: skip
        results.append([*W, *M, *V, *(p.residual for p in precisions if p.residual is not None)])
    # float32 twice, bf16 rounded at random twice; four are the reference's.
    assert not INTERPRETED or counted == Counter(apply=5, adamw=7)
    for one, other in zip(*results, strict=True):
        exact = one.dtype in (torch.float32, torch.float64)
        torch.testing.assert_close(other, one, rtol=1e-5 if exact else 2**-6, atol=1e-5)
        assert exact or (one == other).float().mean() > 0.95  # of 77


@pytest.mark.parametrize("channel_dim", [-2, -1], ids=["tall", "wide"])
@pytest.mark.parametrize("backend", [name for name in HERE if name != "compiled"])
def test_gradients_and_projections_of_several_kinds_in_one_call(backend: str, channel_dim: int) -> None:
    n, m, rank = 40, 33, 3
    shape = (n, m) if channel_dim == -2 else (m, n)
    types = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.bfloat16]
    G = [torch.randn(2, *shape).to(dtype) for dtype in types]
    sketch = make("sketch", 1, 0, layout(*shape, rank))
    assert isinstance(sketch, Sketch)
    longer = sketch._replace(
        **{k: torch.cat([x[:rank] * 0, x]) for k, x in sketch._asdict().items() if k in ("order", "signs")}
    )
    P = [torch.randn(rank, m), sketch, torch.randn(rank, m), torch.randn(2, rank, m), longer]
    results = []
    for name in ("reference", backend):
        made = steps.choose(name, torch.device("cpu"))
        R = torch.full((2 * len(G), *((n, rank) if channel_dim == -2 else (rank, n))), 7.0)
        results.append((made.measure(G, P, channel_dim, R), R))
    for found, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="of what its kernels are told")
def test_addresses_are_said_to_be_multiples_of_16_bytes_only_where_all_are() -> None:
    # The interpreter does not care; on a device a load of 16 bytes elsewhere is an error.
    from insitu.optim.step.triton import _table

    x = torch.zeros(16)
    table, aligned = _table([(3, (x, x[4:]), (-5,)), (1, (x, x), (2,))])
    assert aligned
    assert table.tolist() == [[3, x.data_ptr(), x.data_ptr() + 16, -5], [1, x.data_ptr(), x.data_ptr(), 2]]
    assert not _table([(0, (x, x[1:]), ()), (1, (x, x), ())])[1]


@pytest.mark.skipif(not INTERPRETED, reason="of Triton's launches, in its interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "options", "kernels"),
    [
        ((64, 70), {"rank": 1}, ("measure_one", "direct", "apply")),
        ((70, 64), {"rank": 5}, ("measure_dense", "direct", "apply")),
        ((70, 64), {"rank": 5, "projection": "sketch", "weight_decay": 0.1}, ("measure_sketch", "direct", "apply")),
        ((70, 64), {"rank": 1, "rounding": "compensated"}, ("measure_one", "direct", "apply")),
        ((2, 64, 70), {"rank": 1, "rounding": "nearest"}, ("measure_one", "direct", "apply")),
        ((37,), {}, ("adamw",)),
        ((37,), {"moments": "bfloat16"}, ("adamw",)),
    ],
    ids=str,
)
def test_three_tensors_of_one_shape_are_as_many_launches_as_one(
    shape: tuple[int, ...],
    options: dict[str, Any],
    kernels: tuple[str, ...],
    dtype: torch.dtype,
    launches: Counter[str],
) -> None:
    # Of matrices this large three fit into a bundle.
    for num in (1, 3):
        launches.clear()
        params = [nn.Parameter(torch.randn(shape).to(dtype)) for _ in range(num)]
        for p in params:
            p.grad = torch.randn_like(p)
        APOLLO(params, lr=1e-2, backend="triton", **options).step()
        assert launches == Counter(kernels)


@pytest.mark.parametrize("backend", HERE)
def test_scaling_factors(backend: str) -> None:
    made = steps.choose(backend, torch.device("cpu"))
    above, below, needed, G_sq = (torch.rand(3, 700) + 0.1 for _ in range(4))
    below[0, 3] = needed[1, 5] = below[2, 7] = needed[2, 7] = 0.0
    s, norm_sq = made.factors(above, below, needed, G_sq)
    expected = (above.double() / below.double()).sqrt()
    expected[0, 3] = expected[1, 5] = expected[2, 7] = 0.0
    torch.testing.assert_close(s.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm_sq, (expected.square() * G_sq).sum(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", HERE)
def test_limited_scaling_factors(backend: str) -> None:
    made = steps.choose(backend, torch.device("cpu"))
    # Two tensors of three matrices: limited, small enough, without an earlier update; none now, not live, and NaN.
    norm = torch.tensor([5.0, 1.0, 5.0, 0.0, 5.0, float("nan")])
    last = [torch.tensor([2.0, 2.0, 0.0]), torch.tensor([2.0, 2.0, 2.0])]
    live = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    s = torch.rand(6, 300) + 0.1
    s[5] = float("nan")
    before = s.clone()
    numbers = {"alpha": 2.0, "gamma": 1.5, "eta": -0.1}
    found = made.limited(s, norm.double().square(), last, live, **numbers)
    factors = torch.tensor([3.0 / 10, 2.0 / 2, 1.0, 1.0, 0.0, 0.0])
    expected = torch.where(live[:, None] > 0, before * (-0.1 * 2.0 * factors)[:, None], 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat(last), torch.tensor([3.0, 2.0, 10.0, 2.0, 2.0, 2.0]), rtol=1e-6, atol=0)


# One block of 16 and less, several, with and without a rest; ranks of one group of buckets, of several, and of no whole number.
@pytest.mark.parametrize(("m", "rank"), [(16, 16), (33, 16), (50, 20), (64, 32), (70, 3), (100, 48)])
@pytest.mark.parametrize("n", [0, 9, 1600], ids=["square", "a few more", "several pieces"])
@pytest.mark.parametrize("channel_dim", [-2, -1], ids=["tall", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [name for name in HERE if name != "compiled"])
def test_a_sketch_of_blocks(backend: str, dtype: torch.dtype, channel_dim: int, n: int, m: int, rank: int) -> None:
    if INTERPRETED and n > 9:
        pytest.skip("the interpreter takes minutes")
    shape = (m + n, m) if channel_dim == -2 else (m, m + n)
    G = [torch.randn(1, *shape).to(dtype) for _ in range(2)]
    size = layout(*shape, rank)
    sketches = [make("sketch", seed, 0, size) for seed in (1, 2)]
    R = torch.full((2, *((m + n, rank) if channel_dim == -2 else (rank, m + n))), 7.0)  # whatever was there
    made = steps.choose(backend, torch.device("cpu"))
    G_sq, R_sq = made.measure(G, sketches, channel_dim, R), made.norms(R, -3 - channel_dim)
    for i, (g, sketch) in enumerate(zip(G, sketches, strict=True)):
        assert isinstance(sketch, Sketch)
        P = torch.zeros(rank, m, dtype=torch.float64)
        place = torch.arange(len(sketch.order))
        P.index_put_((place % rank, sketch.order.long()), sketch.signs.double(), accumulate=True)
        x = g[0].double()
        expected = x @ P.T if channel_dim == -2 else P @ x
        for found, exact in ((R[i], expected), (G_sq[i], x.square().sum(-3 - channel_dim))):
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(R_sq[i].double(), expected.square().sum(-3 - channel_dim), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_sums_of_squares(backend: str, dtype: torch.dtype) -> None:
    made = steps.choose(backend, torch.device("cpu"))
    for size in (1, 17, 70_001):
        G = [torch.randn(size, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
        expected = torch.stack([g.double().square().sum() for g in G])
        torch.testing.assert_close(made.square(G), expected, rtol=1e-5, atol=0)
        G[1][size // 2] = float("nan")
        assert made.square(G).isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("projection", ["gaussian", "sketch", "svd"])
@pytest.mark.parametrize("rank", [1, 9])
@pytest.mark.parametrize("backend", HERE)
def test_what_has_no_room_to_wait_is_measured_later_with_the_same_bits(
    backend: str, rank: int, projection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from insitu.optim.step.scratch import Scratch

    begin = Scratch.begin

    def run(limit: float | None) -> list[torch.Tensor]:
        if limit is not None:
            monkeypatch.setattr(Scratch, "begin", lambda self, _: begin(self, limit))
        generator = torch.Generator().manual_seed(3)
        shapes = [(20, 14), (20, 14), (14, 20), (2, 9, 12), (5,)]
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        optimizer = APOLLO(params, lr=1e-2, rank=rank, projection=projection, backend=backend, nonfinite="skip")
        for step in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            if step == 1:
                params[0].grad = torch.full_like(params[0], float("nan"))
                params[2].grad = torch.zeros_like(params[2])
            optimizer.step()
            if limit is not None:
                assert sum(4 * b.numel() for b in optimizer._scratch._blocks) <= limit
        return [x for p in params for x in (p.detach(), *optimizer.state[p].values()) if isinstance(x, torch.Tensor)]

    expected = run(None)
    for limit in (2000, 0):
        for one, other in zip(run(limit), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 4, 6), (1, 0, 6), (1, 4, 0)], ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_a_shard_without_elements_is_no_special_case(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    from insitu.optim.rounding import Precision

    rank, one = 2, torch.ones(1)
    precision = Precision(7 if dtype == torch.bfloat16 else None)
    for channel_dim in (-1, -2):
        side = -3 - channel_dim
        P = torch.randn(rank, shape[side])
        results = []
        for name in ("reference", backend):
            made = steps.choose(name, torch.device("cpu"))
            G = torch.zeros(shape, dtype=dtype)
            R = torch.full((shape[0], *((shape[1], rank) if channel_dim == -2 else (rank, shape[2]))), 7.0)
            G_sq = made.measure([G], [P], channel_dim, R)
            M, V = torch.zeros_like(R), torch.zeros_like(R)
            out = made.direct(R.clone(), [M], [V], one, side, step=1, betas=(0.9, 0.999), eps=1e-8)
            eta = torch.zeros(shape[0], *((shape[1], 1) if channel_dim == -2 else (1, shape[2])))
            made.apply([G.clone()], [G], eta, None, one, [precision])
            flat = [torch.zeros(0, dtype=dtype) for _ in range(2)]
            state = [torch.zeros(0) for _ in range(2)]
            made.adamw(
                flat[:1], flat[1:], state[:1], state[1:], one, [precision], [(Precision(), Precision())],
                step=1, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, maximize=False,
            )  # fmt: skip
            results.append([R, G_sq, made.norms(R, side), out, made.square([G.view(-1)])])
        for found, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.timeout(900)  # two minutes, and more where others work
@pytest.mark.skipif(INTERPRETED, reason="the interpreter is asked for in a process of its own")
def test_triton_in_its_interpreter_passes_the_same_cases() -> None:
    pytest.importorskip("triton", reason="needs triton")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert int(ran.stdout.split(" passed")[0].split()[-1]) > 30, "the cases were not run"


@pytest.mark.skipif(INTERPRETED, reason="of torch.compile")
def test_another_rate_step_or_norm_compiles_nothing() -> None:
    import torch._dynamo

    from insitu.optim.step import compiled

    def run(num: int, first: int) -> None:
        for i in range(first, first + num):
            optimizer.param_groups[0]["lr"] = 1e-3 * (i + 1)
            for p in params:
                p.grad = torch.randn_like(p) * (1 + i)
            optimizer.step()

    params = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((24, 16), (16, 24), (30, 30))]
    optimizer = APOLLO(params, rank=1, granularity="channel", backend="compiled", weight_decay=0.1, refresh=2)
    run(2, 0)
    made = compiled._compiled.cache_info().currsize
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(4, 2)
    assert compiled._compiled.cache_info().currsize == made
    assert made > 0


@pytest.mark.skipif(INTERPRETED, reason="of the choice")
@pytest.mark.parametrize("name", ["compiled", "native", "fused"])
def test_without_a_compiler_it_warns_once_and_does_the_step(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("insitu.optim.step.compiled.missing_compiler", lambda device: "no C++ compiler (c++)")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(kernels, "installed", lambda: None)
    native.installed.cache_clear()
    native.build.cache_clear()
    steps._picked.cache_clear()
    try:
        with pytest.warns(UserWarning, match=rf"backend='{name}' on cpu finds no C\+\+ compiler") as caught:
            found, _ = stepped(name, (12, 8), torch.float32, rank=2)
        assert len(caught) == 1
        assert torch.equal(found, stepped("blocked", (12, 8), torch.float32, rank=2)[0])
    finally:
        monkeypatch.undo()
        steps._picked.cache_clear()
        native.installed.cache_clear()
        native.build.cache_clear()


@pytest.mark.skipif(INTERPRETED, reason="of the choice")
def test_a_backend_is_refused_by_name_where_it_cannot_run() -> None:
    with pytest.raises(
        ValueError, match=r"backend='triton' cannot run on cpu: (it needs a CUDA|triton is not installed)"
    ):
        stepped("triton", (12, 8), torch.float32)
    with pytest.raises(ValueError, match="backend='blocked' on cuda: it is for CPUs"):
        steps.choose("blocked", torch.device("cuda"))
    with pytest.raises(ValueError, match=f"backend='fast': expected one of {', '.join(map(repr, BACKENDS))}"):
        stepped("fast", (12, 8), torch.float32)


@pytest.mark.skipif(INTERPRETED, reason="of the choice")
def test_auto_never_compiles_on_a_cpu_and_says_once_what_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", None)
    monkeypatch.setattr(kernels, "compile_to", None)
    expected = "blocked" if kernels.installed() is None else "native"
    for installed, picked in ((kernels.installed, expected), (lambda: None, "blocked")):
        monkeypatch.setattr(kernels, "installed", installed)
        native.installed.cache_clear()
        steps._picked.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.INFO, "insitu.optim.step"):
            stepped("auto", (12, 8), torch.float32)
            stepped("auto", (12, 8), torch.bfloat16)
        said = [record.getMessage() for record in caplog.records if record.name == "insitu.optim.step"]
        assert said == [f"optimizer steps on cpu: backend='auto' is '{picked}'"]
    monkeypatch.undo()
    native.installed.cache_clear()
    steps._picked.cache_clear()


@pytest.mark.skipif(INTERPRETED, reason="of the kernels")
def test_installed_kernels_are_used_only_where_they_are_of_this_source_and_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "cpp"
    shutil.copytree(kernels.SOURCE, folder)
    source = folder / "sketch.cpp"
    monkeypatch.setattr(kernels, "SOURCE", folder)
    monkeypatch.setattr(kernels, "INSTALLED", tmp_path / "libnative.so")
    monkeypatch.setattr(kernels, "RECORD", tmp_path / "libnative.json")
    assert kernels.installed() is None
    assert kernels.install() is None
    assert kernels.installed() == tmp_path / "libnative.so"
    assert {path.name for path in tmp_path.iterdir()} == {"cpp", "libnative.so", "libnative.json"}

    have = kernels.instructions()
    assert have, "no instruction set was found"
    with monkeypatch.context() as other:
        other.setattr(kernels, "instructions", lambda: set(sorted(have)[1:]))
        assert kernels.installed() is None
    whole = kernels.INSTALLED.read_bytes()
    kernels.INSTALLED.write_bytes(whole[:-1])
    assert kernels.installed() is None
    kernels.INSTALLED.write_bytes(whole)
    assert kernels.installed() is not None
    for changed in (source, folder / "numbers.h"):
        before = changed.read_bytes()
        changed.write_bytes(before + b"// changed")
        assert kernels.installed() is None
        changed.write_bytes(before)
    assert kernels.installed() is not None
    source.write_text("not C++")
    reason = kernels.install()
    assert reason is not None
    assert "cannot make the kernels" in reason
    assert kernels.installed() is None
