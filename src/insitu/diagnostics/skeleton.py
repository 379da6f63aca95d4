"""A model without its weights: the module of a name or a directory on meta tensors, which take no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

# LLaMAs of the papers on low-rank optimizers (Zhu et al. 2024, arXiv 2412.05270, appendix; vocabulary of 32,000, untied):
# hidden size, MLP size, heads, layers. 9M to 35M and 3B are of the configurations that came with GaLore.
LLAMAS = {
    "llama-9m": (128, 352, 4, 4),
    "llama-20m": (256, 688, 4, 4),
    "llama-35m": (384, 1024, 8, 6),
    "llama-60m": (512, 1376, 8, 8),
    "llama-130m": (768, 2048, 12, 12),
    "llama-350m": (1024, 2736, 16, 24),
    "llama-1b": (2048, 5461, 32, 24),
    "llama-3b": (2560, 6848, 32, 32),
    "llama-7b": (4096, 11008, 32, 32),
    "llama-13b": (5120, 13824, 40, 40),
}
# The GPTs of the ANDREA lessons, and a small one: hidden size, heads, layers, vocabulary. All have 1,024 learned positions, an
# MLP of 4 d, no biases, norms without gain and an output head of its own. The nearest class of Transformers is OPT, which
# differs in this: LayerNorm (subtracts the mean) in the place of RMSNorm, and two positions that are never used.
GPTS = {
    "andrea-tiny": (128, 4, 4, 2305),
    "andrea-12m": (384, 12, 6, 2305),
    "andrea-120m": (768, 12, 12, 8449),
    "andrea-480m": (1536, 24, 16, 8449),
}
_SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
NAMES = ("smollm2", *LLAMAS, *GPTS)


class ModelError(ValueError):
    """A model whose shapes cannot be had; the message says why and the way out."""


def skeleton(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The language model called ``name``, on the meta device. Only its config is read, never weights or code.

    Args:
        name: one of ``NAMES``, a directory with a config.json, or a Hub id. What exists as a directory is one.
        dtype: of the parameters.

    Raises:
        ModelError: no such model; one that Transformers cannot build; Transformers is not installed.
    """
    try:
        from transformers import AutoModel, AutoModelForCausalLM
    except ImportError as error:
        raise ModelError("shapes of models come from Transformers: `pip install insitu[hf]`") from error
    config = config_of(name)
    causal = type(config) in AutoModelForCausalLM._model_mapping
    with torch.device("meta"):
        model: nn.Module = (AutoModelForCausalLM if causal else AutoModel).from_config(config, dtype=dtype)
    return model


def config_of(name: str) -> Any:
    """The Transformers config of the model called ``name``, as :func:`skeleton` takes it. Raises ModelError."""
    from transformers import AutoConfig, LlamaConfig, OPTConfig

    if Path(name).expanduser().is_dir():
        return _read(AutoConfig, str(Path(name).expanduser()))
    if name == "smollm2":
        return LlamaConfig(**_SMOLLM2)
    if name in LLAMAS:
        hidden, mlp, heads, layers = LLAMAS[name]
        return LlamaConfig(
            vocab_size=32000,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_attention_heads=heads,
            num_hidden_layers=layers,
            tie_word_embeddings=False,
        )
    if name in GPTS:
        hidden, heads, layers, vocabulary = GPTS[name]
        return OPTConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            word_embed_proj_dim=hidden,
            ffn_dim=4 * hidden,
            num_attention_heads=heads,
            num_hidden_layers=layers,
            max_position_embeddings=1024,
            enable_bias=False,
            layer_norm_elementwise_affine=False,
            dropout=0.0,
            tie_word_embeddings=False,
        )
    return _read(AutoConfig, name)


def _read(auto: Any, name: str) -> Any:
    try:
        return auto.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model {name!r}: its config cannot be had; expected one of {', '.join(NAMES)}, a directory with a config.json, or "
            f"a Hub id that is reachable or in the cache. Transformers said: {reason}"
        ) from error
