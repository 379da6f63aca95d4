"""Losses on the target tokens of a batch, computed only where there is a target.

A chat example is mostly context: with a vocabulary of 49,152, fp32 logits cost 200 kB a token. So the model's head runs only
on the positions that predict a target, and the log-softmax (fp32, whatever the model's type) only on those rows.

Shapes: B examples, T tokens, N targets of the whole batch in reading order, V vocabulary.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from insitu.data.batch import IGNORE

Batch = Mapping[str, Tensor]


def example_loss(model: Any, batch: Batch, freeze_context: bool = False) -> Tensor:
    """Mean negative log-likelihood per target token of the batch, fp32.

    With ``freeze_context`` the tokens before each example's first target are run without gradient and enter as keys and
    values: the same loss, and a gradient only through the reply. The last context token stays in, because it is where the
    first target is predicted.
    """
    if not freeze_context:
        return F.cross_entropy(target_logits(model, batch), _targets(batch["labels"]))
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        # transformers drops past_key_values there with a log line only: the context would be forgotten.
        raise ValueError("freeze_context=True does not work with gradient checkpointing; turn one of them off")
    total = torch.zeros((), dtype=torch.float32, device=batch["input_ids"].device)
    for row in _rows(batch):
        total = total + F.cross_entropy(_frozen_logits(model, row), _targets(row["labels"]), reduction="sum")
    return total / _targets(batch["labels"]).numel()


@torch.no_grad()
def target_logprobs(model: Any, batch: Batch) -> list[Tensor]:
    """The log-probability of each target token: for each example a 1-D fp32 tensor on the CPU."""
    logprobs = F.log_softmax(target_logits(model, batch), dim=-1)
    chosen = logprobs.gather(-1, _targets(batch["labels"])[:, None])[:, 0].cpu()
    return list(torch.split(chosen, _predicts(batch["labels"]).sum(dim=1).tolist()))


@torch.no_grad()
def target_distributions(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the whole vocabulary at each target, fp32 [N, V], and the targets, int64 [N]."""
    return F.log_softmax(target_logits(model, batch), dim=-1), _targets(batch["labels"])


@torch.no_grad()
def reference_logprobs(model: Any, batch: Batch, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Log-probabilities of the whole vocabulary at each target, [N, V]: what :func:`kl_to_reference` compares with."""
    return F.log_softmax(target_logits(model, batch), dim=-1).to(dtype)


def kl_to_reference(model: Any, batch: Batch, reference_logprobs: Tensor) -> Tensor:
    """Mean KL(reference || model) per target token, in nats, with a gradient to the model."""
    logprobs = F.log_softmax(target_logits(model, batch), dim=-1)
    if reference_logprobs.shape != logprobs.shape:
        raise ValueError(
            f"reference_logprobs has shape {tuple(reference_logprobs.shape)}; expected {tuple(logprobs.shape)} "
            "(targets of the batch x vocabulary): compute it on the same batch"
        )
    # bf16 log-probabilities no longer sum to one; renormalised, the divergence is never negative and is least where the
    # model equals the reference.
    reference = F.log_softmax(reference_logprobs.float(), dim=-1)
    return F.kl_div(logprobs, reference, reduction="sum", log_target=True) / len(logprobs)


def target_logits(model: Any, batch: Batch) -> Tensor:
    """fp32 logits at the positions that predict a target, [N, V]."""
    predicts = _predicts(batch["labels"])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    return _select_logits(model, predicts, **inputs)


def _frozen_logits(model: Any, row: Batch) -> Tensor:
    """:func:`target_logits` of one unpadded example whose context is run without gradient."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    predicts = _predicts(row["labels"])
    context = int(predicts[0].nonzero()[0])
    if context == 0:
        return target_logits(model, row)
    cache = DynamicCache(config=model.config)
    if not all(isinstance(layer, DynamicLayer) and not hasattr(layer, "recurrent_states") for layer in cache.layers):
        # Their state is overwritten in place, which autograd refuses in the backward pass with a message nobody understands.
        raise ValueError(
            "freeze_context=True needs attention in every layer; this model has recurrent ones: leave it off"
        )
    with torch.no_grad():
        model(input_ids=row["input_ids"][:, :context], past_key_values=cache, use_cache=True, **_keep(model, 1))
    return _select_logits(
        model,
        predicts[:, context:],
        input_ids=row["input_ids"][:, context:],
        past_key_values=cache,
        use_cache=True,
    )


def _select_logits(model: Any, predicts: Tensor, **inputs: Any) -> Tensor:
    """Run the model and return its logits at ``predicts`` [B, T], as [N, V].

    The head is reached through ``logits_to_keep`` and not called by hand: some models scale or cap their logits behind it.
    """
    columns = predicts.any(dim=0).nonzero()[:, 0]
    kept = _keep(model, columns)
    logits: Tensor = model(**inputs, **kept).logits
    return logits[predicts[:, columns] if kept else predicts].float()


def _keep(model: Any, positions: int | Tensor) -> dict[str, int | Tensor]:
    accepts = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": positions} if accepts else {}


def _predicts(labels: Tensor) -> Tensor:
    """[B, T], True where the *next* token is a target."""
    return F.pad(labels[:, 1:] != IGNORE, (0, 1), value=False)


def _targets(labels: Tensor) -> Tensor:
    """[N], the target tokens in reading order."""
    shifted = labels[:, 1:]
    return shifted[shifted != IGNORE]


def _rows(batch: Batch) -> list[dict[str, Tensor]]:
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    return [{name: tensor[i : i + 1, :length] for name, tensor in batch.items()} for i, length in enumerate(lengths)]
