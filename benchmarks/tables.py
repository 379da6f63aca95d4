"""The tables of docs/guide/speed.md, from benchmarks/results.

python benchmarks/tables.py            # prints them
python benchmarks/tables.py --write    # puts them into the guide, between the marks
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GUIDE = ROOT / "docs" / "guide" / "speed.md"
MARKS = "<!-- table of {}.json: made by benchmarks/tables.py -->", "<!-- end of {}.json -->"


def setting(found: dict[str, Any]) -> str:
    environment = found["environment"]
    return (
        f"`{environment['command']}` at {environment['commit'][:10]}; torch {environment['versions']['torch']}, "
        f"{found['threads']} threads of {environment['hardware']['cpu']}."
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


TABLES = {"optimizer_step": optimizer_step, "end_to_end": end_to_end}


def table(name: str) -> str:
    return "\n".join(TABLES[name](json.loads((RESULTS / f"{name}.json").read_text())))


def replaced(text: str) -> str:
    """The guide with the tables of today's results."""
    for name in TABLES:
        first, last = (mark.format(name) for mark in MARKS)
        if text.count(first) != 1 or text.count(last) != 1:
            sys.exit(
                f"{GUIDE.relative_to(ROOT)} has not exactly one {first} and {last}: put them where the table is to be"
            )
        before, _, rest = text.partition(first)
        text = f"{before}{first}\n\n{table(name)}\n\n{last}{rest.partition(last)[2]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into the guide")
    if parser.parse_args().write:
        GUIDE.write_text(replaced(GUIDE.read_text()))
    else:
        print("\n\n".join(map(table, TABLES)))


if __name__ == "__main__":
    main()
