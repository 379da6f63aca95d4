"""Train with gradients that are freed in backward: their memory is one tensor's, not the model's.

python examples/gradient_release.py
"""

import torch
from torch import nn

import insitu
from insitu.optim.schedule import warmup_cosine

STEPS, MICRO_BATCHES = 40, 2


def main() -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 64))
    optimizer = insitu.APOLLOMini(insitu.param_groups(model), lr=1e-2)
    scheduler = warmup_cosine(optimizer, warmup=4, total=STEPS)
    release = insitu.GradientRelease(optimizer)  # the one line that is new

    losses = []
    for _ in range(STEPS):
        for micro_batch in range(MICRO_BATCHES):
            tokens = torch.randint(64, (32,))
            loss = nn.functional.cross_entropy(model(tokens), (3 * tokens + 1) % 64) / MICRO_BATCHES
            if micro_batch < MICRO_BATCHES - 1:
                with release.accumulate():  # gradients are kept and added up
                    loss.backward()
            else:
                loss.backward()  # each weight is updated here, and its gradient freed
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])  # still known
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(MICRO_BATCHES * loss.item())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, last gradient norm {norm:.2f}")
    return losses


if __name__ == "__main__":
    main()
