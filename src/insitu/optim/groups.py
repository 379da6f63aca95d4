"""Which tensors of a model are projected: every trainable tensor in exactly one group.

| role   | tensors                                                  | update                                 |
|--------|----------------------------------------------------------|----------------------------------------|
| matrix | weights of linear and convolution layers, other matrices | projected (APOLLO)                     |
|        | and stacks of matrices, such as experts                  |                                        |
| dense  | embeddings and the output head, tied or not              | as the option ``dense`` says, so AdamW |
| adamw  | vectors, scalars, norms; whatever ``adamw=`` names       | AdamW                                  |
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

ROLES = ("matrix", "dense", "adamw")


class ParamGroups(list[dict[str, Any]]):
    """Parameter groups for an optimizer; ``print`` shows which tensor is in which group."""

    def __str__(self) -> str:
        return "\n".join(line for group in self for line in _describe(group))


def param_groups(
    model: nn.Module,
    *,
    head: str | None = None,
    adamw: Sequence[str] = (),
    weight_decay: float | None = None,
    decays: Collection[str] | None = None,
) -> ParamGroups:
    """Group the trainable parameters of ``model`` by how an optimizer of this package treats them.

    Args:
        model: any module. A tied tensor is counted once and follows ``dense`` if any of its uses does.
        head: name of the output head; by default what ``get_output_embeddings()`` of the model or a module in it
            returns, else its last linear layer if that is as wide as an embedding's vocabulary. ``print`` the groups to see.
        adamw: patterns (``fnmatch``) of parameter names that keep AdamW whatever they are.
        weight_decay: decay of the groups "matrix" and "dense"; vectors and scalars then get 0. By default the
            optimizer's own value counts everywhere.
        decays: names of the parameters that get ``weight_decay``, in place of that rule; the others get 0. Where a role
            has both, it is two groups.

    Returns:
        A list of dicts with ``params``, ``param_names``, ``role``. ``print`` it to see the grouping.

    Raises:
        ValueError: a pattern that matches nothing, a head that is not there, ``decays`` without ``weight_decay``.

    >>> groups = param_groups(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8)))
    >>> print(groups)
    matrix   1 tensor      32 elements
               1.weight  (8, 4)
    dense    1 tensor      40 elements
               0.weight  (10, 4)
    adamw    1 tensor       8 elements
               1.bias  (8,)
    """
    if decays is not None and weight_decay is None:
        raise ValueError(f"decays names {len(decays)} parameters but no weight_decay: give both, or neither")
    roles = roles_of(model, head)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    unused = set(adamw)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = roles[id(parameter)]
        hits = {pattern for pattern in adamw if fnmatchcase(name, pattern)}
        unused -= hits
        if hits:
            role = "adamw"
        decaying = role != "adamw" if decays is None else name in decays
        group = groups.setdefault((role, decaying), {"params": [], "param_names": [], "role": role})
        group["params"].append(parameter)
        group["param_names"].append(name)
    if unused:
        raise ValueError(f"adamw={sorted(unused)!r} matches no trainable parameter of the model; remove or correct it")
    for (role, decaying), group in groups.items():
        if role == "conv":
            group.update(role="matrix", conv=True)
        if weight_decay is not None:
            group["weight_decay"] = weight_decay if decaying else 0.0
    order = ((role, decaying) for role in ("matrix", "conv", "dense", "adamw") for decaying in (True, False))
    return ParamGroups(groups[key] for key in order if key in groups)


def roles_of(model: nn.Module, head: str | None) -> dict[int, str]:
    """The role of every parameter, by identity; "conv" is "matrix" read as first dimension x rest."""
    heads = {id(module) for module in _heads(model, head)}
    roles: dict[int, str] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim < 2 or isinstance(module, nn.LayerNorm | nn.RMSNorm):
                role = "adamw"
            elif isinstance(module, nn.Embedding | nn.EmbeddingBag) or id(module) in heads:
                role = "dense"
            elif isinstance(module, nn.modules.conv._ConvNd):
                role = "conv"
            else:
                role = "matrix"
            if roles.get(id(parameter)) != "dense":
                roles[id(parameter)] = role
    return roles


def _heads(model: nn.Module, head: str | None) -> list[nn.Module]:
    """The modules that map hidden states to the vocabulary."""
    if head is not None:
        modules = dict(model.named_modules())
        if head not in modules:
            raise ValueError(
                f"head={head!r} is no module of the model; give the name of its output layer, such as 'lm_head'"
            )
        return [modules[head]]
    for module in model.modules():  # a wrapper such as DDP does not pass the question on
        ask = getattr(module, "get_output_embeddings", None)
        found = ask() if callable(ask) else None
        if isinstance(found, nn.Module):
            return [found]
    # Only the last layer: where the width equals a number of positions, every layer may be that wide.
    vocabularies = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return [m for m in linear[-1:] if m.out_features in vocabularies]


def _describe(group: dict[str, Any]) -> Iterator[str]:
    """A heading, then one line for each family of names: layers that differ only in their number share a line."""
    num = len(group["params"])
    elements = sum(p.numel() for p in group["params"])
    plural = "tensor " if num == 1 else "tensors"
    yield f"{group['role']:<7}{num:>3} {plural} {elements:>6} elements"
    families = Counter(
        (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), tuple(p.shape))
        for name, p in zip(group["param_names"], group["params"], strict=True)
    )
    for (name, shape), times in families.items():
        yield f"           {name}  {shape}" + (f"  x {times}" if times > 1 else "")
