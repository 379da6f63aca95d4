"""accelerate with our optimizers: accumulation, clipping, a scheduler, and a resume that is exact."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import insitu
from insitu.optim.schedule import warmup_cosine

accelerate = pytest.importorskip("accelerate")

OPTIMIZERS: dict[str, Any] = {
    "apollo": lambda model: insitu.APOLLO(insitu.param_groups(model), lr=1e-2, rank=2, refresh=3),
    "mini": lambda model: insitu.APOLLOMini(insitu.param_groups(model), lr=1e-2, dense="apollo"),
    "quasi-newton": lambda model: insitu.ApolloQN(model.parameters(), lr=1e-2, warmup=100),
}
KINDS = pytest.mark.parametrize("kind", OPTIMIZERS)
ACCUMULATED, CLIP = 2, 0.05


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> None:
    from accelerate.state import AcceleratorState  # one for the process, with one precision

    AcceleratorState._reset_state(reset_partial_state=True)


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 11))


def data() -> DataLoader[Any]:
    tokens = torch.randint(0, 11, (48, 4), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(tokens, tokens.flip(1)), batch_size=4)


def loss_of(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def prepared(kind: str, **options: Any) -> tuple[Any, ...]:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED, **options)
    model = model_of()
    optimizer = OPTIMIZERS[kind](model)
    scheduler = warmup_cosine(optimizer, warmup=2, total=6)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler, data())


def run(parts: tuple[Any, ...], first: int = 0, save_after: int | None = None, folder: Path | None = None) -> None:
    accelerator, model, optimizer, scheduler, loader = parts
    for i, batch in enumerate(loader):
        if i < first:
            continue
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if i + 1 == save_after:
            accelerator.save_state(str(folder))


@KINDS
def test_a_prepared_loop_is_the_plain_one(kind: str) -> None:
    parts = prepared(kind)
    run(parts)
    model = model_of()
    optimizer = OPTIMIZERS[kind](model)
    scheduler = warmup_cosine(optimizer, warmup=2, total=6)
    batches = list(data())
    for step in range(6):
        for batch in batches[ACCUMULATED * step : ACCUMULATED * (step + 1)]:
            (loss_of(model, batch) / ACCUMULATED).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    for p, q, start in zip(parts[1].parameters(), model.parameters(), model_of().parameters(), strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, start)
    assert parts[2].optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@KINDS
def test_a_saved_state_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    whole = prepared(kind)
    run(whole, save_after=6, folder=tmp_path / "state")
    resumed = prepared(kind)
    with torch.no_grad():
        for p in resumed[1].parameters():
            p.add_(1.0)  # the weights come from the file
    resumed[0].load_state(str(tmp_path / "state"))
    run(resumed, first=6)
    for p, q in zip(whole[1].parameters(), resumed[1].parameters(), strict=True):
        assert torch.equal(p, q)
    for p, q in zip(whole[1].parameters(), resumed[1].parameters(), strict=True):
        a, b = whole[2].optimizer.state[p], resumed[2].optimizer.state[q]
        assert a.keys() == b.keys()
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)
        assert int(a["step"]) == 6


@KINDS
def test_mixed_precision_keeps_float32_weights_and_trains(kind: str) -> None:
    parts = prepared(kind, mixed_precision="bf16")
    run(parts)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in parts[1].parameters())
    assert any(not torch.equal(p, q) for p, q in zip(parts[1].parameters(), model_of().parameters(), strict=True))
