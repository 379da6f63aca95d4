"""Several tensors in one call of a backend: the numbers of each alone, whatever else goes with it, and few launches."""

from collections import Counter
from typing import Any

import pytest
import torch
from backend_cases import HERE, INTERPRETED, MARKS
from torch import nn

from insitu import APOLLO
from insitu.optim import step as steps
from insitu.optim.projection import Projection, Sketch, layout, make
from insitu.optim.rounding import Precision
from insitu.optim.step.scratch import Scratch

pytestmark = MARKS


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(13, 37), (37, 13), (2, 5), (13, 1601)], ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_rank_1_measures_every_channel_of_odd_sizes(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, cols = shape
    dim = -2 if rows >= cols else -1
    G = [torch.randn(1, *shape).to(dtype) for _ in range(2)]
    P: list[Projection] = [torch.randn(1, min(shape)) for _ in G]
    found = []
    for name in ("reference", backend):
        R = torch.full((2, rows, 1) if dim == -2 else (2, 1, cols), 7.0)
        found.append((steps.choose(name, torch.device("cpu")).measure(G, P, dim, R), R))
    for mine, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="of the C++ kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(400, 34), (193, 66), (385, 31), (192, 2)], ids=str)
@pytest.mark.parametrize("eta", ["tensor", "rows", "columns"])
def test_rows_that_are_written_in_streams_have_the_bits_of_one_row_alone(
    shape: tuple[int, int], eta: str, dtype: torch.dtype
) -> None:
    # From 192 rows on the kernel takes some of them side by side; what is left over at the end it takes one by one.
    made = steps.choose("native", torch.device("cpu"))
    rows, cols = shape
    W = [torch.randn(1, *shape).bfloat16() for _ in range(2)]
    G = [torch.randn(1, *shape).to(dtype) for _ in range(2)]
    eta_s = torch.rand(2, rows if eta == "rows" else 1, cols if eta == "columns" else 1) * 1e-2
    decay, live = torch.tensor([0.1, 0.0]), torch.ones(2)
    precisions = [Precision(key, start) for key, start in ((5, 0), (9, 2 * cols))]
    alone, before = [w.clone() for w in W], [w.clone() for w in W]
    made.apply(W, G, eta_s, decay, live, precisions)
    for t, row in ((t, row) for t in range(2) for row in range(rows)):
        these = alone[t][:, row : row + 1], G[t][:, row : row + 1]
        its_eta = eta_s[t : t + 1, row : row + 1] if eta == "rows" else eta_s[t : t + 1]
        precise = precisions[t].of(row * cols, cols)
        made.apply(these[:1], these[1:], its_eta, decay[t : t + 1], live[:1], [precise])
    for w, w_alone, start in zip(W, alone, before, strict=True):
        assert torch.equal(w, w_alone)
        assert (w != start).float().mean() > 0.1


@pytest.mark.skipif(not INTERPRETED, reason="of what its kernels are told")
def test_addresses_are_said_to_be_multiples_of_16_bytes_only_where_all_are() -> None:
    # The interpreter does not care; on a device a load of 16 bytes elsewhere is an error.
    from insitu.optim.step.triton_tables import table_of

    x, scratch = torch.zeros(16), Scratch()
    own = ([x, x, x, x[1:]], [x, x, x, x[4:]])
    table, aligned = table_of(scratch, [3, 1], own, [[-5, 2]])
    assert not aligned
    assert table.tolist() == [[3, x.data_ptr() + 4, x.data_ptr() + 16, -5], [1, x.data_ptr(), x.data_ptr(), 2]]
    table, aligned = table_of(scratch, [0, 2], (own[0], own[1]), [torch.tensor([7, -8], dtype=torch.int32)])
    assert aligned
    assert table[:, 3].tolist() == [7, -8]
    assert table_of(scratch, [0], ([x[8:]], [x]))[1]


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
