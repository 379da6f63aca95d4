"""The mixture under Hugging Face's own Trainer, whose loader draws one batch ahead of the step that is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from packed import byte_tokenizer, config, numbered
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from insitu.data.mixture import Mixture

B, ACCUMULATION, STEPS = 2, 3, 14
S = B * ACCUMULATION


def _mixture() -> Mixture:
    tokens = [numbered(0, 40, 9), numbered(0, 50, 7), numbered(0, 30, 12)]
    options = config("abc", hold=[1, 3], exploration=0.5)
    return Mixture(tokens, options, sequence_length=12, seed=0, sequences_per_step=S)


class _Trainer(Trainer):
    """Trainer with the loss of each step kept, and accelerate's loader over the mixture."""

    losses: list[float]
    drawn: list[list[int]]

    def get_train_dataloader(self) -> Any:
        def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
            return {name: torch.stack([item[name] % 256 for item in items]) for name in ("input_ids", "labels")}

        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=B, collate_fn=collate))

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        loss = super().training_step(*args, **options)
        self.losses.append(float(loss))
        return loss


class _Observer(TrainerCallback):
    def __init__(self, mixture: Mixture) -> None:
        self.mixture, self.trainer, self.told, self.states = mixture, None, {}, {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.told[state.global_step] = sum(self.trainer.losses[-ACCUMULATION:])
        self.mixture.observe(state.global_step, self.told[state.global_step])
        self.states[state.global_step] = (self.mixture._step, self.mixture.state_dict(state.global_step * S))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> _Observer:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(byte_tokenizer()),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=12,
        )
    )
    directory: Path = tmp_path_factory.mktemp("trained")
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=B,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=0.05,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        accelerator_config={"dispatch_batches": False},
    )
    mixture = _mixture()
    observer = _Observer(mixture)
    trainer = _Trainer(model=model, args=arguments, train_dataset=mixture, callbacks=[observer])
    trainer.losses, observer.trainer = [], trainer
    trainer.train()
    return observer


def test_choices_are_those_of_a_loop_that_never_draws_ahead(trained: _Observer) -> None:
    mixture = _mixture()
    iterator = iter(mixture)
    for step in range(1, STEPS + 1):
        for _ in range(S):
            next(iterator)
        mixture.observe(step, trained.told[step])
    choices = [choice for choice in trained.mixture.choices if choice[0] <= STEPS]
    assert choices == mixture.choices
    assert len({source for _, source, _ in choices}) == 3
    assert len(set(trained.told.values())) == STEPS, "the losses are real ones"


def test_the_state_is_that_of_the_step_though_the_next_was_drawn(trained: _Observer) -> None:
    ahead = [step for step, (drawn, _) in trained.states.items() if drawn == step + 1]
    assert ahead, "this Trainer draws ahead, or the test shows nothing"
    for step, (_, state) in trained.states.items():
        assert state["step"] == step
        assert sum(state["positions"]) == step * S
