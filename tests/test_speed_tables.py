"""docs/guide/speed.md shows what benchmarks/results hold."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_guide_has_the_tables_of_the_committed_results() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    guide = tables.GUIDE.read_text()
    assert tables.replaced(guide) == guide, "run python benchmarks/tables.py --write"
    assert "SGD fused" in guide
    assert "q-apollo" in guide
