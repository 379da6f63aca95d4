"""The example of gradient release, executed."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "gradient_release.py"


def test_the_example_learns() -> None:
    losses = runpy.run_path(str(EXAMPLE))["main"]()
    assert losses[-1] < 0.5 * losses[0]
    assert len(EXAMPLE.read_text().splitlines()) < 60
