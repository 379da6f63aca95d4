"""Every formula against an independent float64 oracle, over shapes, options and gradients of every kind."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Apollo, adamw, singular

from insitu import APOLLO, APOLLOMini
from insitu.optim.projection import Sketch, layout, make
from insitu.optim.seeds import mix

# The same formula in float32 and in float64: relative 1e-5 of the largest weight after a few steps.
TOLERANCE = 2e-5

SHAPES = [(12, 8), (8, 12), (10, 10), (7, 3), (3, 7), (1, 5), (5, 1), (33, 17)]


def dense(kind: str, seed: int, index: int, rows: int, cols: int, rank: int) -> np.ndarray:
    """The package's projection as a dense (r, m) matrix."""
    made = make(kind, seed, index, layout(rows, cols, rank))
    if not isinstance(made, Sketch):
        return made.double().numpy()
    P = np.zeros((made.rank, min(rows, cols)))
    for t, (coordinate, sign) in enumerate(zip(made.order.tolist(), made.signs.tolist(), strict=True)):
        P[t % made.rank, coordinate] += sign
    return P


def of_refresh(
    kind: str, seed: int, index: int, shape: tuple[int, int], rank: int, gradients: list[np.ndarray], refresh: int
) -> np.ndarray:
    if kind != "svd":
        return dense(kind, seed, index, *shape, rank)
    first = min(index * refresh, len(gradients) - 1)
    if not gradients[first].any():  # it keeps what it has
        return of_refresh(kind, seed, index - 1, shape, rank, gradients, refresh)
    return singular(gradients[first].astype(np.float32).astype(np.float64), rank)


def run_both(
    shape: tuple[int, int],
    gradients: list[np.ndarray],
    *,
    kind: str = "gaussian",
    rank: int = 3,
    refresh: int = 4,
    **options: Any,
) -> tuple[np.ndarray, Apollo, torch.optim.Optimizer]:
    rng = np.random.default_rng(1)
    start = rng.standard_normal(shape)
    W = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ranks above half the side are meant here
        optimizer = APOLLO([W], lr=1e-2, rank=rank, refresh=refresh, projection=kind, seed=5, **options)
    seed = mix(5, 0)
    oracle = Apollo(
        W.detach().double().numpy(),
        {i: of_refresh(kind, seed, i, shape, rank, gradients, refresh) for i in range(len(gradients))},
        refresh=refresh,
        tensorwise=options.get("granularity") == "tensor",
        exact=options.get("denominator") == "exact",
        gamma=options.get("limiter", 1.01),
        decay=options.get("weight_decay", 0.0),
        alpha=None if options.get("alpha", "auto") == "auto" else options["alpha"],
        beta1=options.get("betas", (0.9, 0.999))[0],
        beta2=options.get("betas", (0.9, 0.999))[1],
        eps=options.get("eps", 1e-8),
        maximize=options.get("maximize", False),
    )
    for gradient in gradients:
        W.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
        oracle.step(W.grad.double().numpy())
    return W.detach().numpy(), oracle, optimizer


def some_gradients(shape: tuple[int, int], num: int = 7) -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    # Norms that grow and shrink, so that the limiter has work.
    return [rng.standard_normal(shape) * (1 + (i % 3)) for i in range(num)]


def assert_agree(W: np.ndarray, oracle: Apollo) -> None:
    assert np.isfinite(W).all()
    # Beyond that only where R_j is a small rest of a large sum, and by no more than that explains.
    tolerance = max(TOLERANCE, np.finfo(np.float32).eps * oracle.cancellation)
    np.testing.assert_allclose(W, oracle.W, rtol=0, atol=tolerance * np.abs(oracle.W).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "sketch", "svd"])
@pytest.mark.parametrize("backend", ["reference", "blocked", "native", "fused"])
def test_every_shape_and_projection_on_every_backend(shape: tuple[int, int], kind: str, backend: str) -> None:
    W, oracle, optimizer = run_both(shape, some_gradients(shape), kind=kind, backend=backend)
    assert_agree(W, oracle)
    state = next(iter(optimizer.state.values()))
    r, n = min(3, *shape), max(shape)
    assert state["exp_avg"].numel() == state["exp_avg_sq"].numel() == r * n
    assert {state[k].dtype for k in ("exp_avg", "exp_avg_sq", "update_norm")} == {torch.float32}


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "tensor"},
        {"denominator": "exact"},
        {"limiter": None},
        {"limiter": 1.5},
        {"alpha": 2.0},
        {"weight_decay": 0.3},
        {"betas": (0.8, 0.9)},
        {"eps": 1e-2},
        {"maximize": True},
        {"maximize": True, "weight_decay": 0.3},
        {"rank": 100},
        {"rank": 1, "granularity": "channel"},
        {"granularity": "tensor", "denominator": "exact", "limiter": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)], ids=str)
def test_every_option(options: dict[str, Any], shape: tuple[int, int]) -> None:
    W, oracle, _ = run_both(shape, some_gradients(shape), **options)
    assert_agree(W, oracle)
    plain, _, _ = run_both(shape, some_gradients(shape))
    assert np.abs(W - plain).max() > 1e-4, "the option had no effect: this test would pass without it"


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "sketch", "svd"])
@pytest.mark.parametrize("options", [{}, {"granularity": "tensor"}, {"denominator": "exact"}], ids=str)
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)], ids=str)
@pytest.mark.parametrize("backend", ["reference", "blocked", "native", "fused"])
def test_a_stack_is_so_many_matrices_of_one_projection(
    kind: str, options: dict[str, Any], shape: tuple[int, int], backend: str
) -> None:
    rng = np.random.default_rng(6)
    num, start = 3, rng.standard_normal((3, *shape))
    W = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    grads = [rng.standard_normal((num, *shape)) * (1 + i % 3) for i in range(7)]
    grads[4][1] = 0.0  # an expert without tokens, beside others with some
    optimizer = APOLLO(
        [W], lr=1e-2, rank=3, refresh=4, projection=kind, seed=5, weight_decay=0.1, backend=backend, **options
    )
    oracles = [
        Apollo(
            W[i].detach().double().numpy(),
            {k: of_refresh(kind, mix(5, 0), k, shape, 3, [g[i] for g in grads], 4) for k in range(2)},
            refresh=4,
            decay=0.1,
            tensorwise="granularity" in options,
            exact="denominator" in options,
            freeze=False,
        )
        for i in range(num)
    ]
    for g in grads:
        W.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()
        for i, oracle in enumerate(oracles):
            oracle.step(W.grad[i].double().numpy())
    expected = np.stack([oracle.W for oracle in oracles])
    np.testing.assert_allclose(W.detach().numpy(), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
    (state,) = optimizer.state.values()
    assert state["exp_avg"].shape == (num, *((9, 3) if shape == (9, 6) else (3, 9)))
    np.testing.assert_allclose(state["update_norm"].numpy(), [oracle.last for oracle in oracles], rtol=1e-4)


def test_blocks_smaller_than_a_matrix_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (150, 20)
    for size in ("_ELEMENTS", "_READ_ELEMENTS"):
        monkeypatch.setattr(f"insitu.optim.step.blocked.{size}", 512 // torch.get_num_threads())
    monkeypatch.setattr("insitu.optim.step.blocked._FEWEST_COLUMNS", 16)
    gradients = some_gradients(shape, 2)
    for kind in ("gaussian", "sketch"):
        # The exact denominator shows each |G_j|; of the limiter's norm a missing block would be a constant factor.
        options: dict[str, Any] = {"kind": kind, "rank": 8, "denominator": "exact", "backend": "blocked"}
        W, oracle, _ = run_both(shape, gradients, **options)
        assert_agree(W, oracle)
        W, oracle, _ = run_both((20, 150), [g.T for g in gradients], **options)
        assert_agree(W, oracle)


def test_mini_is_rank_one_and_one_factor_per_tensor() -> None:
    gradients = some_gradients((6, 11))
    W, oracle, _ = run_both((6, 11), gradients, rank=1, granularity="tensor")
    mini = torch.nn.Parameter(torch.tensor(np.random.default_rng(1).standard_normal((6, 11)), dtype=torch.float32))
    optimizer = APOLLOMini([mini], lr=1e-2, refresh=4, seed=5)
    for gradient in gradients:
        mini.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
    np.testing.assert_array_equal(mini.detach().numpy(), W)
    assert_agree(W, oracle)
    assert optimizer.state[mini]["exp_avg"].shape == (1, 11)


def test_a_row_without_gradient_after_having_had_one_stands_still() -> None:
    shape = (12, 4)  # an embedding: rows are channels
    gradients = some_gradients(shape, 5)
    for gradient in gradients[1:]:
        gradient[3] = 0.0
    W, oracle, _ = run_both(shape, gradients, limiter=None)
    assert_agree(W, oracle)
    after_one, _, _ = run_both(shape, gradients[:1], limiter=None)
    np.testing.assert_array_equal(W[3], after_one[3])


def test_a_zero_gradient_changes_nothing_and_freezes_nothing() -> None:
    shape = (8, 6)
    zero, some = np.zeros(shape), some_gradients(shape, 6)
    with_zeros, oracle, optimizer = run_both(shape, [zero, some[0], zero, zero, *some[1:]], weight_decay=0.1)
    without, _, _ = run_both(shape, some, weight_decay=0.1)
    np.testing.assert_array_equal(with_zeros, without)
    assert_agree(with_zeros, oracle)
    (state,) = optimizer.state.values()
    assert int(state["step"]) == 6
    assert np.abs(with_zeros - np.random.default_rng(1).standard_normal(shape)).max() > 0.05, "it froze"


def test_the_limiter_bounds_growth_and_lets_the_norm_fall() -> None:
    shape = (8, 6)
    base = np.random.default_rng(3).standard_normal(shape)
    # With betas of 0 and a large eps the update follows the gradient's norm, which jumps up and falls here.
    W, oracle, optimizer = run_both(shape, [base * 1e-3, base, base, base * 1e-4, base], betas=(0.0, 0.0), eps=10.0)
    assert_agree(W, oracle)
    ratios = [b / a for a, b in zip(oracle.norms, oracle.norms[1:], strict=False)]
    assert max(ratios) == pytest.approx(1.01)
    assert min(ratios) < 0.5
    (state,) = optimizer.state.values()
    assert float(state["update_norm"]) == pytest.approx(oracle.last, rel=1e-5)


def test_the_limiter_remembers_across_a_zero_gradient() -> None:
    shape = (8, 6)
    base = np.random.default_rng(3).standard_normal(shape)
    gradients = [base * 1e-3, np.zeros(shape), base, base]
    W, oracle, _ = run_both(shape, gradients, betas=(0.0, 0.0), eps=10.0)
    assert_agree(W, oracle)
    assert oracle.norms[1:] == pytest.approx([1.01 * oracle.norms[0], 1.01**2 * oracle.norms[0]])
    # Without the limiter the update would be a thousand times as large, which the comparison cannot miss.
    free, _, _ = run_both(shape, gradients, betas=(0.0, 0.0), eps=10.0, limiter=None)
    assert np.abs(free - W).max() > 100 * TOLERANCE * np.abs(W).max()


@given(
    rows=st.integers(1, 20),
    cols=st.integers(1, 20),
    rank=st.integers(1, 8),
    kind=st.sampled_from(["gaussian", "rademacher", "sketch"]),
    tensorwise=st.booleans(),
    exact=st.booleans(),
    limited=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape_and_combination(
    rows: int, cols: int, rank: int, kind: str, tensorwise: bool, exact: bool, limited: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    gradients = [rng.standard_normal((rows, cols)) * rng.integers(0, 2, (rows, cols)) for _ in range(4)]
    W, oracle, _ = run_both(
        (rows, cols),
        gradients,
        kind=kind,
        rank=rank,
        refresh=2,
        granularity="tensor" if tensorwise else "channel",
        denominator="exact" if exact else "projected",
        limiter=1.01 if limited else None,
    )
    # Few channels and a projection that nearly cancels them make s large: compare relative to how far the weights moved.
    scale = np.abs(oracle.W).max() + max(oracle.norms, default=0.0)
    np.testing.assert_allclose(W, oracle.W, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("backend", ["reference", "blocked", "native", "fused"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_what_is_not_projected_takes_adamw(backend: str, decay: float) -> None:
    rng = np.random.default_rng(4)
    start = rng.standard_normal(300_001)  # more than one block
    gradients = [rng.standard_normal(300_001) for _ in range(4)]
    gradients[1][:100_000] = 0.0  # a block without gradient beside blocks that have one
    w = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    optimizer = APOLLO([w], lr=1e-2, weight_decay=decay, backend=backend)
    for gradient in gradients:
        w.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
    expected = adamw(start, gradients, 1e-2, decay)
    np.testing.assert_allclose(w.detach().numpy(), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_auto_alpha_makes_the_update_as_large_as_adamws() -> None:
    rng = np.random.default_rng(5)
    shape = (64, 256)
    gradients = [rng.standard_normal(shape) for _ in range(30)]
    _, oracle, _ = run_both(shape, gradients, rank=8, refresh=200, limiter=None)
    M, V = np.zeros(shape), np.zeros(shape)
    for t, G in enumerate(gradients, 1):
        M, V = 0.9 * M + 0.1 * G, 0.999 * V + 0.001 * G * G
        norm = np.linalg.norm((M / (1 - 0.9**t)) / (np.sqrt(V / (1 - 0.999**t)) + 1e-8))
    # White noise, 30 steps, rank 8: an average over 256 channels.
    assert oracle.norms[-1] / norm == pytest.approx(1.0, abs=0.15)
