"""Build the Transformers model on views of the arena: no parameter of its own, buffers of its own.

Both processes do this, each with its own module and its own config. One module must not serve and train at once: generating
writes ``is_causal=False`` into the shared config and training then loses its causal mask.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from insitu.data.products import widen
from insitu.live.weights.arena import DTYPES, Arena, Slot, plan


class AttachError(ValueError):
    """The weights and the model do not fit each other; the message names the tensor."""


def skeleton(model_dir: Path, dtype: torch.dtype) -> Any:
    """The model of ``model_dir``'s config: parameters on meta, buffers real (rotary frequencies are computed, not loaded)."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # again: on its way to meta every parameter became an object of its own
    return model


def layout(model: Any) -> list[Slot]:
    """One slot for each parameter, tied ones once, under the name of its first appearance."""
    return plan((name, parameter.dtype, parameter.shape) for name, parameter in model.named_parameters())


def tied(model: Any) -> dict[str, str]:
    """Other names of tied parameters -> the name that has the slot."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        kept = first.setdefault(id(parameter), name)
        if kept != name:
            names[name] = kept
    return names


def assign(model: Any, views: Mapping[str, torch.Tensor], *, requires_grad: bool) -> None:
    """Put the views in the place of the model's parameters, and check that every one of them fits. A vector may be
    fp32 in a narrower model: some engines keep a few of them so.

    Raises AttachError naming the first tensor that is missing, left over, or of another shape or dtype.
    """
    aliases = tied(model)
    expected: dict[str, torch.nn.Parameter] = dict(model.named_parameters())
    if left := sorted(views.keys() - expected.keys()):
        raise AttachError(f"the arena holds {left[0]!r}, which {type(model).__name__} has no parameter for")
    made: dict[str, torch.nn.Parameter] = {}
    for name, old in expected.items():
        if name not in views:
            raise AttachError(f"the arena lacks {name!r} of {type(model).__name__}")
        view = views[name]
        wider = view.dim() < 2 and view.dtype == torch.float32
        if view.shape != old.shape or not (view.dtype == old.dtype or wider):
            raise AttachError(f"{name!r}: arena {view.dtype} {list(view.shape)}, model {old.dtype} {list(old.shape)}")
        made[name] = torch.nn.Parameter(view, requires_grad=requires_grad)
    for name in [*expected, *aliases]:
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = made[aliases.get(name, name)]


def build(model_dir: Path, arena: Arena, *, requires_grad: bool) -> Any:
    """The model on the arena. Every parameter is verified to lie in it, and no tensor is left on meta."""
    views = arena.views()
    matrices = {slot.dtype for slot in arena.slots if len(slot.shape) >= 2}
    if len(matrices) != 1:
        raise AttachError(f"the arena mixes {sorted(matrices)}; a Transformers model is built in one dtype")
    model = skeleton(model_dir, DTYPES[matrices.pop()])
    assign(model, views, requires_grad=requires_grad)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not arena.holds(parameter):
            raise AttachError(f"{name!r} does not lie in the arena")
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            raise AttachError(f"buffer {name!r} was left without data")
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(arena.device)
    return widen(model.eval())


def fill(
    views: Mapping[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], aliases: Mapping[str, str]
) -> None:
    """Copy a version's tensors into the arena. Each view is written exactly once; a tied tensor must agree with its owner.

    Raises AttachError naming the tensor; the arena's content is then undefined.
    """
    missing = set(views)
    again: list[tuple[str, torch.Tensor]] = []  # what a checkpoint holds under a tied tensor's other name
    for name, tensor in tensors:
        if not tensor.is_floating_point():
            raise AttachError(f"the checkpoint's {name!r} is {tensor.dtype}: quantized weights cannot be served here")
        if name in aliases:
            again.append((name, tensor))
            continue
        if name not in missing:
            raise AttachError(f"the checkpoint's {name!r} is unknown to the model, or came twice")
        if tensor.shape != views[name].shape:
            raise AttachError(f"{name!r}: checkpoint {list(tensor.shape)}, model {list(views[name].shape)}")
        views[name].copy_(tensor)
        missing.remove(name)
    if missing:
        raise AttachError(f"the checkpoint lacks {min(missing)!r} ({len(missing)} tensors in all)")
    for name, tensor in again:
        owner = views[aliases[name]]
        if not torch.equal(tensor.to(owner.dtype), owner):
            raise AttachError(f"the checkpoint's {name!r} is not its {aliases[name]!r}, to which the model ties it")
