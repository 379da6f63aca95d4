"""The options of an optimizer, checked by name: what was given, what was expected, and the way out."""

from __future__ import annotations

from math import isfinite
from typing import Any

from torch import Tensor

from insitu.optim.groups import ROLES
from insitu.optim.projection import PROJECTIONS

BACKENDS = ("auto", "reference", "blocked", "native", "fused", "compiled", "triton")
_CHOICES = {
    "projection": PROJECTIONS,
    "granularity": ("auto", "channel", "tensor"),
    "denominator": ("projected", "exact"),
    "dense": ("adamw", "apollo", "sgd"),
    "rounding": ("stochastic", "nearest", "compensated"),
    "moments": ("float32", "bfloat16"),
    "nonfinite": ("error", "skip"),
    "backend": BACKENDS,
}
# What other APOLLO implementations call it, and mean by it.
_FOREIGN = {
    "scale": "elsewhere the update is multiplied by sqrt(scale): give alpha=scale**0.5 (scale=128 is alpha=11.3), or "
    "alpha='auto' for an update as large as AdamW's",
    "scale_type": "use granularity='channel' or 'tensor'",
    "proj": "use projection=",
    "proj_type": "the projected side follows from the shape: always the smaller one",
    "update_proj_gap": "use refresh=",
    "scale_front": "it never had an effect: the limiter compares two norms, and a constant factor cancels",
    "disable_nl": "use limiter=None",
    "correct_bias": "the moments are always bias-corrected",
}


def refuse_unknown(names: dict[str, Any]) -> None:
    """TypeError for the first option in ``names`` that this package does not have."""
    for name, value in names.items():
        way_out = _FOREIGN.get(name)
        raise TypeError(f"unexpected option {name}={value!r}" + (f": {way_out}" if way_out else ""))


def _number(
    name: str, value: Any, low: float, expected: str, *, below: float = float("inf"), open_: bool = False
) -> None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if (
        isinstance(value, bool)
        or not isfinite(number)
        or not (low < number if open_ else low <= number)
        or number >= below
    ):
        raise ValueError(f"{name}={value!r}: expected {expected}")


def _count(name: str, value: Any, way_out: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: expected an integer of at least 1; {way_out}")


def check_common(group: dict[str, Any]) -> None:
    """Raise ValueError for the first bad one of the options that every optimizer here has."""
    lr = group["lr"]
    if not (isinstance(lr, Tensor) and lr.device.type != "cpu"):  # reading it would wait for the device
        _number("lr", lr, 0, "a finite number >= 0; lr=0 keeps the weights still")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr={lr!r}: expected a number, or a tensor of one element")
    _number("eps", group["eps"], 0, "a finite number >= 0, such as 1e-8")
    _number("weight_decay", group["weight_decay"], 0, "a finite number >= 0; 0 turns decay off")
    if not isinstance(group["seed"], int) or isinstance(group["seed"], bool):
        raise ValueError(f"seed={group['seed']!r}: expected an integer")
    if not isinstance(group["maximize"], bool):
        raise ValueError(f"maximize={group['maximize']!r}: expected True or False")
    for name, choices in _CHOICES.items():
        if name in group and group[name] not in choices:
            raise ValueError(f"{name}={group[name]!r}: expected one of {', '.join(map(repr, choices))}")
    role = group.get("role")
    if role is not None and role not in ROLES:
        raise ValueError(f"role={role!r}: expected one of {', '.join(map(repr, ROLES))}, or no role (by dimensions)")


def check_apollo(group: dict[str, Any]) -> None:
    """Raise ValueError for the first bad option of a group of APOLLO (all defaults filled in)."""
    for name in group.keys() & _FOREIGN.keys():
        raise ValueError(f"unexpected option {name}={group[name]!r} in a group: {_FOREIGN[name]}")
    check_common(group)
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas={betas!r}: expected two numbers in [0, 1), such as (0.9, 0.999)")
    for i, beta in enumerate(betas):
        _number(f"betas[{i}]", beta, 0, "a number in [0, 1), such as (0.9, 0.999) for both", below=1)
    _count("rank", group["rank"], "rank=1 with granularity='tensor' is APOLLO-Mini")
    _count("refresh", group["refresh"], "the number of steps between two projections, such as 200")
    if group["alpha"] != "auto":
        _number("alpha", group["alpha"], 0, "a finite number > 0, or 'auto' for sqrt(m / r)", open_=True)
    if not isinstance(group["capturable"], bool):
        raise ValueError(f"capturable={group['capturable']!r}: expected True or False")
    if group["capturable"] and group["projection"] == "svd":
        raise ValueError(
            "projection='svd' with capturable=True: expected a random projection, which the host can renew between replays; "
            "use projection='gaussian', or capturable=False"
        )
    if group["limiter"] is not None:
        _number("limiter", group["limiter"], 1, "a finite number >= 1 such as 1.01, or None to turn it off")


# What other implementations of Ma's Apollo call it, and what belongs to the other method of that name.
_FOREIGN_TO_QUASI_NEWTON = {
    "betas": "there is one average: use beta=",
    "weight_decay_type": "use decay='l2', 'decoupled' or 'stable'",
    "weight_decouple": "use decay='decoupled', or ApolloQNW",
    "warmup_steps": "use warmup=",
    "warmup_init_lr": "use init_lr=",
    "foreach": "there is one way, the same on every device",
    "capturable": "a step takes its number from the host: capture forward and backward, and call step() between replays",
    "rank": "that is another method of the same name, APOLLO (Zhu et al. 2024): use insitu.APOLLO",
}


def refuse_unknown_quasi_newton(names: dict[str, Any], known: dict[str, Any]) -> None:
    """TypeError for the first option in ``names``, none of which ApolloQN has."""
    for name, value in names.items():
        way_out = _FOREIGN_TO_QUASI_NEWTON.get(name, f"expected one of {', '.join(known)}")
        raise TypeError(f"unexpected option {name}={value!r}: {way_out}")


def check_quasi_newton(group: dict[str, Any]) -> None:
    """Raise ValueError for the first bad option of a group of ApolloQN (all defaults filled in)."""
    for name in group.keys() & _FOREIGN_TO_QUASI_NEWTON.keys():
        raise ValueError(f"unexpected option {name}={group[name]!r} in a group: {_FOREIGN_TO_QUASI_NEWTON[name]}")
    check_common(group)
    _number("eps", group["eps"], 0, "a finite number > 0, such as 1e-4: the first step divides by it", open_=True)
    _number("sigma", group["sigma"], 0, "a finite number > 0, such as 0.01", open_=True)
    _number("beta", group["beta"], 0, "a number in [0, 1), such as 0.9", below=1)
    _number("init_lr", group["init_lr"], 0, "a finite number >= 0, such as 1e-5")
    warmup = group["warmup"]
    if not isinstance(warmup, int) or isinstance(warmup, bool) or warmup < 0:
        raise ValueError(
            f"warmup={warmup!r}: expected an integer >= 0, a number of updates such as 500; 0 turns it off"
        )
    for name, choices in (("rebound", ("constant", "belief")), ("decay", ("l2", "decoupled", "stable"))):
        if group[name] not in choices:
            raise ValueError(f"{name}={group[name]!r}: expected one of {', '.join(map(repr, choices))}")
