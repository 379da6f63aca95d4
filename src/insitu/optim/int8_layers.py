"""The int8 layers of a model: :func:`quantize` makes them; here is also how their weights are saved and loaded.

In a state dict ``layer.weight`` is three plain tensors, which ``torch.load(weights_only=True)``, safetensors and DCP read:

| name                 | tensor                                                         |
|----------------------|----------------------------------------------------------------|
| layer.weight_int8    | (rows, cols) int8                                              |
| layer.weight_scale   | (rows, groups) bfloat16                                        |
| layer.weight_group   | 0-dim int64: columns that share a scale                        |

There is no ``layer.weight``: a float model must not take the int8 numbers for weights, not even with ``strict=False``. The
other way round, an int8 model takes a float ``layer.weight`` and rounds it to nearest. Under FSDP2 the first two are DTensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from insitu.optim.groups import roles_of
from insitu.optim.int8 import quantize_nearest
from insitu.optim.quantized import VISIBLE, Int8Weight
from insitu.optim.sharding import distributed, is_dtensor, local_of, part_of

_NAMES = ("weight_int8", "weight_scale", "weight_group")


def quantize(
    model: nn.Module, *, group_size: int | None = 128, skip: Sequence[str] = (), head: str | None = None
) -> list[str]:
    """Turn the weights of the linear layers that APOLLO projects into int8, in place: Q-APOLLO.

    Before the optimizer is made and before ``fully_shard``, because the parameters are new ones. Embeddings, the output
    head, frozen weights, and weights that some other module uses too stay as they are. A weight's ``dtype`` stays what it
    was: it is the type of its gradient.

    Args:
        model: any module. Its weights may be float32, bfloat16 or float16.
        group_size: columns of a row that share a scale, None for the whole row. The published recipe has 128: 1 + 2 / 128
            bytes for a weight.
        skip: patterns (``fnmatch``) of parameter names that stay float.
        head: as for :func:`insitu.param_groups`.

    Returns:
        The names of the weights that are int8 now.

    Raises:
        ValueError: a bad group size, a pattern that matches nothing, nothing to quantize, a weight that is sharded already or
            not finite.

    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8))
    >>> quantize(model, group_size=None)
    ['1.weight']
    >>> model[1].weight
    Int8Weight(shape=(8, 4), group_size=4, dtype=torch.float32, device='cpu', requires_grad=True)
    """
    if group_size is not None and (not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1):
        raise ValueError(f"group_size={group_size!r}: expected an integer of at least 1, or None for one scale a row")
    chosen = _choose(model, head)
    names = {id(p): name for name, p in model.named_parameters()}
    unused = [pattern for pattern in skip if not any(fnmatchcase(names[key], pattern) for key in chosen)]
    if unused:
        raise ValueError(f"skip={unused!r} matches no weight that would be quantized: remove or correct it")
    chosen = {
        key: layers for key, layers in chosen.items() if not any(fnmatchcase(names[key], pattern) for pattern in skip)
    }
    if not chosen:
        raise ValueError(
            "no weight to quantize: expected a model with trainable float weights of nn.Linear besides its output head"
        )
    for key, layers in chosen.items():
        _refuse(layers[0].weight, names[key])
    for layers in chosen.values():
        old = layers[0].weight
        q, groups = quantize_nearest(old, group_size)
        new = nn.Parameter(Int8Weight(q, groups.scale, groups.size, old.dtype))
        for layer in layers:
            layer.weight = new
            # Never read: DCP looks for an attribute behind each name of a state dict.
            layer.__dict__.update(dict.fromkeys(_NAMES))
            layer.register_state_dict_post_hook(_save)  # type: ignore[no-untyped-call]
            layer.register_load_state_dict_pre_hook(_load)  # type: ignore[no-untyped-call]
    return [names[key] for key in chosen]


def _choose(model: nn.Module, head: str | None) -> dict[int, list[nn.Linear]]:
    """The weights to quantize, by identity, each with the layers that use it."""
    roles = roles_of(model, head)
    layers: dict[int, list[nn.Linear]] = {}
    others: set[int] = set()
    for module in model.modules():
        # nn.MultiheadAttention reads the weight of its output layer itself.
        plain = isinstance(module, nn.Linear) and not isinstance(
            module, nn.modules.linear.NonDynamicallyQuantizableLinear
        )
        for name, p in module.named_parameters(recurse=False):
            if plain and name == "weight" and p.requires_grad and roles[id(p)] == "matrix":
                layers.setdefault(id(p), []).append(module)  # type: ignore[arg-type]
            else:
                others.add(id(p))
    return {key: found for key, found in layers.items() if key not in others}


def _refuse(weight: Tensor, name: str) -> None:
    if is_dtensor(weight):
        raise ValueError(f"{name} is a DTensor: expected a whole weight; call quantize before fully_shard")
    if isinstance(weight, Int8Weight):
        raise ValueError(f"{name} is int8 already, in groups of {weight.group_size}: quantize a model once")
    if weight.dtype not in VISIBLE:
        raise ValueError(f"{name} is {weight.dtype}: expected {', '.join(map(str, VISIBLE))}")
    if not weight.is_meta and not weight.isfinite().all():
        raise ValueError(f"{name} is not finite: a group with such a weight has no scale; load the weights first")


def _save(layer: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """After a layer's own ``state_dict``: three plain tensors for its weight."""
    weight = state_dict.get(prefix + "weight")
    if weight is None or not isinstance(local := local_of(weight.detach()), Int8Weight):
        return
    del state_dict[prefix + "weight"]
    part = part_of(weight, prefix + "weight")
    shapes = (part.shape, (part.shape[0], local.scale.shape[1]))
    for name, tensor, shape in zip(_NAMES, (local.int_data, local.scale), shapes, strict=False):
        state_dict[prefix + name] = distributed(tensor, shape, part, part.placements)
    state_dict[prefix + _NAMES[2]] = torch.tensor(local.group_size)


def _load(
    layer: nn.Linear,
    state_dict: dict[str, Any],
    prefix: str,
    _: Any,
    strict: bool,
    missing: Any,
    extra: Any,
    errors: Any,
) -> None:
    """Before a layer's own ``load_state_dict``: its weight as the layer has it, from three tensors or from a float one."""
    part = part_of(layer.weight, prefix + "weight")
    mine = local_of(layer.weight.detach())
    if not isinstance(mine, Int8Weight):
        return

    def here(tensor: Tensor) -> Tensor:
        if is_dtensor(tensor):
            return local_of(tensor.redistribute(part.mesh, part.placements))  # type: ignore[attr-defined]
        return tensor if part.mesh is None else tensor[_rows(part.first[0], mine.shape[0])]

    found = {name: state_dict.pop(prefix + name) for name in _NAMES if prefix + name in state_dict}
    whole = state_dict.get(prefix + "weight")
    if found:
        state_dict.pop(prefix + "weight", None)
        problem = _problem(found, part.shape, mine)
        if problem:
            errors.append(f"{prefix}weight: {problem}")
            state_dict[prefix + "weight"] = layer.weight.detach()  # so that it is not reported as missing too
            return
        read = mine.with_data(here(found[_NAMES[0]]), here(found[_NAMES[1]]))
    elif isinstance(whole, Tensor) and whole.is_floating_point() and tuple(whole.shape) == part.shape:
        local = here(whole)
        if isinstance(local, Int8Weight):
            return
        q, groups = quantize_nearest(local, mine.group_size)
        read = mine.with_data(q, groups.scale)
    else:
        return  # torch reports what is missing, or of another shape
    state_dict[prefix + "weight"] = distributed(read, part.shape, part, part.placements)


def _rows(first: int | Tensor, count: int) -> Any:
    return first if isinstance(first, Tensor) else slice(first, first + count)


def _problem(found: dict[str, Tensor], shape: tuple[int, ...], mine: Int8Weight) -> str | None:
    """Why three tensors are not a weight that the layer can take."""
    if len(found) < len(_NAMES):
        return f"has {', '.join(found)}, expected {', '.join(_NAMES)}"
    q, scale, size = (found[name] for name in _NAMES)
    if int(size) != mine.group_size:
        return (
            f"was saved with {int(size)} columns to a scale, and the model has {mine.group_size}: "
            f"use insitu.quantize(model, group_size={int(size)}), or load float weights"
        )
    expected = (shape, (shape[0], mine.scale.shape[1]))
    if (tuple(q.shape), tuple(scale.shape)) != expected or (q.dtype, scale.dtype) != (torch.int8, torch.bfloat16):
        return (
            f"is {tuple(q.shape)} {q.dtype} with scales {tuple(scale.shape)} {scale.dtype}, "
            f"expected {expected[0]} int8 with scales {expected[1]} bfloat16"
        )
    return None
