"""Tiny random checkpoints of the families that are served with vLLM, small enough to start a server for each."""

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

CONTEXT = 512
# vLLM's CPU attention wants heads of 32 or more; 240 is no multiple of 64, so the vocabulary is padded.
_COMMON = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 240,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HYBRID = {
    "num_hidden_layers": 4,
    "head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-bias-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    # As many key as query heads: q, k and v have one shape, so a mistaken layout would still fit.
    "llama-mha": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 64, "tie_word_embeddings": False}),
    "qwen3.5": ("qwen3_5_text", {**_HYBRID, "tie_word_embeddings": False}),
    "qwen3-moe": (
        "qwen3_moe",
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "decoder_sparse_step": 1,
        },
    ),
}


def make(family: str, directory: Path) -> Path:
    """Write the checkpoint as ``save_pretrained`` does. Same family, same bytes."""
    kind, special = FAMILIES[family]
    config = CONFIG_MAPPING[kind](**{**_COMMON, **special})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape) * 0.1
                parameter.copy_(noise + 0.5 if parameter.dim() == 1 else noise)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
