"""What one optimizer step costs, beside SGD(fused) = 1.0 in the same round.

    python benchmarks/optimizer_step.py --out benchmarks/results/optimizer_step.json

About fifteen minutes on two idle cores; ``--rounds 3 --skip-cold --skip-differences --dtypes float32`` takes one or two. All
parameter shapes of SmolLM2-135M, every tensor of two dimensions projected, the table too; default arguments, limiter on. In
each round every row takes one step, on gradients that the step before it did not have, so a row's ratio is to an SGD step under
the same other load. Rows that are not installed are named in the result. ``floor`` is what gaussian cannot go below: its own
products P G in float32, and SGD; ``two passes`` what rank 1 cannot go below: reading G once, and SGD.

In the same run: the largest difference from ``backend="reference"`` after two steps, beside the largest change of a weight;
the first step in a process of its own, with an empty compiler cache; what a step allocates above what it keeps.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from environment import environment
from insitu.optim import APOLLO, APOLLOMini
from insitu.optim.step import kernels

# The config of SmolLM2-135M, written out: nothing is downloaded.
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, KEYS = 576, 1536, 30, 49152, 192
_LAYER = [
    *[(HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, HIDDEN)],
    *[(INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)],
    *[(HIDDEN,), (HIDDEN,)],
]
SHAPES: list[tuple[int, ...]] = [(VOCABULARY, HIDDEN), *(_LAYER * LAYERS), (HIDDEN,)]  # the head is the table
RANK = 144
CPU_BACKENDS = ("blocked", "native", "fused", "compiled")
METHODS: dict[str, dict[str, Any]] = {
    "mini": {"rank": 1},
    "sketch": {"rank": RANK, "projection": "sketch"},
    "gaussian": {"rank": RANK},
}
# Median ratio to SGD(fused) of the same type; gaussian: to the floor in the same round.
LIMITS = {
    "default": {"mini": 2.5, "sketch": 4.0, "gaussian": 1.3},
    "fastest": {"mini": 1.6, "sketch": 2.5, "gaussian": 1.3},
}
FIRST_STEP_SECONDS = 30.0

Step = Callable[[], Any]
Make = Callable[[list[nn.Parameter]], Step]


def ours(method: str, backend: str) -> Make:
    def make(params: list[nn.Parameter]) -> Step:
        options = {k: v for k, v in METHODS[method].items() if method != "mini" or k != "rank"}
        cls = APOLLOMini if method == "mini" else APOLLO
        matrices, vectors = ([p for p in params if (p.ndim >= 2) is wanted] for wanted in (True, False))
        groups = [{"params": matrices, "role": "matrix"}, {"params": vectors, "role": "adamw"}]
        return cls(groups, lr=1e-5, backend=backend, **options).step

    return make


def floor(params: list[nn.Parameter]) -> Step:
    """P G of every matrix, as gaussian has to make it, and SGD."""
    sgd = torch.optim.SGD(params, lr=1e-5, fused=True)
    projections = {n: torch.randn(RANK, n) for n in {min(p.shape) for p in params if p.ndim == 2}}

    def step() -> None:
        with torch.no_grad():
            for p in params:
                assert p.grad is not None
                if p.ndim == 2:
                    P, G = projections[min(p.shape)], p.grad.float()
                    _ = G @ P.T if p.shape[0] >= p.shape[1] else P @ G
        sgd.step()

    return step


def two_passes(params: list[nn.Parameter]) -> Step:
    """What rank 1 cannot go below: every gradient read once, and SGD."""
    sgd = torch.optim.SGD(params, lr=1e-5, fused=True)

    def step() -> None:
        for p in params:
            assert p.grad is not None
            p.grad.sum()
        sgd.step()

    return step


def _grouped(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": [p for p in params if p.ndim == 2], "rank": RANK}, {"params": [p for p in params if p.ndim < 2]}]


def bitsandbytes_adamw8(params: list[nn.Parameter]) -> Step:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, lr=1e-5).step  # type: ignore[no-any-return]


def torchao_adamw8(params: list[nn.Parameter]) -> Step:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=1e-5).step  # type: ignore[no-any-return]


def pytorch_optimizer_apollo(params: list[nn.Parameter]) -> Step:
    import pytorch_optimizer

    matrices, vectors = _grouped(params)
    projected = {"update_proj_gap": 200, "scale": 1.0, "projection_type": "std"}
    groups = [{**matrices, **projected}, vectors]
    return pytorch_optimizer.APOLLO(groups, lr=1e-5, scale_type="channel").step  # type: ignore[no-any-return]


def apollo_torch(params: list[nn.Parameter]) -> Step:
    from apollo_torch import APOLLOAdamW

    matrices, vectors = _grouped(params)
    projected = {"update_proj_gap": 200, "scale": 1.0, "proj": "random", "proj_type": "std", "scale_type": "channel"}
    return APOLLOAdamW([{**matrices, **projected}, vectors], lr=1e-5).step  # type: ignore[no-any-return]


PEERS: dict[str, tuple[str, Make]] = {
    "bitsandbytes AdamW8bit": ("bitsandbytes", bitsandbytes_adamw8),
    "torchao AdamW8bit": ("torchao", torchao_adamw8),
    "pytorch_optimizer APOLLO r144": ("pytorch-optimizer", pytorch_optimizer_apollo),
    "apollo-torch r144": ("apollo-torch", apollo_torch),
}
ROWS: dict[str, Make] = {
    "SGD fused": lambda params: torch.optim.SGD(params, lr=1e-5, fused=True).step,
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-5, fused=True).step,
    "floor": floor,
    "two passes": two_passes,
    **{f"{method} {backend}": ours(method, backend) for method in METHODS for backend in CPU_BACKENDS},
    **{name: make for name, (_, make) in PEERS.items()},
}


class Model:
    """The parameters, and two sets of gradients that take turns."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(scale: float) -> list[Tensor]:
            return [torch.randn(shape, generator=generator).mul_(scale).to(dtype) for shape in SHAPES]

        self.start = draw(0.02)
        self.params = [nn.Parameter(x.clone()) for x in self.start]
        self.gradients = [draw(1e-3), draw(1e-3)]
        self._turn = 0

    def reset(self) -> None:
        self._turn = 0
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.start)

    def replace_gradients(self) -> None:
        self._turn = 1 - self._turn
        for p, g in zip(self.params, self.gradients[self._turn], strict=True):
            p.grad = g


def timed(model: Model, step: Step) -> float:
    model.replace_gradients()
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def temporary_bytes(step: Step) -> int:
    """The most that was allocated during a step, above what was held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def differences(model: Model, rows: Sequence[str], steps: int = 2) -> dict[str, dict[str, float]]:
    """Each backend after some steps from the same start, beside the reference."""
    found: dict[str, dict[str, float]] = {}
    for method in METHODS:
        asked = [row for row in rows if row in {f"{method} {backend}" for backend in CPU_BACKENDS}]
        expected: list[Tensor] = []
        moved = 0.0
        if not asked:
            continue
        for row in [f"{method} reference", *asked]:
            model.reset()
            say(f"difference: {row}")
            step = ours(method, row.split()[-1])(model.params)
            for _ in range(steps):
                model.replace_gradients()
                step()
            if not expected:
                expected = [p.detach().clone() for p in model.params]
                moved = _largest(model.start, expected)
            else:
                equal = sum(int((a == b).sum()) for a, b in zip(model.params, expected, strict=True))
                found[row] = {
                    "largest_difference": _largest(model.params, expected),
                    "largest_change_of_a_weight": moved,
                    "share_of_equal_weights": equal / sum(p.numel() for p in expected),
                }
    model.reset()
    return found


def _largest(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max((x.detach().float() - y.float()).abs().max().item() for x, y in zip(a, b, strict=True))


def cold(row: str, dtype: str) -> None:
    """Print the seconds of the first steps of this process, and what a step allocates."""
    model = Model(getattr(torch, dtype))
    made = ROWS[row](model.params)
    seconds = [timed(model, made) for _ in range(3)]
    model.replace_gradients()
    print(json.dumps({"first_step_seconds": seconds[0], "temporary_bytes": temporary_bytes(made)}))


def cold_in_a_process(row: str, dtype: str, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--cold", row, "--dtypes", dtype, "--threads", str(threads)]
        out = subprocess.run(
            command, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    return dict(json.loads(out.splitlines()[-1]))


def measure(dtype: str, rows: Sequence[str], rounds: int, compare: bool) -> dict[str, Any]:
    model = Model(getattr(torch, dtype))
    result: dict[str, Any] = {"differences": differences(model, rows) if compare else {}, "failed": {}}
    steps: dict[str, Step] = {}
    for row in rows:
        try:
            say(f"first steps: {row}")
            steps[row] = ROWS[row](model.params)
            for _ in range(2):  # state, projections and compiled code are made
                timed(model, steps[row])
        except Exception as error:  # a peer that cannot do this type or device: named in the result
            if row not in PEERS:
                raise
            steps.pop(row, None)
            result["failed"][row] = f"{type(error).__name__}: {error}".splitlines()[0]
    gc.collect()
    gc.disable()
    seconds: dict[str, list[float]] = {row: [] for row in steps}
    order = list(steps)
    for i in range(rounds):
        say(f"round {i + 1} of {rounds}")
        for row in order[i % len(order) :] + order[: i % len(order)]:
            seconds[row].append(timed(model, steps[row]))
    gc.enable()
    sgd = seconds["SGD fused"]
    result["rows"] = {
        row: {
            "milliseconds": spread([1e3 * s for s in taken]),
            "ratio_to_sgd": spread([a / b for a, b in zip(taken, sgd, strict=True)]),
            **(
                {"ratio_to_floor": spread([a / b for a, b in zip(taken, seconds["floor"], strict=True)])}
                if row.startswith("gaussian") and "floor" in seconds
                else {}
            ),
        }
        for row, taken in seconds.items()
    }
    return result


def judged(rows: dict[str, Any]) -> dict[str, Any]:
    """The figures that have limits: of the default backend, and of the fastest."""
    usual = "blocked" if kernels.installed() is None else "native"
    figures: dict[str, Any] = {}
    for method in METHODS:
        key = "ratio_to_floor" if method == "gaussian" else "ratio_to_sgd"
        of = {b: rows[f"{method} {b}"][key]["median"] for b in CPU_BACKENDS if f"{method} {b}" in rows}
        if usual in of:
            fastest = min(of, key=lambda b: of[b])
            for which, backend in (("default", usual), ("fastest", fastest)):
                figures[f"{which} {method}"] = {
                    "backend": backend,
                    "of": "floor" if method == "gaussian" else "SGD fused",
                    "ratio": of[backend],
                    "limit": LIMITS[which][method],
                    "met": of[backend] <= LIMITS[which][method],
                }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rows", nargs="+", help="only these; SGD fused is always there")
    parser.add_argument(
        "--skip-cold", action="store_true", help="no first steps and no memory: they take a process each"
    )
    parser.add_argument("--skip-differences", action="store_true", help="no comparison with the reference")
    parser.add_argument("--cold", metavar="ROW", help=argparse.SUPPRESS)
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    warnings.simplefilter("ignore")
    if told.cold:
        cold(told.cold, told.dtypes[0])
        return
    missing = [row for row, (package, _) in PEERS.items() if installed(package) is None]
    rows = [row for row in ROWS if row not in missing and (row == "SGD fused" or not told.rows or row in told.rows)]
    packages = [package for row, (package, _) in PEERS.items() if row not in missing]
    result: dict[str, Any] = {
        "environment": environment(*packages),
        "threads": told.threads,
        "tensors": len(SHAPES),
        "parameters": sum(torch.Size(s).numel() for s in SHAPES),
        "rounds": told.rounds,
        "not_installed": missing,
    }
    met = []
    for dtype in told.dtypes:
        found = measure(dtype, rows, told.rounds, not told.skip_differences)
        found["figures"] = judged(found["rows"])
        if not told.skip_cold:
            found["cold"] = {
                row: cold_in_a_process(row, dtype, told.threads) for row in rows if row not in found["failed"]
            }
            largest = max(torch.Size(s).numel() for s in SHAPES) * getattr(torch, dtype).itemsize
            own = [found["cold"][row] for row in rows if row in {f"{m} {b}" for m in METHODS for b in CPU_BACKENDS}]
            found["figures"]["first_step_seconds"] = {
                "value": (slowest := max(c["first_step_seconds"] for c in own)),
                "limit": FIRST_STEP_SECONDS,
                "met": slowest <= FIRST_STEP_SECONDS,
            }
            found["figures"]["temporary_bytes"] = {
                "value": (most := max(c["temporary_bytes"] for c in own)),
                "limit": largest,
                "met": most <= largest,
            }
        met += [figure["met"] for figure in found["figures"].values()]
        result[dtype] = found
        print(dtype)
        for row, figures in found["rows"].items():
            ratio, ms = figures["ratio_to_sgd"], figures["milliseconds"]["median"]
            print(
                f"  {row:30s} {ratio['median']:6.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})  {ms:8.1f} ms", flush=True
            )
        print(json.dumps({k: found[k] for k in ("differences", "figures", "failed")}, indent=1), flush=True)
    if told.out:
        told.out.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(0 if all(met) else 1)


if __name__ == "__main__":
    main()
