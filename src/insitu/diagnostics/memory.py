"""What training takes of memory: weights, gradients and optimizer state, in bytes, before anything is allocated.

Works on meta tensors. The state of this package's optimizers is what their own constructors make
(:meth:`insitu.optim.base.TensorWise.initial_state`); that of others is computed, by the formula in the function that bears the
name of the library. Activations, temporaries of a step and the allocator's reserve are not counted: they follow from the batch
and the device, not from the optimizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from insitu.optim import APOLLO, APOLLOMini, ApolloQN, param_groups
from insitu.optim.base import TensorWise
from insitu.optim.projection import CACHE_BYTES, layout, matrix_shape

_BLOCK = 256  # elements that share a scale, in bitsandbytes and torchao
_SMALL = 4096  # neither quantizes the state of a tensor with fewer elements
_TABLE = 256 * 4  # what 8-bit codes mean, float32
INT8_GROUP = 128  # elements that share a scale in int8 weights (Zhu et al. 2024, table 8)


@dataclass
class Memory:
    """Bytes on the device that trains, of one model with one optimizer."""

    optimizer: str
    weights: int
    gradients: int
    state: dict[str, dict[str, int]] = field(default_factory=dict)  # by role of the tensor, then by kind of state
    projections: int = 0  # random projections that are kept between steps; no state

    @property
    def state_bytes(self) -> int:
        return sum(sum(kinds.values()) for kinds in self.state.values())

    @property
    def peak(self) -> int:
        """All of it at once, as at the end of a backward pass."""
        return self.weights + self.gradients + self.state_bytes + self.projections

    def as_json(self) -> dict[str, Any]:
        totals = {"state_bytes": self.state_bytes, "peak": self.peak}
        return {**vars(self), **totals}


State = dict[str, int]  # bytes by kind, of one tensor


def torch_adamw(p: Tensor, role: str, rank: int) -> State:
    """``torch.optim.AdamW`` 2.13: two moments in the parameter's own type, and a float32 count."""
    return {"exp_avg": p.nbytes, "exp_avg_sq": p.nbytes, "step": 4}


def bitsandbytes_adamw8bit(p: Tensor, role: str, rank: int) -> State:
    """``bitsandbytes.optim.AdamW8bit`` 0.50: one byte per element and moment, a float32 scale per 256 of them.

    Hugging Face's Trainer keeps embeddings in 32 bits with it; the optimizer alone does not.
    """
    n = p.numel()
    if n < _SMALL:
        return {"state1": 4 * n, "state2": 4 * n}
    scales = 4 * -(-n // _BLOCK)
    return {"state1": n, "state2": n, "absmax1": scales, "absmax2": scales}


def torchao_adamw8bit(p: Tensor, role: str, rank: int) -> State:
    """``torchao.optim.AdamW8bit`` 0.18: the same, with a table for each, and only where 256 divides the elements."""
    n = p.numel()
    if n < _SMALL or n % _BLOCK:
        return torch_adamw(p, role, rank)
    each = n + 4 * (n // _BLOCK) + _TABLE
    return {"exp_avg": each, "exp_avg_sq": each, "step": 4}


def galore(p: Tensor, role: str, rank: int) -> State:
    """GaLore (Zhao et al. 2024, arXiv 2403.03507, table 1): moments of r n, and the projector of r m, in the gradient's type.

    Matrices only; everything else takes AdamW. As in pytorch-optimizer 4.1.
    """
    if role != "matrix" or p.ndim != 2:
        return {"exp_avg": p.nbytes, "exp_avg_sq": p.nbytes}
    size = layout(p.shape[0], p.shape[1], rank)
    moment = size.rank * size.channels * p.element_size()
    return {"exp_avg": moment, "exp_avg_sq": moment, "projector": size.rank * size.projected * p.element_size()}


PEERS: dict[str, Callable[[Tensor, str, int], State]] = {
    "adamw": torch_adamw,
    "adamw-8bit": bitsandbytes_adamw8bit,
    "adamw-8bit-torchao": torchao_adamw8bit,
    "galore": galore,
}
OURS: dict[str, type[TensorWise]] = {
    "apollo": APOLLO,
    "apollo-mini": APOLLOMini,
    "q-apollo": APOLLO,
    "q-apollo-mini": APOLLOMini,
    "apollo-qn": ApolloQN,
}
OPTIMIZERS = (*PEERS, *OURS)


def memory(model: nn.Module, optimizer: str, *, rank: int = 256, release: bool = False, **options: Any) -> Memory:
    """What training ``model`` with ``optimizer`` takes, whatever device the model is on; nothing is allocated for a meta one.

    Args:
        model: any module; tied tensors count once, frozen ones as weights alone.
        optimizer: one of ``OPTIMIZERS``.
        rank: of the projections.
        release: gradients are freed tensor by tensor during the backward pass, so that only the largest is counted.
        options: of the optimizer, for those of this package, such as ``dense="apollo"``.

    Raises:
        ValueError: an unknown optimizer; a bad option.
        TypeError: an option that the optimizer does not have.

    >>> with torch.device("meta"):
    ...     model = nn.Linear(4096, 11008, bias=False)
    >>> memory(model, "apollo-mini").state["matrix"]["exp_avg"]
    44032
    """
    if optimizer in PEERS:
        if options:
            raise TypeError(
                f"{optimizer} takes no {', '.join(options)}: options are for the optimizers of this package"
            )
        found = of_peer(model, optimizer, rank)
    elif optimizer in OURS:
        kind = OURS[optimizer]
        if kind is APOLLO:
            options["rank"] = rank
        found = of_optimizer(model, kind(param_groups(model), **options), optimizer)
    else:
        raise ValueError(f"optimizer {optimizer!r} is unknown: expected one of {', '.join(OPTIMIZERS)}")
    if optimizer.startswith("q-"):
        found.weights -= sum(p.nbytes - _int8_bytes(p) for p in _linear_weights(model))
    if release:
        found.gradients = max((p.nbytes for p in model.parameters() if p.requires_grad), default=0)
    return found


def of_optimizer(model: nn.Module, optimizer: TensorWise, name: str) -> Memory:
    """Of an optimizer of this package that was made for ``model``, before its first step."""
    state: dict[str, Counter[str]] = {}
    projections = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            of_role = state.setdefault(group.get("role") or "matrix", Counter())
            for kind, value in optimizer.initial_state(p, group).items():
                if isinstance(value, Tensor):
                    of_role[kind] += value.nbytes
            held = _projection_bytes(p, group)
            projections += held if projections + held <= CACHE_BYTES else 0
    return Memory(
        name, _weights(model), _gradients(model), {role: dict(kinds) for role, kinds in state.items()}, projections
    )


def of_peer(model: nn.Module, name: str, rank: int) -> Memory:
    """Of another library's optimizer over every trainable tensor of ``model``."""
    state: dict[str, dict[str, int]] = {}
    for group in param_groups(model):
        kinds: Counter[str] = Counter()
        for p in group["params"]:
            kinds.update(PEERS[name](p, group["role"], rank))
        state[group["role"]] = dict(Counter(state.get(group["role"], {})) + kinds)
    if name == "adamw-8bit" and any("absmax1" in kinds for kinds in state.values()):
        state["shared"] = {"tables": 2 * _TABLE}
    return Memory(name, _weights(model), _gradients(model), state)


def _weights(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def _gradients(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def _linear_weights(model: nn.Module) -> list[Tensor]:
    """Trainable weights of linear layers besides the head: what Q-APOLLO stores in int8."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    matrices = (p for group in param_groups(model) if group["role"] == "matrix" for p in group["params"])
    return [p for p in matrices if id(p) in linear]


def _int8_bytes(p: Tensor) -> int:
    """A byte per element, and a bf16 scale for each group of a row."""
    return p.numel() + p.shape[0] * -(-p.shape[1] // INT8_GROUP) * 2


def _projection_bytes(p: Tensor, group: dict[str, Any]) -> int:
    """Of the random projection of one tensor; none for those that are state, or follow from nothing."""
    projected = group.get("role") in (None, "matrix") or (group["role"] == "dense" and group.get("dense") == "apollo")
    if "projection" not in group or group["projection"] == "svd" or p.ndim < 2 or not projected:
        return 0
    stack, rows, cols = matrix_shape(p.shape, conv=bool(group.get("conv")))
    size = layout(rows, cols, group["rank"], stack)
    if group["projection"] == "sketch":  # int32 places and float32 signs, filled up to a multiple of the rank
        return 8 * size.rank * -(-size.projected // size.rank)
    return 4 * size.rank * size.projected
