"""The guides show what benchmarks/results hold."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("guide", "words"),
    [("speed.md", ["SGD fused", "q-apollo"]), ("training.md", ["insitu train, apollo-mini", "one epoch, seed 1"])],
)
def test_a_guide_has_the_tables_of_the_committed_results(guide: str, words: list[str]) -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = (tables.GUIDES / guide).read_text()
    assert tables.replaced(tables.GUIDES / guide) == text, "run python benchmarks/tables.py --write"
    assert all(word in text for word in words)
