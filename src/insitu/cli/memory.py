"""``insitu memory``: what training a model takes, before it is tried."""

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

_NOT_COUNTED = "activations, temporaries of a step, the allocator's reserve"


def memory(
    model: str,
    /,
    *,
    optim: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=True)] = None,
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16",
    rank: int = 256,
    dense: Literal["adamw", "apollo", "sgd"] = "adamw",
    moments: Literal["float32", "bfloat16"] = "float32",
    projection: Literal["gaussian", "rademacher", "sketch", "svd"] = "gaussian",
    release: bool = False,
    json_file: Annotated[Path | None, Parameter(name="--json", allow_leading_hyphen=True)] = None,
) -> None:
    """Bytes of weights, gradients and optimizer state for training MODEL, from its shapes alone.

    Activations are not counted: they follow from batch and sequence, not from the optimizer.

    Args:
        model: smollm2, llama-9m to llama-13b (the papers' sizes), andrea-tiny to andrea-480m,
            a directory, or a Hub id. Only its config is read.
        optim: One or several optimizers; all by default.
        dtype: Of weights and gradients. The state has the type that each optimizer gives it.
        rank: Of APOLLO, Q-APOLLO and GaLore.
        dense: What APOLLO's embeddings and output head take.
        moments: How APOLLO's and ApolloQN's moments are stored.
        projection: APOLLO's.
        release: Gradients freed tensor by tensor during the backward pass.
        json_file: Also write every figure to this file, - for standard output instead of the table.
    """
    import torch

    from insitu.diagnostics.memory import OPTIMIZERS, Memory
    from insitu.diagnostics.memory import memory as foretell
    from insitu.diagnostics.skeleton import ModelError, skeleton

    names = list(OPTIMIZERS) if optim in (None, [], ["all"]) else list(optim or ())
    if unknown := [name for name in names if name not in OPTIMIZERS]:
        sys.exit(f"insitu: --optim {unknown[0]!r} is unknown; expected one of {', '.join(OPTIMIZERS)}, or all")
    rows: list[Memory] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            module = skeleton(model, getattr(torch, dtype))
            for name in names:
                rows.append(
                    foretell(module, name, rank=rank, release=release, **_options(name, dense, moments, projection))
                )
            live = _live(module)
        except (ModelError, ValueError) as error:
            sys.exit(f"insitu: {error}")
    notes = list(dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning))
    options = {"dtype": dtype, "rank": rank, "dense": dense, "moments": moments, "projection": projection}
    report = {
        "model": model,
        "parameters": sum(p.numel() for p in module.parameters()),
        "options": {**options, "release": release},
        "not_counted": _NOT_COUNTED,
        "optimizers": [row.as_json() for row in rows],
        "live": live,
        "notes": notes,
    }
    if json_file == Path("-"):
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return
    _show(report)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")


def _options(name: str, dense: str, moments: str, projection: str) -> dict[str, Any]:
    """Those of the options that the optimizer of this name has."""
    if name == "apollo-qn":
        return {"moments": moments}
    return {"dense": dense, "moments": moments, "projection": projection} if "apollo" in name else {}


def _live(module: Any) -> dict[str, Any]:
    """What ``insitu serve`` takes to learn with its defaults: the same weights serve and are trained."""
    from insitu.diagnostics.memory import of_optimizer
    from insitu.live.config import TeachConfig
    from insitu.live.teaching import make_optimizer

    learner = of_optimizer(module, make_optimizer(module, TeachConfig()), TeachConfig().optimizer)
    return {**learner.as_json(), "undo_images_on_disk": 2 * learner.weights}


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    options = report["options"]
    title = (
        f"{report['model']}: {report['parameters'] / 1e6:,.1f} M parameters, {options['dtype']}, rank {options['rank']}"
    )
    table = Table(title=title, caption=f"Not counted: {report['not_counted']}.")
    table.add_column("optimizer")
    heads = ("weights", "gradients", "state: matrices", "embeddings, head", "the rest", "projections", "peak")
    for head in heads:
        table.add_column(head, justify="right")
    for row in report["optimizers"]:
        table.add_row(row["optimizer"], *_cells(row))
    table.add_section()
    table.add_row(f"insitu serve ({report['live']['optimizer']})", *_cells(report["live"]))
    console = Console()
    console.print(table)
    undo = report["live"]["undo_images_on_disk"]
    console.print(
        f"insitu serve: one copy of the weights serves and is trained. Two undo images, {decimal(undo)}, are mapped files: "
        "disk and page cache, which the system takes back when memory is short. Keys and values of requests come beside."
    )
    for note in report["notes"]:
        console.print(f"note: {note}")


def _cells(row: dict[str, Any]) -> list[str]:
    from rich.filesize import decimal

    state = {role: sum(kinds.values()) for role, kinds in row["state"].items()}
    matrix, dense = state.pop("matrix", 0), state.pop("dense", 0)
    parts = (row["weights"], row["gradients"], matrix, dense, sum(state.values()), row["projections"], row["peak"])
    return [decimal(part) for part in parts]
