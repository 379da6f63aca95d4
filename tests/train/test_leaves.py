"""The leaves as Trainer runs them: AdamW, ramped cosine and clipping, against a float64 oracle of one's own."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monitored import run, tiny_model, varied
from transformers import Trainer, TrainerCallback, TrainingArguments

from insitu.optim.schedule import ramped_cosine

LR, DECAY, CLIP, WARMUP, TOTAL = 3e-3, 0.01, 1.0, 5, 20
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def lesson(step: int, warmup: int, total: int) -> float:
    """The lesson's lr(t) = cosine(t) * min(1, (t + 1) / warmup), t from 0, in its own words."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / total))
    return cosine * min(1.0, (step + 1) / warmup)


# -- the schedule ------------------------------------------------------------------------------------------------------
def rates(scheduler: Any, steps: int) -> list[float]:
    told = []
    for _ in range(steps):
        told.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return told


def test_the_ramped_cosine_is_the_lessons_formula_and_transformers_is_another() -> None:
    from transformers import get_cosine_schedule_with_warmup

    warmup, total = 2000, 200_000
    ours = ramped_cosine(torch.optim.SGD([torch.zeros(1)], lr=3e-4), warmup, total)
    theirs = get_cosine_schedule_with_warmup(torch.optim.SGD([torch.zeros(1)], lr=3e-4), warmup, total)
    told, others = rates(ours, 2010), rates(theirs, 2010)
    assert told == pytest.approx([3e-4 * lesson(step, warmup, total) for step in range(2010)], rel=1e-12)
    assert told[0] == pytest.approx(3e-4 / 2000)
    assert others[0] == 0  # a step that changes nothing
    assert others[1999] == pytest.approx(3e-4 * 1999 / 2000)
    assert told[1999] == pytest.approx(3e-4 * 0.5 * (1 + math.cos(math.pi * 1999 / total)))
    assert told[1999] < others[2000] == 3e-4


def test_the_ramped_cosine_ends_at_its_floor_and_resumes_exactly() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = ramped_cosine(optimizer, 3, 10, floor=0.1)
    told = rates(scheduler, 14)
    assert told[10:] == pytest.approx([0.1] * 4)
    again = ramped_cosine(torch.optim.SGD([torch.zeros(1)], lr=1.0), 3, 10, floor=0.1)
    rates(again, 6)
    third = ramped_cosine(torch.optim.SGD([torch.zeros(1)], lr=1.0), 3, 10, floor=0.1)
    third.load_state_dict(again.state_dict())
    third.optimizer.param_groups[0]["lr"] = again.get_last_lr()[0]
    assert rates(third, 4) == told[6:10]


@pytest.mark.parametrize(
    ("warmup", "total", "floor", "said"),
    [(0, 10, 0.0, "warmup=0"), (10, 10, 0.0, "total=10"), (2, 10, 1.5, r"floor=1\.5"), (2, 10.0, 0.0, r"total=10\.0")],
)
def test_a_bad_schedule_is_refused(warmup: int, total: Any, floor: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ramped_cosine(torch.optim.SGD([torch.zeros(1)], lr=1.0), warmup, total, floor)


# -- all leaves at once, as Trainer runs them --------------------------------------------------------------------------
class Watched(Trainer):  # type: ignore[misc]
    """Notes each step's gradient before Trainer clips it."""

    raw: list[dict[str, np.ndarray]]

    def _clip_grad_norm(self, model: Any) -> Any:
        self.raw.append({name: p.grad.double().numpy().copy() for name, p in model.named_parameters()})
        return super()._clip_grad_norm(model)


def watched(path: Path, model: Any, optim: str) -> Watched:
    arguments = TrainingArguments(
        output_dir=str(path), max_steps=TOTAL, per_device_train_batch_size=4, learning_rate=LR, weight_decay=DECAY, optim=optim,
        adam_beta1=BETA1, adam_beta2=BETA2, adam_epsilon=EPS, max_grad_norm=CLIP, save_strategy="no", logging_steps=1,
        report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    made = Watched(model=model, args=arguments, train_dataset=varied(4 * TOTAL))
    made.raw = []
    made.create_optimizer()
    made.lr_scheduler = ramped_cosine(made.optimizer, WARMUP, TOTAL)  # Trainer makes none of its own then
    return made


def oracle(
    weights: dict[str, np.ndarray], raw: list[dict[str, np.ndarray]], decays: set[str], *, clip_first: bool = True
) -> dict[str, np.ndarray]:
    """p -= lr (m^ / (sqrt(v^) + eps) + wd p), from the gradients as they were before clipping, float64 throughout."""
    p = {name: value.copy() for name, value in weights.items()}
    m = {name: np.zeros_like(value) for name, value in p.items()}
    v = {name: np.zeros_like(value) for name, value in p.items()}
    for t, gradients in enumerate(raw, 1):
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))  # of all tensors together
        factor = min(1.0, CLIP / (norm + 1e-6))
        for name, gradient in gradients.items():
            g = gradient * factor if clip_first else gradient
            m[name] = BETA1 * m[name] + (1 - BETA1) * g
            v[name] = BETA2 * v[name] + (1 - BETA2) * g**2
            m_hat, v_hat = m[name] / (1 - BETA1**t), v[name] / (1 - BETA2**t)
            update = m_hat / (np.sqrt(v_hat) + EPS)
            p[name] = p[name] - LR * lesson(t - 1, WARMUP, TOTAL) * (
                update + (DECAY if name in decays else 0.0) * p[name]
            )
    return p


def apart(first: dict[str, np.ndarray], second: dict[str, np.ndarray], start: dict[str, np.ndarray]) -> float:
    """The largest distance of two end points, in units of how far the tensor went."""
    return max(
        float(np.linalg.norm(first[name] - second[name]) / np.linalg.norm(first[name] - start[name])) for name in first
    )


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_twenty_steps_of_trainer_are_the_formula(tmp_path: Path, optim: str) -> None:
    model = tiny_model(initializer_range=0.3)  # so that gradients are over the norm of 1
    start = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    made = watched(tmp_path, model, optim)
    decays = set(made.get_decay_parameter_names(model))
    run(made)
    end = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    norms = [math.sqrt(sum(float((g**2).sum()) for g in gradients.values())) for gradients in made.raw]
    assert len(norms) == TOTAL
    assert sum(norm > 1.2 * CLIP for norm in norms) > TOTAL // 2  # clipping had work to do, and not the same each time
    assert max(norms) > 1.2 * min(norms)
    assert 0 < len(decays) < len(start)
    assert apart(end, oracle(start, made.raw, decays), start) < 2e-4
    # Each leaf shows: without it the oracle is elsewhere.
    assert apart(end, oracle(start, made.raw, set()), start) > 1e-3
    assert apart(end, oracle(start, made.raw, decays, clip_first=False), start) > 1e-2


def test_the_moments_see_the_clipped_gradient(tmp_path: Path) -> None:
    """After one step m is (1 - beta_1) times the gradient of norm 1, not the raw one."""
    model = tiny_model(initializer_range=0.3)
    made = watched(tmp_path, model, "adamw_torch")
    made.args.max_steps = 1
    run(made)
    moments = [made.optimizer.optimizer.state[p]["exp_avg"] for p in model.parameters()]
    seen = math.sqrt(sum(float(m.double().square().sum()) for m in moments)) / (1 - BETA1)
    raw = math.sqrt(sum(float((g**2).sum()) for g in made.raw[0].values()))
    assert raw > 1.2
    assert seen == pytest.approx(CLIP, rel=1e-4)


def test_clipping_is_global_and_not_of_each_tensor(tmp_path: Path) -> None:
    class After(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.factors: list[float] = []

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
            self.factors = [float(p.grad.norm() / raw) for p, raw in zip(model.parameters(), norms(), strict=True)]

    def norms() -> list[float]:
        return [float(np.linalg.norm(g)) for g in made.raw[-1].values()]

    after = After()
    model = tiny_model(initializer_range=0.3)
    made = watched(tmp_path, model, "adamw_torch")
    made.add_callback(after)
    made.args.max_steps = 1
    run(made)
    assert after.factors[0] < 0.9
    assert after.factors == pytest.approx([after.factors[0]] * len(after.factors), rel=1e-4)
