"""The tables of docs/guide/speed.md and training.md, from benchmarks/results.

python benchmarks/tables.py            # prints them
python benchmarks/tables.py --write    # puts them into the guides, between the marks
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # a test loads this file by its path
from marks import between, commit

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GUIDES = ROOT / "docs" / "guide"
MARKS = "<!-- table of {}.json: made by benchmarks/tables.py -->", "<!-- end of {}.json -->"


def setting(found: dict[str, Any]) -> str:
    environment = found["environment"]
    threads = f"{found['threads']} threads of " if "threads" in found else ""
    return (
        f"`{environment['command']}` at {commit(environment['commit'])}; torch {environment['versions']['torch']}, "
        f"{threads}{environment['hardware']['cpu']}."
    )


def optimizer_step(found: dict[str, Any]) -> Iterator[str]:
    """Ratios to SGD(fused) of the same type, as median (smallest to largest)."""
    dtypes = [dtype for dtype in ("float32", "bfloat16") if dtype in found]
    yield f"| step | {' | '.join(f'{dtype}, x SGD | ms | first step, s | temporary, MB' for dtype in dtypes)} |"
    yield f"|---|{'---|' * (4 * len(dtypes))}"
    for row in found[dtypes[0]]["rows"]:
        cells = []
        for dtype in dtypes:
            figures, cold = found[dtype]["rows"].get(row), found[dtype].get("cold", {}).get(row, {})
            if figures is None:
                cells += ["-"] * 4
                continue
            ratio, ms = figures["ratio_to_sgd"], figures["milliseconds"]["median"]
            cells += [f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})", f"{ms:.0f}"]
            cells += (
                [f"{cold['first_step_seconds']:.1f}", f"{cold['temporary_bytes'] / 1e6:.1f}"] if cold else ["-"] * 2
            )
        yield f"| {row} | {' | '.join(cells)} |"
    yield ""
    yield "| figure | type | backend | found | limit | met |"
    yield "|---|---|---|---|---|---|"
    for dtype in dtypes:
        for name, figure in found[dtype]["figures"].items():
            value = figure.get("ratio", figure.get("value"))
            shown = f"{value / 1e6:.0f} MB" if name == "temporary_bytes" else f"{value:.2f}"
            limit = f"{figure['limit'] / 1e6:.0f} MB" if name == "temporary_bytes" else f"{figure['limit']:g}"
            met = "yes" if figure["met"] else "**no**"
            yield f"| {name.replace('_', ' ')} | {dtype} | {figure.get('backend', '')} | {shown} | {limit} | {met} |"
    yield ""
    size = f"{found['parameters'] / 1e6:.1f} M parameters in {found['tensors']} tensors"
    yield f"{size}, n = {found['rounds']} rounds. {setting(found)}"


def end_to_end(found: dict[str, Any]) -> Iterator[str]:
    """Speed is a ratio to AdamW(fused) in the same turn, as median (smallest to largest)."""
    yield "| model | type | optimizer | tokens/s | x AdamW | peak, MB | state, MB | weights, MB |"
    yield "|---|---|---|---|---|---|---|---|"
    for model in found["batch"]:
        for dtype, arms in found.get(model, {}).items():
            for arm, figures in arms.items():
                low, high = figures["speed_over_adamw_range"]
                yield (
                    f"| {model} | {dtype} | {arm} | {figures['tokens_per_second']:.0f} "
                    f"| {figures['speed_over_adamw']:.2f} ({low:.2f} to {high:.2f}) | {figures['peak_bytes'] / 1e6:.0f} "
                    f"| {figures['state_bytes'] / 1e6:.1f} | {figures['weight_bytes'] / 1e6:.0f} |"
                )
    yield ""
    batches = ", ".join(f"{model} {batch} x {found['context']}" for model, batch in found["batch"].items())
    num = next(arm["n"] for model in found["batch"] for arms in found.get(model, {}).values() for arm in arms.values())
    yield f"Tokens a step: {batches}; n = {num} steps each. {setting(found)}"


def training(found: dict[str, Any]) -> Iterator[str]:
    """The rate is a ratio to the bare Trainer in the same turn, median."""
    yield "| run | tokens/s | x bare Trainer | step, ms (quartiles) | peak, MB |"
    yield "|---|---|---|---|---|"
    for name, arm in found["arms"].items():
        step = arm["step_seconds"]
        low, high = (1e3 * x for x in step["quartiles"])
        yield (
            f"| {name} | {arm['tokens_per_second']:,.0f} | {arm['rate_beside_bare']:.3f} "
            f"| {1e3 * step['median']:.0f} ({low:.0f} to {high:.0f}) | {arm['peak_bytes'] / 1e6:,.0f} |"
        )
    yield ""
    settings = found["settings"]
    num = next(iter(found["arms"].values()))["step_seconds"]["n"]
    size = f"LLaMA-9M in float32, {settings['batch']} x {settings['length']} tokens a step"
    yield f"{size}, n = {num} turns of {settings['turn']} steps. {setting({**found, 'threads': settings['threads']})}"


def sft(found: dict[str, Any]) -> Iterator[str]:
    """Held-out accuracy; the rise is paired, item by item."""
    num, baseline = len(found["baseline"]), found["summary"]["baseline"]
    yield "| ARC-Easy, test | accuracy | rise | in standard errors | loss, first to last ten steps |"
    yield "|---|---|---|---|---|"
    yield f"| before | {baseline:.4f} | | | |"
    for run in found["runs"]:
        yield (
            f"| one epoch, seed {run['seed']} | {run['accuracy']:.4f} | {run['rise']:+.4f} ± {run['standard_error']:.4f} "
            f"| {run['in_errors']:.1f} | {run['losses'][0]:.2f} to {run['losses'][-1]:.2f} |"
        )
    yield ""
    options, items = found["options"], found["summary"]["items"]
    yield (
        f"{items['train']} items to train on, {num} held out, chance {items['chance']:.3f}; APOLLO of rank {options['rank']}, "
        f"lr {options['lr']:g}, batches of {options['batch_size']}. {setting(found)}"
    )


# Each table, and the guide that it is in.
TABLES: dict[str, tuple[Callable[[dict[str, Any]], Iterator[str]], str]] = {
    "optimizer_step": (optimizer_step, "speed.md"),
    "optimizer_step_avx512": (optimizer_step, "speed.md"),
    "end_to_end": (end_to_end, "speed.md"),
    "training": (training, "training.md"),
    "sft": (sft, "training.md"),
}


def table(name: str) -> str:
    make, _ = TABLES[name]
    return "\n".join(make(json.loads((RESULTS / f"{name}.json").read_text())))


def replaced(guide: Path) -> str:
    """The guide with the tables of today's results."""
    text = guide.read_text()
    for name, (_, place) in TABLES.items():
        if place != guide.name:
            continue
        first, last = MARKS
        text = between(text, (first.format(name), last.format(name)), table(name), guide)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into the guides")
    if parser.parse_args().write:
        for guide in dict.fromkeys(GUIDES / place for _, place in TABLES.values()):
            guide.write_text(replaced(guide))
    else:
        print("\n\n".join(map(table, TABLES)))


if __name__ == "__main__":
    main()
