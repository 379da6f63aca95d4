"""Keep what vLLM reads and what the learner writes the same memory.

After loading, vLLM's CPU backend packs weights into private copies for its kernels and would never look at the arena again.
Packing is switched off where it can be, by an attribute that vLLM has for that purpose; where a kernel insists on a packed
weight it keeps its copy, which is recomputed at every publish. On other devices unquantized weights are plain already.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from vllm import _custom_ops as ops
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding


@dataclass(frozen=True, slots=True)
class Derived:
    """A parameter that holds a packed copy of ``master``, which lies in the arena. (dim, 1, width) of a causal convolution."""

    parameter: torch.nn.Parameter
    master: torch.Tensor

    def refresh(self) -> None:
        plain = self.master.view(self.master.size(0), self.master.size(2))
        self.parameter.data.copy_(ops.causal_conv1d_weight_pack(plain.clone()))


def padded(model: torch.nn.Module) -> set[str]:
    """Parameters whose last rows may lie behind the vocabulary."""
    return {
        f"{name}.{leaf}" if name else leaf
        for name, module in model.named_modules()
        if isinstance(module, VocabParallelEmbedding)
        for leaf, _ in module.named_parameters(recurse=False)
    }


def keep_plain(model: torch.nn.Module) -> None:
    """Before post-processing: no linear layer packs its matrix. Convolutions do: their kernel knows no other layout."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, LinearBase) and weight is not None and weight.ndim == 2:
            module._cpu_skip_gemm_dispatch = True


def restore_plain(model: torch.nn.Module, views: dict[str, torch.Tensor]) -> list[Derived]:
    """After post-processing: embeddings use the plain matrix (vLLM packs them whatever the attribute says); what was packed
    all the same is returned."""
    derived = []
    for module_name, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            module.cpu_linear = F.linear
        if hasattr(module, "_cpu_unpacked_conv_weight"):
            master = views[f"{module_name}.weight"]
            module._cpu_unpacked_conv_weight = master.view(master.size(0), master.size(2))
            derived.append(Derived(module.weight, master))
    return derived


def packed(model: torch.nn.Module) -> str | None:
    """The first matrix that vLLM's kernels read from a private copy, if there is one: its parameter may still be in place."""
    for name, module in model.named_modules():
        if getattr(module, "cpu_linear", F.linear) is not F.linear:
            return f"{name}.weight"
    return None
