"""The main job on the real model: what `insitu demo` does, judged as it judges itself."""

from pathlib import Path

import pytest

from insitu import demo
from insitu.live.packaged import cached_smollm2


@pytest.mark.real
@pytest.mark.timeout(900)
def test_eight_examples_are_learned_kept_apart_and_undone(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = cached_smollm2()
    if base is None:
        pytest.skip("needs SmolLM2-135M in the cache: make model")
    behaviour = demo.SPEC["behaviours"][0]
    state_dir = tmp_path / "state"
    state_dir.mkdir(mode=0o700)
    with demo.served("smollm2", state_dir) as client:
        result = demo.measure(client, behaviour, AutoTokenizer.from_pretrained(base), lambda _: None)
    assert demo.verdict(result) == dict.fromkeys(demo.verdict(result), True), result
    memory = result["bytes"]
    # One copy: what both processes see of the arena is, shared fairly, the weights once.
    assert memory["arena_rss"] == pytest.approx(2 * memory["weights"], rel=0.02)
    assert memory["arena_pss"] == pytest.approx(memory["weights"], rel=0.02)
    assert memory["arena_private_dirty"] == 0
    # AdamW holds 8 bytes a parameter in fp32, four times these bf16 weights.
    assert memory["optimizer"] < 4 * memory["weights"] / 7
    report = result["version"]["report"]
    assert report["gap"] <= report["gap_before"] + 0.1
    assert report["gap_before"] < 0.1  # both run the same kernels


def test_the_behaviours_are_what_the_targets_speak_of() -> None:
    assert [b["name"] for b in demo.SPEC["behaviours"]] == ["fact", "format", "way"]
    for behaviour in demo.SPEC["behaviours"]:
        taught = [e["messages"][0]["content"] for e in behaviour["examples"]]
        assert len(taught) == len(behaviour["held_out"]) == 8
        assert not set(taught) & set(behaviour["held_out"])
    assert len(demo.SPEC["unrelated"]) == 12


def test_no_prompt_that_judges_takes_part_in_training() -> None:
    from insitu.live import prompts

    judged = {u["prompt"] for u in demo.SPEC["unrelated"]} | {p for b in demo.SPEC["behaviours"] for p in b["held_out"]}
    assert not judged & {*prompts.ANCHORS, *prompts.CANARIES}
    assert not {*prompts.ANCHORS} & {*prompts.CANARIES}
