"""The passes for CUDA, by the kernels of :mod:`insitu.optim.step.triton_kernels`, with the rounding in the pass that writes.

The tensors of a call are one launch, by a table of their addresses; of several types, or ways to store them, a launch for each.
Nothing here waits for the device. What differs from step to step stands in the tables: in a step that may be captured as part
of a CUDA graph the device itself writes it there, from its own count of the updates.

On a CPU it runs, slowly, in Triton's interpreter: that is how it is tested.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, ItemsView, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
import triton
from torch import Tensor

from insitu.optim.projection import Projection, Sketch
from insitu.optim.rounding import Precision
from insitu.optim.step import Updates, reference
from insitu.optim.step import triton_kernels as kernels
from insitu.optim.step.scratch import Scratch
from insitu.optim.step.triton_tables import READ, corrections, kind_of, random_numbers, stored_as, table_of

Key = TypeVar("Key", bound=Hashable)
Method = TypeVar("Method", bound=Callable[..., Any])
_CHANNELS, _SIDE, _RANK, _FLAT = 32, 64, 64, 1024  # sizes of a program's tile


def _where_they_are(method: Method) -> Method:
    """Launch on the device of the tensors, whichever is the current one; the first argument is some of them."""

    @functools.wraps(method)
    def on_device(self: Triton, some: Any, *others: Any, **options: Any) -> Any:
        device = some.device if isinstance(some, Tensor) else some[0].device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return method(self, some, *others, **options)

    return cast(Method, on_device)


class Triton:
    """The backend for CUDA."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._plain = reference.Reference()
        self.factors, self.limited = self._plain.factors, self._plain.limited

    @_where_they_are
    def measure(self, G: Sequence[Tensor], projections: Sequence[Projection], channel_dim: int, R: Tensor) -> Tensor:
        """As the reference, in one pass over G (one for each 64 ranks of a dense P)."""
        b, rows, cols = G[0].shape
        n, m = (rows, cols) if channel_dim == -2 else (cols, rows)
        first = projections[0]
        rank = first.shape[-2] if isinstance(first, Tensor) else first.rank
        G_sq = torch.zeros(len(R), n, device=G[0].device)
        if G[0].numel() == 0:  # a part of a sharded tensor may be empty
            R.zero_()
            return G_sq
        strides = (rows * cols, cols, 1) if channel_dim == -2 else (rows * cols, 1, cols)
        r_n, r_r = (rank, 1) if channel_dim == -2 else (1, cols)
        G, P = [g.contiguous() for g in G], list(map(_laid_out, projections))
        kinds = [p.ndim if isinstance(p, Tensor) else (len(p.order) // rank,) for p in projections]
        for (dtype, kind), mine in _alike(zip((g.dtype for g in G), kinds, strict=True)):
            table, aligned = table_of(self._scratch, mine, (G, [p for p, _ in P], [p for _, p in P]))
            programs, types = len(mine) * b * triton.cdiv(n, _CHANNELS), {"TYPE": READ[dtype], "ALIGNED": aligned}
            if isinstance(kind, tuple):
                kernels.measure_sketch[(programs,)](
                    table, R, G_sq, b, n, rank, *kind, *strides, r_n, r_r, **types, BN=_CHANNELS, BR=_RANK
                )
            elif rank == 1 and kind == 2:
                kernels.measure_one[(programs,)](table, R, G_sq, b, n, m, *strides, **types, BN=_CHANNELS, BM=_SIDE)
            else:
                p_stack = rank * m if kind == 3 else 0
                kernels.measure_dense[(programs, triton.cdiv(rank, _RANK))](
                    table, R, G_sq, b, n, m, rank, *strides, p_stack, r_n, r_r, **types, BN=_CHANNELS, BM=_SIDE, BR=_RANK
                )  # fmt: skip
        return G_sq

    def norms(self, R: Tensor, side: int) -> Tensor:
        """As the reference."""
        norms: Tensor = torch.linalg.vector_norm(R, dim=side)
        return norms.square_()

    @_where_they_are
    def direct(
        self,
        R: Tensor,
        M: Sequence[Tensor],
        V: Sequence[Tensor],
        live: Tensor,
        side: int,
        *,
        step: Updates,
        betas: tuple[float, float],
        eps: float,
    ) -> Tensor:
        """As the reference, in one pass over R, M and V."""
        R, b = R.contiguous(), len(M[0])
        n, rank = R.shape[-3 - side], R.shape[side]
        r_n, r_r = (rank, 1) if side == -1 else (1, n)
        out = torch.zeros(len(R), n, device=R.device)
        if R.numel() == 0:
            return out
        taken = [all(x.dtype == torch.float32 and x.is_contiguous() for x in each) for each in zip(M, V, strict=True)]
        for take, mine in _alike(taken):
            if not take:
                for t in mine:
                    these = R[t * b : (t + 1) * b], [M[t]], [V[t]], live[t : t + 1]
                    out[t * b : (t + 1) * b] = self._plain.direct(*these, side, step=_of(step, t), betas=betas, eps=eps)
                continue
            table, aligned = table_of(self._scratch, mine, (M, V), corrections(step, betas, mine))
            kernels.direct[(len(mine) * b * triton.cdiv(n, _CHANNELS),)](
                table, R, live.contiguous(), out, b, n, rank, r_n, r_r, *_weights(betas), eps,
                ALIGNED=aligned, BN=_CHANNELS, BR=_RANK,
            )  # fmt: skip
        return out

    def square(self, G: Sequence[Tensor]) -> Tensor:
        """As the reference, without a copy in float32."""
        precise = torch.promote_types(G[0].dtype, torch.float32)
        return torch.stack(torch._foreach_norm(list(G), dtype=precise)).double().square_()

    @_where_they_are
    def apply(
        self,
        W: Sequence[Tensor],
        G: Sequence[Tensor],
        eta_s: Tensor,
        decay: Tensor | None,
        live: Tensor,
        precisions: Sequence[Precision],
    ) -> None:
        """As the reference, in one pass over W and G."""
        b, rows, cols = W[0].shape
        if W[0].numel() == 0:
            return
        per_row, per_col = (int(length > 1) for length in eta_s.shape[1:])
        etas = eta_s[0].numel(), per_row * eta_s.shape[2], per_col
        factors = eta_s.contiguous(), (live if decay is None else decay).contiguous(), live.contiguous()
        G, stored = [g.contiguous() for g in G], list(map(stored_as, W, precisions))
        for kind, mine in _alike(kind_of(g, w) for g, w in zip(G, stored, strict=True)):
            if kind is None:
                for t in mine:
                    these = slice(t * b, (t + 1) * b)
                    its_decay = None if decay is None else decay[these]
                    self._plain.apply([W[t]], [G[t]], eta_s[these], its_decay, live[t : t + 1], [precisions[t]])
                continue
            type_g, (how, type_w, type_residual) = kind
            residuals = [each.residual for each in stored]
            table, aligned = table_of(self._scratch, mine, (W, G, residuals), random_numbers(stored[t] for t in mine))
            kernels.apply[(len(mine) * b * triton.cdiv(rows * cols, _FLAT),)](
                table, *factors, b, rows * cols, cols, *etas, TYPE_W=type_w, TYPE_G=type_g, TYPE_RESIDUAL=type_residual,
                ALIGNED=aligned, DECAY=decay is not None, HOW=how, BLOCK=_FLAT,
            )  # fmt: skip

    @_where_they_are
    def adamw(
        self,
        W: Sequence[Tensor],
        G: Sequence[Tensor],
        M: Sequence[Tensor],
        V: Sequence[Tensor],
        live: Tensor,
        precisions: Sequence[Precision],
        moments: Sequence[tuple[Precision, Precision]],
        *,
        step: Updates,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        maximize: bool,
    ) -> None:
        """As the reference, in one pass."""
        size = W[0].numel()
        if size == 0:
            return
        rate = torch.full_like(live[0], lr) if not isinstance(lr, Tensor) else lr.to(live.device, torch.float32)
        G, hows = [g.contiguous() for g in G], [(how, *of) for how, of in zip(precisions, moments, strict=True)]
        stored = [tuple(map(stored_as, each, how)) for *each, how in zip(W, M, V, hows, strict=True)]
        for kind, mine in _alike(kind_of(g, *each) for g, each in zip(G, stored, strict=True)):
            if kind is None:
                for t in mine:
                    self._plain.adamw(
                        [W[t]], [G[t]], [M[t]], [V[t]], live[t : t + 1], [precisions[t]], [moments[t]],
                        step=_of(step, t), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize,
                    )  # fmt: skip
                continue
            type_g, (how, type_w, type_residual), (how_m, type_m, _), (how_v, type_v, _) = kind
            bits = [column for i in range(3) for column in random_numbers(stored[t][i] for t in mine)]
            residuals = [of_w.residual for of_w, _, _ in stored]
            table, aligned = table_of(
                self._scratch, mine, (W, G, M, V, residuals), [*corrections(step, betas, mine), *bits]
            )
            kernels.adamw[(len(mine) * triton.cdiv(size, _FLAT),)](
                table, live.contiguous(), rate, size, *_weights(betas), eps, weight_decay,
                TYPE_W=type_w, TYPE_G=type_g, TYPE_M=type_m, TYPE_V=type_v, TYPE_RESIDUAL=type_residual, ALIGNED=aligned,
                DECAY=bool(weight_decay), HOW=how, HOW_M=how_m, HOW_V=how_v, SIGN=-1 if maximize else 1, BLOCK=_FLAT,
            )  # fmt: skip


def _alike(kinds: Iterable[Key]) -> ItemsView[Key, list[int]]:
    """Which tensors, by their place in the call, are of each kind."""
    alike: dict[Key, list[int]] = {}
    for t, kind in enumerate(kinds):
        alike.setdefault(kind, []).append(t)
    return alike.items()


def _laid_out(projection: Projection) -> tuple[Tensor, Tensor]:
    """What a kernel reads of it; a dense one is one tensor, twice."""
    if isinstance(projection, Sketch):
        return projection.order, projection.signs
    P = projection.float().contiguous()
    return P, P


def _of(step: Updates, t: int) -> Updates:
    return step[t : t + 1] if isinstance(step, Tensor) else step


def _weights(betas: tuple[float, float]) -> tuple[float, float]:
    return 1 - betas[0], 1 - betas[1]
