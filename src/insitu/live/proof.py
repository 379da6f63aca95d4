"""Before the first answer of a server's life: proof that what it reads is what the learner will write.

Two questions that no layout can answer for itself: is every tensor, under its name, the version's bit for bit; and does the
engine really read this memory, or a copy of it? The second is asked by writing one element and listening.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from insitu.live.weights.arena import Arena
from insitu.live.weights.attach import AttachError

LEAST_MOVE = 1e-3  # nats: what one element must change in the log-probability of some token of the probe


def compare(
    views: Mapping[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], aliases: Mapping[str, str]
) -> float:
    """Every view equals the version's tensor of its name, and none is left out. Returns bytes per second.

    Raises AttachError naming the first tensor that differs.
    """
    begun, done = time.perf_counter(), 0
    missing = set(views)
    for name, tensor in tensors:
        view = views.get(aliases.get(name, name))
        if view is None:
            raise AttachError(f"the version's {name!r} is nowhere in the arena")
        if view.shape != tensor.shape or not torch.equal(view, tensor.to(view.dtype)):
            raise AttachError(
                f"{name!r} in the arena is not what the version holds: the layout is wrong, or bytes were changed"
            )
        missing.discard(aliases.get(name, name))
        done += view.numel() * view.element_size()
    if missing:
        raise AttachError(f"the version lacks {min(missing)!r}, which the arena has")
    return done / (time.perf_counter() - begun)


def probe(
    arena: Arena, name: str, score: Callable[[], Sequence[float]], expose: Callable[[], None], hide: Callable[[], None]
) -> float:
    """Change one element of ``name``, see the served log-probabilities move, put it back, see them return. Returns the move.

    ``hide`` and ``expose`` pause and publish; nobody may be answered meanwhile. Raises AttachError.
    """
    version = arena.header.version
    element = arena.views()[name].view(-1)[0]
    kept = element.clone()

    def write(value: torch.Tensor, step: int) -> Sequence[float]:
        hide()
        arena.mark_writing()
        element.copy_(value)
        arena.stamp(version, step)  # a trial: whoever finds it abandoned restores the version
        expose()
        return score()

    before = score()
    changed = write(torch.where(kept < 0, 8 - 8 * kept, -8 - 8 * kept), 1)  # far away, whatever it was
    again = write(kept, 0)
    moved, stayed = _distance(before, changed), _distance(before, again)
    if not moved >= LEAST_MOVE:
        raise AttachError(
            f"one element of {name!r} was changed and the served log-probabilities did not move ({moved:.1e} nats): the "
            "engine reads a private copy of its weights"
        )
    if not stayed < moved / 2:
        raise AttachError(
            f"{name!r} was put back, and the served log-probabilities did not return ({stayed:.1e} nats off)"
        )
    return moved


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference; NaN if any is, which ``max`` would pass over."""
    differences = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return math.nan if any(map(math.isnan, differences)) else max(differences)
