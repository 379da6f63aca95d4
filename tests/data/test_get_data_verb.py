"""``insitu train get-data`` as a person calls it."""

from pathlib import Path
from typing import Any

import pytest
from cyclopts import App

from insitu.cli.data import get_data
from insitu.data import andrea16


def _run(*words: str) -> None:
    app = App(name="train", result_action="return_value")
    app.command(get_data)
    app(["get-data", *words])


def test_the_directory_and_the_part_reach_the_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def get(directory: Path, sources: Any, report: Any) -> None:
        asked.append((directory, sources))
        report("wordnet: 3 documents")

    monkeypatch.setattr(andrea16, "get", get)
    _run("andrea16", "--out", str(tmp_path), "--sources", "wordnet,prose")
    _run("andrea16", "--out", str(tmp_path))
    assert asked == [(tmp_path, ["wordnet", "prose"]), (tmp_path, None)]
    assert capsys.readouterr().out == "wordnet: 3 documents\n" * 2


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^insitu: andrea16 has no source 'wordnt'; expected wiki-vital, "):
        _run("andrea16", "--out", str(tmp_path), "--sources", "wordnt")
    assert not any(tmp_path.iterdir())
