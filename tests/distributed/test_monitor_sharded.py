"""The sample monitor on several processes: a sharded model writes what the whole one does, and all ranks stop together."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from pairs import apollo
from ranks import on_ranks
from test_trainer_fsdp2 import loaded, saved_model, train


class Numbers:
    """A tokenizer whose words are numbers."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(autouse=True)
def _needs_transformers() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")


@on_ranks(2)
def test_a_model_sharded_by_fsdp2_writes_what_the_whole_one_writes(shared_path: Path) -> None:
    from insitu.train.sampling import sample

    path = saved_model(shared_path)
    whole, parts = loaded(path, sharded=False), loaded(path)
    prompts = [[3], [4, 5, 6]]
    assert sample(parts, prompts, 20, 1.0, 0) == sample(whole, prompts, 20, 1.0, 0)


@on_ranks(2)
def test_all_ranks_stop_at_the_step_at_which_rank_0_does(shared_path: Path) -> None:
    """Rank 1 would see nothing amiss: a run that it went on with alone would wait for ever."""
    from insitu.diagnostics.collapse import Score
    from insitu.train import monitor, samples

    watch = monitor.SampleMonitor(
        monitor.MonitorConfig(every=1, tokens=20, prompts=["3", "4 5 6"], patience=2),
        Numbers(),
    )
    points = 1.0 if dist.get_rank() == 0 else 20.0
    model = loaded(saved_model(shared_path))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(monitor, "score", lambda _: Score(points, points, points, points, 20))
        made = (apollo(lr=1e-2)(model), None)
        trainer, losses = train(model, shared_path, 6, optimizers=made, callbacks=[watch])
    assert trainer.state.global_step == len(losses) == 2
    assert watch.stopped
    dist.barrier()
    assert [row["low"] for row in samples.read(shared_path / "out" / samples.NAME)] == [1, 2]
