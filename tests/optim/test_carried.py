"""Steps of whole bundles in one call of the C++ kernels: the general way's numbers, whatever goes together, and "fused"."""

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from insitu import APOLLO
from insitu.optim.projection import ProjectionCache
from insitu.optim.rounding import Precision, stochastic_round
from insitu.optim.step import carried, carried_elements, choose, kernels, native

if isinstance(native.build(), str):
    pytest.skip(f"no kernels: {native.build()}", allow_module_level=True)

# Tall, wide and square, rows of an odd number of elements, more channels than are added up at once, and vectors: of each so
# many that threads take whole ones.
SHAPES = [(70, 34), (34, 70), (48, 48), (41, 23), (23, 41), (150, 20), (37,), (64,)]
NUM = 9
OPTIONS: list[dict[str, Any]] = [
    {"rank": 1},
    {"rank": 1, "granularity": "channel", "denominator": "exact", "weight_decay": 0.1},
    {"rank": 5, "limiter": None, "maximize": True},
    {"rank": 16, "projection": "sketch"},
    {"rank": 5, "projection": "sketch", "weight_decay": 0.1, "granularity": "tensor", "denominator": "exact"},
]


def run(
    dtype: torch.dtype, steps: int = 4, bad: float | None = None, shapes: list[tuple[int, ...]] = SHAPES, **options: Any
) -> list[Tensor]:
    """Weights and states after some steps; in the second some gradients are zero, or ``bad``."""
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes for _ in range(NUM)]
    optimizer = APOLLO(params, **{"lr": 1e-2, "refresh": 3, "nonfinite": "skip", **options})
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = (torch.randn(p.shape, generator=generator) * (1, 3, 0.1)[step % 3]).to(dtype)
            if step == 1 and i % 4 == 3:
                p.grad.zero_()
            if step == 1 and i % 4 == 1 and bad is not None:
                p.grad.view(-1)[-1] = bad
        optimizer.step()
    states = [x for p in params for x in optimizer.state[p].values() if isinstance(x, Tensor)]
    return [p.detach() for p in params] + states


@pytest.fixture(autouse=True)
def _without_warnings_of_ranks(recwarn: pytest.WarningsRecorder) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rank=")
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bad", [None, float("nan")], ids=["zeros", "nan"])
def test_it_is_the_general_way_in_fewer_calls(
    bad: float | None, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    for cls in (carried.Carried, carried_elements.CarriedElements):
        takes = cls.takes
        monkeypatch.setattr(cls, "takes", lambda self, *given, _of=takes: (taken.append(1), _of(self, *given))[1])
    found = run(dtype, bad=bad, backend="native", **options)
    assert len(taken) >= 4 * len(SHAPES), "the bundles were not asked"
    for cls in (carried.Carried, carried_elements.CarriedElements):
        monkeypatch.setattr(cls, "takes", lambda *_: False)
    expected = run(dtype, bad=bad, backend="native", **options)
    equal = total = 0
    for one, other in zip(found, expected, strict=True):
        # Sums in float64 in another order are the same float32 but for the rarest cases, and then a bit may follow.
        torch.testing.assert_close(one, other, rtol=1e-5 if one.dtype == torch.float32 else 2**-7, atol=1e-6)
        equal, total = equal + int((one == other).sum()), total + one.numel()
    assert equal > 0.99 * total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fused_has_the_bits_of_native_whatever_goes_at_once(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    try:
        for num in (1, 2, 4):
            torch.set_num_threads(num)  # of which the library's products depend
            expected = run(dtype, bad=float("inf"), backend="native", **options)
            # Bytes of gradients at once: one matrix, four of the nine (so that each thread takes whole ones), all.
            for chunk in (1, 4 * 70 * 34 * dtype.itemsize, 1 << 23):
                monkeypatch.setattr(carried, "_CHUNK", chunk)
                found = run(dtype, bad=float("inf"), backend="fused", **options)
                for one, other in zip(found, expected, strict=True):
                    assert torch.equal(one, other), (num, chunk)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("options", OPTIONS[:4:3], ids=str)
def test_fused_updates_the_others_and_then_refuses_what_is_not_finite(options: dict[str, Any]) -> None:
    def made(**more: Any) -> tuple[list[nn.Parameter], APOLLO]:
        generator = torch.Generator().manual_seed(2)
        params = [nn.Parameter(torch.randn(24, 16, generator=generator)) for _ in range(3)]
        params.append(nn.Parameter(torch.randn(16, generator=generator)))
        return params, APOLLO(
            [{"params": params, "param_names": ["a", "b", "c", "d"]}], lr=1e-2, refresh=3, **options, **more
        )

    def give(params: list[nn.Parameter], step: int, bad: bool = False) -> None:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        if bad:
            params[1].grad[3, 4] = float("nan")  # type: ignore[index]

    (params, optimizer), (others, skipping) = made(backend="fused"), made(backend="native", nonfinite="skip")
    for step in range(2):
        give(params, step)
        give(others, step)
        optimizer.step()
        skipping.step()
    before = params[1].detach().clone(), copy.deepcopy(optimizer.state[params[1]])
    give(params, 2, bad=True)
    give(others, 2, bad=True)
    with pytest.raises(ValueError, match="the gradient of b is not finite"):
        optimizer.step()
    skipping.step()
    assert torch.equal(params[1], before[0])
    assert int(optimizer.state[params[1]]["skipped"]) == 1
    for name in ("step", "exp_avg", "exp_avg_sq", "update_norm"):
        assert torch.equal(optimizer.state[params[1]][name], before[1][name])
    give(params, 3)
    give(others, 3)
    optimizer.step()  # it was refused once, and is no more
    skipping.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert int(optimizer.state[p]["step"]) == int(skipping.state[q]["step"]) == (3 if p is params[1] else 4)


def test_native_refuses_before_anything_is_written_and_so_does_fused_in_halves() -> None:
    for backend in ("native", "fused"):
        params = [nn.Parameter(torch.randn(24, 16)) for _ in range(3)]
        optimizer = APOLLO(params, rank=2, projection="sketch", backend=backend)
        for step in range(3):
            before = [p.detach().clone() for p in params]
            versions = [p._version for p in params]
            for p in params:
                p.grad = torch.randn_like(p)
            if step == 2:
                params[2].grad[0, 0] = float("inf")  # type: ignore[index]
                with pytest.raises(ValueError, match="the gradient of parameter 2 is not finite"):
                    optimizer.prepare()
                write = None
            else:
                write = optimizer.prepare()
            assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
            assert [p._version for p in params] == versions
            if write is not None:
                write()
                assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))
                # A backward pass that still needs one of them must notice.
                assert all(p._version > v for p, v in zip(params, versions, strict=True))


@pytest.mark.parametrize("by", ["tensor", "row", "column"])
@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("shape", [(1, 3, 15), (1, 5, 34), (1, 4, 67), (2, 3, 33)], ids=str)
def test_rounding_of_pairs_is_bit_identical_from_any_element_on(shape: tuple[int, int, int], odd: int, by: str) -> None:
    b, rows, cols = shape
    for start in (odd, 2**31 - 6 + odd, 2**32 - 40 + odd):
        G, W = torch.randn(shape).bfloat16(), torch.zeros(shape, dtype=torch.bfloat16)
        eta = torch.rand(b, {"tensor": 1, "row": rows, "column": 1}[by], cols if by == "column" else 1)
        made = choose("native", torch.device("cpu"))
        made.apply([W], [G], eta, None, torch.ones(1), [Precision(_key(), start)])
        # Of W = 0 the only rounding before the last one is that of a product.
        assert torch.equal(W, stochastic_round(-(G.float() * eta), 3, 4, start))


def _key() -> int:
    from insitu.optim.seeds import mix

    return mix(3, 4)


def test_of_a_pair_in_bf16_both_halves_decay() -> None:
    W, start = torch.full((1, 3, 40), 4.0).bfloat16(), 4.0
    G = torch.full((1, 3, 40), 1.0).bfloat16()
    made = choose("native", torch.device("cpu"))
    made.apply([W], [G], torch.full((1, 1, 1), 0.5), torch.tensor([0.25]), torch.ones(1), [Precision(_key())])
    assert torch.equal(W, torch.full_like(W, start * 0.75 - 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vectors_that_are_too_long_for_one_sum_go_the_general_way(dtype: torch.dtype) -> None:
    shapes: list[tuple[int, ...]] = [(native.PIECE,), (native.PIECE + 1,)]
    found, expected = (run(dtype, shapes=shapes, backend=backend) for backend in ("native", "reference"))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5 if one.dtype == torch.float32 else 2**-6, atol=1e-6)


def test_counts_of_another_type_are_kept_as_they_are() -> None:
    p = nn.Parameter(torch.randn(8, 6))
    optimizer = APOLLO([p], rank=2, backend="native")
    for step in range(4):
        if step == 2:
            optimizer.state[p]["step"] = optimizer.state[p]["step"].float()
        p.grad = torch.randn_like(p)
        optimizer.step()
    assert optimizer.state[p]["step"].dtype == torch.float32
    assert int(optimizer.state[p]["step"]) == 4


@pytest.mark.parametrize("projection", ["gaussian", "rademacher"])
def test_dense_projections_that_the_cache_does_not_keep_are_gone_after_the_step(
    projection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    get = ProjectionCache.get

    def seen(self: ProjectionCache, *given: Any) -> Any:
        self._limit = 0
        made.append(weakref.ref(found := get(self, *given)))
        return found

    monkeypatch.setattr(ProjectionCache, "get", seen)
    params = [nn.Parameter(torch.randn(24, 16)) for _ in range(3)]
    optimizer = APOLLO(params, rank=4, projection=projection, backend="native")
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        gc.collect()
        assert [P() for P in made] == [None] * len(made)
    assert len(made) == 6


def test_another_librarys_functions_of_the_same_names_are_not_called(tmp_path: Path) -> None:
    # As if a plugin that every library sees had functions with ordinary names.
    source, library = tmp_path / "other.cpp", tmp_path / "other.so"
    names = ("apply", "square", "norms", "direct", "factors", "limited", "adamw", "measure_one", "measure_sketch")
    source.write_text("#include <cstdlib>\n" + "".join(f'extern "C" void {name}() {{ abort(); }}\n' for name in names))
    compiler, _ = kernels.find_compiler()
    if compiler is None:
        pytest.skip("needs the compiler that made the kernels")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    program = (
        f"import ctypes; ctypes.CDLL({str(library)!r}, ctypes.RTLD_GLOBAL)\n"
        "import torch, insitu\n"
        "params = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((24, 16), (16,))]\n"
        "for options in ({'rank': 1}, {'rank': 4, 'projection': 'sketch'}):\n"
        "    optimizer = insitu.APOLLO(params, backend='fused', **options)\n"
        "    for p in params: p.grad = torch.ones_like(p)\n"
        "    optimizer.step()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
