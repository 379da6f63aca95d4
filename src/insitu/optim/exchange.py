"""What the parts of sharded tensors tell each other during a step: at most three batched collectives per mesh dimension.

The step of a tensor is a generator. Where a formula needs the whole tensor it yields a request, and is sent the answer; in
the order Work, Scatter, Sum, Gather, each at most once. ``run`` carries the generators of all tensors forward together, so that
each kind of request becomes one collective for all of them. For a tensor that is not sharded the answer is the question.

Sums are float64, so that a sum over parts, rounded to float32, is in all but the rarest cases what one process gets.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from math import ceil
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both, and warns of the names that 2.8 has.
_reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))
_all_gather_single: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))


class Links(NamedTuple):
    """The process groups over which a tensor is sharded, and over what."""

    along: tuple[Any, ...] = ()  # over channels, a stack, or elements without order: only sums cross them
    across: tuple[Any, ...] = ()  # over the projected side: R is a sum over them
    scatter: int = 0  # so many channels of R are then shared out over the first of ``across``; 0: all stay everywhere
    stack: tuple[int, int] | None = None  # (first, whole number): which matrices of a stack are here

    @property
    def summed(self) -> tuple[Any, ...]:
        """The groups over which a sum over the parts of R, G or W goes."""
        return (*self.along, *(self.across[:1] if self.scatter else ()))


class Work(NamedTuple):
    """Something to be done that takes long. The answer is None.

    What a plan does before it comes before the work of any plan, and what it does after it comes after: Python that runs
    between two passes over gradients finds nothing of itself in the cache.
    """

    do: Callable[[], None]


class Scatter(NamedTuple):
    """Add up R and the squared norms |G_j|^2 (b, n) over the projected side. The answer: both, for this process's channels."""

    R: Tensor
    G_sq: Tensor
    channel_dim: int


class Sum(NamedTuple):
    """Add up ``values`` (k, b) float64, b matrices; the first row is the sum of squares of the gradient.

    ``largest`` (b,), if there is one, is maximised instead. The answer is the sums for the matrices here, (k, b), the sums
    over all of the tensor's matrices, (k,), and the maximum.
    """

    values: Tensor
    largest: Tensor | None = None


class Gather(NamedTuple):
    """Add up ``values`` (b,) float64 as Sum does, and collect ``channels`` (b, n) float32 where R's were shared out."""

    values: Tensor
    channels: Tensor | None = None


Request = Work | Scatter | Sum | Gather
Result = TypeVar("Result")
Plan = Generator[Request, Any, Result]
Summed = tuple[Tensor, Tensor, Tensor | None]


def run(
    plans: Sequence[Plan[Result]], links: Sequence[Links], inspect: Callable[[int, Tensor, Tensor], None] | None = None
) -> list[Result]:
    """Carry every plan to its end and return what each returns.

    ``inspect(i, totals)`` sees the sums over the whole of tensor i before any plan goes on: what it raises stops the step
    while nothing has changed.
    """
    results: dict[int, Result] = {}
    waiting: dict[int, Request] = {}

    def advance(i: int, answer: Any) -> None:
        try:
            waiting[i] = plans[i].send(answer)
        except StopIteration as end:
            waiting.pop(i, None)
            results[i] = end.value

    for i in range(len(plans)):
        advance(i, None)
    for kind, exchange in _EXCHANGES:
        asked = {i: request for i, request in waiting.items() if isinstance(request, kind)}
        answers = exchange(list(asked.values()), [links[i] for i in asked])
        if kind is Sum and inspect is not None:
            for i, answer in zip(asked, answers, strict=True):
                inspect(i, answer[0], answer[1])
        for i, answer in zip(asked, answers, strict=True):
            advance(i, answer)
    assert not waiting, "a plan asked in another order than Work, Scatter, Sum, Gather"
    return [results[i] for i in range(len(plans))]


def chunk(length: int, num: int, rank: int) -> tuple[int, int]:
    """(first, count) of the share that one of ``num`` processes has of ``length``: torch.chunk's, as DTensor's Shard has it."""
    size = ceil(length / num)
    first = min(length, size * rank)
    return first, min(size, length - first)


def own_chunk(length: int, group: Any) -> tuple[int, int]:
    """This process's share of ``length`` channels."""
    return chunk(length, dist.get_world_size(group), dist.get_rank(group))


def _groups(links: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Every group once, in an order that is the same on all processes."""
    return list(dict.fromkeys(group for groups in links for group in groups))


def _scatter(requests: list[Scatter], links: list[Links]) -> list[tuple[Tensor, Tensor]]:
    answers = [(request.R, request.G_sq) for request in requests]
    partial = {
        i: torch.cat([R.mT if request.channel_dim == -2 else R, G_sq[:, None]], 1)  # (b, r + 1, n)
        for i, ((R, G_sq), request) in enumerate(zip(answers, requests, strict=True))
        if links[i].across
    }
    for group in _groups(link.across for link in links):
        of_group = [i for i, link in enumerate(links) if group in link.across]
        shared = [i for i in of_group if links[i].scatter and links[i].across[0] is group]
        if shared == of_group:
            partial.update(zip(shared, _reduce_scatter([partial[i] for i in shared], group), strict=True))
            continue
        _all_reduce([partial[i] for i in of_group], group, dist.ReduceOp.SUM)  # one collective for both kinds
        for i in shared:
            partial[i] = partial[i].narrow(-1, *own_chunk(partial[i].shape[-1], group))
    for i, whole in partial.items():
        R, G_sq = whole[:, :-1], whole[:, -1]
        answers[i] = R.mT if requests[i].channel_dim == -2 else R, G_sq
    return answers


def _reduce_scatter(values: list[Tensor], group: Any) -> list[Tensor]:
    """The sum over the group of each (..., n) tensor, of which every process keeps its chunk of the last dimension."""
    world = dist.get_world_size(group)
    sizes = [ceil(value.shape[-1] / world) for value in values]
    padded = [
        torch.nn.functional.pad(value, (0, size * world - value.shape[-1]))
        .view(*value.shape[:-1], world, size)
        .movedim(-2, 0)
        for value, size in zip(values, sizes, strict=True)
    ]
    flat = torch.cat([value.reshape(world, -1) for value in padded], 1)
    out = flat.new_empty(flat.shape[1])
    _reduce_scatter_single(out, flat.view(-1), group=group)
    pieces = torch.split(out, [value[0].numel() for value in padded])
    return [
        piece.view(pad.shape[1:])[..., : own_chunk(value.shape[-1], group)[1]]
        for piece, pad, value in zip(pieces, padded, values, strict=True)
    ]


def _embedded(values: Tensor, link: Links) -> Tensor:
    """(k, b) among the columns of the whole stack, zero elsewhere."""
    if link.stack is None:
        return values
    first, num = link.stack
    whole = values.new_zeros(len(values), num)
    whole[:, first : first + values.shape[1]] = values
    return whole


def _own(values: Tensor, link: Links, num: int) -> Tensor:
    return values if link.stack is None else values[:, link.stack[0] : link.stack[0] + num]


def _sum(requests: list[Sum], links: list[Links]) -> list[Summed]:
    values = [_embedded(request.values, link) for request, link in zip(requests, links, strict=True)]
    largest = [
        None if request.largest is None else _embedded(request.largest[None], link)
        for request, link in zip(requests, links, strict=True)
    ]
    for group in _groups(link.summed for link in links):
        of_group = [i for i, link in enumerate(links) if group in link.summed]
        _all_reduce([values[i] for i in of_group], group, dist.ReduceOp.SUM)
        _all_reduce([x for i in of_group if (x := largest[i]) is not None], group, dist.ReduceOp.MAX)
    return [
        (
            _own(value, link, request.values.shape[1]),
            value.sum(1),
            None if most is None else _own(most, link, request.values.shape[1])[0],
        )
        for value, most, request, link in zip(values, largest, requests, links, strict=True)
    ]


def _all_reduce(values: list[Tensor], group: Any, op: Any) -> None:
    """In place, in one collective."""
    if not values:
        return
    flat = torch.cat([value.reshape(-1) for value in values])
    dist.all_reduce(flat, op=op, group=group)
    for value, piece in zip(values, torch.split(flat, [value.numel() for value in values]), strict=True):
        value.copy_(piece.view(value.shape))


def _gather(requests: list[Gather], links: list[Links]) -> list[tuple[Tensor, Tensor | None]]:
    sums = [_embedded(request.values[None], link) for request, link in zip(requests, links, strict=True)]
    channels = [request.channels for request in requests]
    for group in _groups(link.summed for link in links):
        of_group = [i for i, link in enumerate(links) if group in link.summed]
        shared = [
            (i, mine)
            for i in of_group
            if (mine := channels[i]) is not None and links[i].scatter and links[i].across[0] is group
        ]
        world = dist.get_world_size(group)
        # One message for both: the bits of the sums, then the channels, each padded to the longest chunk.
        bits = [sums[i].reshape(-1).view(torch.float32) for i in of_group]
        padded = [
            torch.nn.functional.pad(mine, (0, ceil(links[i].scatter / world) - mine.shape[-1])) for i, mine in shared
        ]
        message = torch.cat([*bits, *(piece.reshape(-1) for piece in padded)])
        heard = message.new_empty(world, len(message))
        _all_gather_single(heard.view(-1), message, group=group)
        pieces = iter(torch.split(heard, [len(piece) for piece in bits] + [piece.numel() for piece in padded], 1))
        for i in of_group:
            sums[i] = next(pieces).contiguous().view(torch.float64).sum(0).view(sums[i].shape)
        for (i, mine), piece in zip(shared, pieces, strict=True):
            whole = piece.view(world, *mine.shape[:-1], ceil(links[i].scatter / world)).movedim(0, -2).flatten(-2)
            channels[i] = whole[..., : links[i].scatter].contiguous()
    return [
        (_own(value, link, len(request.values))[0], found)
        for value, found, request, link in zip(sums, channels, requests, links, strict=True)
    ]


def _work(requests: list[Work], _: list[Links]) -> list[None]:
    for request in requests:
        request.do()
    return [None] * len(requests)


_EXCHANGES: tuple[tuple[type[Request], Callable[[list[Any], list[Links]], list[Any]]], ...] = (
    (Work, _work),
    (Scatter, _scatter),
    (Sum, _sum),
    (Gather, _gather),
)
