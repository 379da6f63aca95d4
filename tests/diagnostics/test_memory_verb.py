"""``insitu memory`` as it is typed, and the figures that are committed."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cyclopts")
pytest.importorskip("transformers")

from insitu.cli import app
from insitu.diagnostics.memory import OPTIMIZERS, memory
from insitu.diagnostics.skeleton import ModelError, skeleton

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str) -> None:
    """The verb, which ends by returning: what it says goes to the terminal."""
    app(["memory", *words], result_action="return_value")


def test_the_table_names_every_optimizer_and_what_is_not_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run("smollm2", "--rank", "64")
    told = capsys.readouterr().out
    assert all(f" {name} " in told for name in OPTIMIZERS)
    assert "134.5 M parameters, bfloat16, rank 64" in told
    assert "Not counted: activations" in told
    assert "insitu serve (apollo)" in told
    assert "269.0 MB" in told  # the one copy of the weights
    assert "538.1 MB, are mapped files" in told


def test_json_has_every_byte_by_role_and_kind(capsys: pytest.CaptureFixture[str]) -> None:
    run(
        "llama-60m",
        "--optim",
        "adamw",
        "apollo-mini",
        "--dense",
        "apollo",
        "--release",
        "--dtype",
        "float32",
        "--json",
        "-",
    )
    report = json.loads(capsys.readouterr().out)
    assert [row["optimizer"] for row in report["optimizers"]] == ["adamw", "apollo-mini"]
    weights = 4 * report["parameters"]
    adamw, mini = report["optimizers"]
    assert adamw["weights"] == weights
    assert adamw["gradients"] == 32000 * 512 * 4, "released, so the largest"
    assert mini["state"]["dense"]["exp_avg"] == 2 * 32000 * 4
    for row in report["optimizers"]:
        assert row["state_bytes"] == sum(sum(kinds.values()) for kinds in row["state"].values())
        assert row["peak"] == row["weights"] + row["gradients"] + row["state_bytes"] + row["projections"]
    assert report["live"]["undo_images_on_disk"] == 2 * weights
    assert report["options"]["release"] is True


def test_a_directory_is_read_and_a_note_tells_of_a_rank_that_saves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    skeleton("llama-60m").config.save_pretrained(tmp_path / "model")
    run(str(tmp_path / "model"), "--optim", "apollo", "--rank", "500", "--json", str(tmp_path / "out.json"))
    assert "note: rank=500 is more than half" in " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["parameters"] == sum(p.numel() for p in skeleton("llama-60m").parameters())
    assert len(report["notes"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("smollm2", "--optim", "adam"), "--optim 'adam' is unknown; expected one of adamw, "),
        (("smollm2", "--rank", "0"), "rank=0: expected an integer of at least 1"),
        (("./nowhere",), "model './nowhere': its config cannot be had; expected one of smollm2, llama-9m"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert isinstance(ended.value.code, str)
    assert message in ended.value.code
    assert "\n" not in ended.value.code


def test_a_directory_whose_config_is_broken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="its config cannot be had"):
        skeleton(str(tmp_path))


@pytest.mark.filterwarnings("ignore:rank=")  # the papers' ranks are large for some sides
def test_the_committed_figures_are_those_of_today_and_the_guide_shows_them() -> None:
    stored: dict[str, Any] = json.loads((ROOT / "benchmarks/results/memory.json").read_text())["models"]
    for model in ("smollm2", "llama-7b"):
        module = skeleton(model)
        for row in stored[model]["optimizers"]:
            options = {name: row[name] for name in ("dense", "moments") if name in row}
            today = memory(module, row["optimizer"], rank=stored[model]["rank"], **options).as_json()
            assert {key: row[key] for key in today} == today, (model, row["optimizer"])
    (mini,) = [
        row
        for row in stored["llama-7b"]["optimizers"]
        if row["optimizer"] == "apollo-mini" and row.get("dense") == "apollo"
    ]
    assert mini["state_bytes"] < 0.1e9
    guide = (ROOT / "docs/guide/memory.md").read_text()
    for row, first in enumerate(stored["smollm2"]["optimizers"]):
        if first["optimizer"].startswith("q-"):
            continue  # the state is that of the same optimizer on bf16 weights
        figures = [f"{entry['optimizers'][row]['state_bytes'] / 1e9:.3f}" for entry in stored.values()]
        assert f"| {' | '.join(figures)} |" in guide
