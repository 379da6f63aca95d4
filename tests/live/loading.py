"""A small checkpoint and an engine that merges, pads and widens it, with loaders in vLLM's style, watched as they load."""

from collections.abc import Callable, Iterable

import torch

from insitu.live.vllm_plugin.recorder import Recorder
from insitu.live.weights.arena import Arena, Slot, plan
from insitu.live.weights.layout import derive

Tensors = Iterable[tuple[str, torch.Tensor]]
Loader = Callable[[dict[str, torch.nn.Parameter], Tensors], None]
BF16, FP32 = torch.bfloat16, torch.float32
ENGINE = [
    ("attn.qkv_proj.weight", BF16, (16, 8)),
    ("mlp.gate_up_proj.weight", BF16, (24, 8)),
    ("mlp.down_proj.weight", BF16, (8, 12)),
    ("embed_tokens.weight", BF16, (12, 8)),
    ("norm.weight", FP32, (8,)),
]
CHECKPOINT = {
    "attn.q_proj.weight": (8, 8),
    "attn.k_proj.weight": (4, 8),
    "attn.v_proj.weight": (4, 8),
    "mlp.gate_proj.weight": (12, 8),
    "mlp.up_proj.weight": (12, 8),
    "mlp.down_proj.weight": (8, 12),
    "embed_tokens.weight": (10, 8),
    "norm.weight": (8,),
}
# Checkpoint name -> engine name, first row: what vLLM's stacked_params_mapping and its weight loaders know.
MERGED = {
    "attn.q_proj.weight": ("attn.qkv_proj.weight", 0),
    "attn.k_proj.weight": ("attn.qkv_proj.weight", 8),
    "attn.v_proj.weight": ("attn.qkv_proj.weight", 12),
    "mlp.gate_proj.weight": ("mlp.gate_up_proj.weight", 0),
    "mlp.up_proj.weight": ("mlp.gate_up_proj.weight", 12),
}


def checkpoint(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw).to(BF16) for name, shape in CHECKPOINT.items()}


def place(parameters: dict[str, torch.nn.Parameter], name: str, rows: int) -> torch.Tensor:
    """The part of a parameter that this tensor belongs to."""
    owner, start = MERGED.get(name, (name, 0))
    return parameters[owner].data.narrow(0, start, rows)


def narrowed(parameters: dict[str, torch.nn.Parameter], tensors: Tensors) -> None:
    """param.narrow(...).copy_(loaded), as most of vLLM's weight loaders do."""
    for name, loaded in tensors:
        place(parameters, name, loaded.shape[0]).copy_(loaded)


class Load:
    """One load of ``checkpoint`` into an engine's arena, watched."""

    def __init__(self, loader: Loader, tensors: Tensors) -> None:
        self.arena = Arena.create(plan(ENGINE))
        self.views = self.arena.views()
        for view in self.views.values():
            view.fill_(torch.nan)
        parameters = {name: torch.nn.Parameter(view, requires_grad=False) for name, view in self.views.items()}
        for name, parameter in parameters.items():
            parameter.data = self.views[name]
        self.recorder = Recorder(self.views)
        with self.recorder, torch.no_grad():
            loader(parameters, self.recorder.watch(tensors))
        self.recorder.forget()
        self.arena.close()  # the descriptor; the memory stays as long as somebody looks into it

    def slots(self) -> list[Slot]:
        return derive(self.recorder.copies, self.recorder.sources, self.arena.slots, padded={"embed_tokens.weight"})

    def found(self) -> dict[str, torch.Tensor]:
        return self.arena.renamed(self.slots()).views()
