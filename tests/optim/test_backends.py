"""Every backend beside the reference: types, shapes, options, and each of its passes.

Triton's cases run in a process of their own, in its interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_cases import HERE, INTERPRETED, MARKS, stepped
from torch import nn

from insitu import APOLLO
from insitu.optim import step as steps
from insitu.optim.projection import Sketch, layout, make

pytestmark = MARKS
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


# One block of 16 and less, several, with and without a rest; ranks of one group of buckets, of several, and of no whole number;
# buckets of an odd number of blocks, and not all of one number.
_BLOCKS = [(16, 16), (33, 16), (48, 16), (50, 20), (64, 32), (70, 3), (80, 32), (100, 48)]


@pytest.mark.parametrize(("m", "rank"), _BLOCKS)
@pytest.mark.parametrize("n", [0, 9, 1600], ids=["square", "a few more", "several pieces"])
@pytest.mark.parametrize("channel_dim", [-2, -1], ids=["tall", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [name for name in HERE if name != "compiled"])
def test_a_sketch_of_blocks(backend: str, dtype: torch.dtype, channel_dim: int, n: int, m: int, rank: int) -> None:
    if INTERPRETED and n > 9:
        pytest.skip("the interpreter takes minutes")
    _check_sketches((m + n, m) if channel_dim == -2 else (m, m + n), rank, backend, dtype)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes minutes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [name for name in HERE if name != "compiled"])
def test_a_sketch_that_no_cache_holds(backend: str, dtype: torch.dtype) -> None:
    _check_sketches((22_501, 80), 64, backend, dtype)


def _check_sketches(shape: tuple[int, int], rank: int, backend: str, dtype: torch.dtype) -> None:
    """R and both norms of three matrices in one call, against float64."""
    m, n = sorted(shape)
    channel_dim = -2 if shape[0] >= shape[1] else -1
    G = [torch.randn(1, *shape).to(dtype) for _ in range(3)]  # of two threads one has two
    sketches = [make("sketch", seed, 0, layout(*shape, rank)) for seed in (1, 2, 3)]
    R = torch.full((3, *((n, rank) if channel_dim == -2 else (rank, n))), 7.0)  # whatever was there
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


# Products of bf16 pairs take a square of less than 2^-126 for zero: 1e-20 has one, and is not zero.
@pytest.mark.parametrize("n", [0, 5, 200], ids=["square", "a few more", "streams"])
@pytest.mark.parametrize("backend", [name for name in HERE if name != "compiled"])
def test_a_sketch_sees_tiny_numbers_and_zeros(backend: str, n: int) -> None:
    m, rank = 64, 16
    G = torch.zeros(1, m + n, m, dtype=torch.bfloat16)
    G[0, ::3] = torch.randn(len(G[0, ::3]), m)
    G[0, 1::3] = torch.randn(len(G[0, 1::3]), m) * 1e-20
    sketch = make("sketch", 1, 0, layout(m + n, m, rank))
    found = []
    for name in ("reference", backend):
        made, R = steps.choose(name, torch.device("cpu")), torch.full((1, m + n, rank), 7.0)
        found.append((made.measure([G], [sketch], -2, R), made.norms(R, -1), R))
    assert (found[1][0][0] > 0).tolist() == [i % 3 < 2 for i in range(m + n)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-43)


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
    names = ("test_backends.py", "test_backend_calls.py", "test_captured.py")
    files = [str(Path(__file__).with_name(name)) for name in names]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert int(ran.stdout.split(" passed")[0].split()[-1]) > 30, "the cases were not run"
