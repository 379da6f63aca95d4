"""Text from a model in the middle of its training, without a trace: the run after it is bit for bit the run without it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt. ValueError for one that has none: a model needs a token to go on from."""
    found = []
    for prompt in prompts:
        ids: list[int] = tokenizer(prompt)["input_ids"]
        if not ids:
            raise ValueError(f"the prompt {prompt!r} encodes to no token; give one with a word in it")
        found.append(ids)
    return found


def sample(model: Any, prompts: Sequence[Sequence[int]], tokens: int, temperature: float, seed: int) -> list[list[int]]:
    """What ``model`` writes after each of ``prompts`` (token ids): ``tokens`` ids each, drawn at ``temperature``.

    An end-of-text token ends nothing: a model of packed documents goes on with the next one. The same weights and seed give
    the same text. torch's random state, the model's train or eval mode and its generation config stay as they were; it runs
    in whatever precision its forward has. In a sharded model (FSDP2) every rank must call this with the same arguments.
    """
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    # On the left, so that all rows go on at the same column; the mask keeps the padding unseen, whatever token it is.
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    wanted = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
        use_cache=True,
    )
    with _undisturbed(model):
        torch.manual_seed(seed)
        made = model.generate(input_ids=ids, attention_mask=mask, generation_config=wanted)
    rows: list[list[int]] = made[:, width:].tolist()
    return rows


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    from transformers import GenerationConfig

    training = [module for module in model.modules() if module.training]
    own = model.generation_config
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # generate() fills what is not asked for from the model's own config: its end-of-text token, its top_k.
        model.generation_config = GenerationConfig()
        model.eval()
        try:
            yield
        finally:
            model.generation_config = own
            for module in training:
                module.training = True
