"""The same steps on a sharded model and on a whole one, from the same gradients."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from tolerances import LAST_PLACES, SHARDED
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

import insitu
from insitu import APOLLO

Make = Callable[[nn.Module], torch.optim.Optimizer]


class Small(nn.Module):
    """Tensors of every kind, with dimensions that neither 2 nor 4 divide, and some smaller than 4."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(29, 10)
        self.tall = nn.Linear(10, 21)
        self.norm = nn.LayerNorm(21)
        self.wide = nn.Linear(21, 9)
        self.square = nn.Linear(9, 9)
        self.conv = nn.Conv1d(9, 6, 3, padding=1)
        self.up = nn.Parameter(torch.randn(3, 6, 10) / 3)
        self.down = nn.Parameter(torch.randn(3, 10, 6) / 3)
        self.narrow = nn.Linear(6, 3)
        self.head = nn.Linear(3, 29)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.square(self.wide(self.norm(self.tall(self.embedding(tokens))).relu()))
        x = self.conv(x.mT).mT
        x = ((x[None] @ self.up[:, None]).relu() @ self.down[:, None]).sum(0)
        return self.head(self.narrow(x))


def small(dtype: torch.dtype = torch.float32) -> Small:
    torch.manual_seed(7)
    return Small().to(dtype)


def matrices(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> nn.ParameterList:
    """A model that is only tensors of these shapes."""
    return nn.ParameterList([nn.Parameter(some(shape, i).to(dtype)) for i, shape in enumerate(shapes)])


@cache
def mesh(*shape: int) -> DeviceMesh:
    """One mesh of each shape: its groups are made once."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[-len(shape) :])


def some(shape: Sequence[int], *seed: int) -> Tensor:
    """The same random numbers on every process."""
    number = sum(value * 1009**i for i, value in enumerate(seed, 1))
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(number))


def gradient(shape: Sequence[int], index: int, step: int) -> Tensor:
    """Norms that grow and fall, so that the limiter has work; some rows have no gradient in some steps."""
    G = some(shape, index, step) * (1 + step % 3)
    if len(G) > 4:
        G[step % len(G)] = 0
    return G


def tokens(*seed: int) -> Tensor:
    return torch.randint(0, 29, (4, 7), generator=torch.Generator().manual_seed(sum(seed)))


def backward(model: nn.Module, batch: Tensor) -> None:
    model.zero_grad()
    nn.functional.cross_entropy(model(batch).float().flatten(0, 1), batch.roll(1, 1).flatten()).backward()


def shard(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> DTensor:
    """Every process keeps its own part; nothing is sent."""
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def sharded(model: nn.ParameterList, mesh: DeviceMesh, placements: Sequence[Any]) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(shard(p.detach().clone(), mesh, placements)) for p in model])


def apollo(**options: Any) -> Make:
    """APOLLO by the roles of ``param_groups``; ``adamw`` names what is not projected."""
    adamw = options.pop("adamw", ())

    def make(model: nn.Module) -> APOLLO:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # ranks above half the side are meant here
            return APOLLO(
                insitu.param_groups(model, adamw=adamw),
                **{"lr": 1e-2, "rank": 4, "refresh": 3, "weight_decay": 0.01, **options},
            )

    return make


class Pair:
    """A whole and a sharded model, and their optimizers."""

    def __init__(self, whole: nn.Module, parts: nn.Module, make: Make) -> None:
        self.whole, self.parts = whole, parts
        self.start = [p.detach().clone() for p in whole.parameters()]
        self.optimizers = make(whole), make(parts)

    def step(self, step: int, gradient: Callable[[Sequence[int], int, int], Tensor] = gradient) -> None:
        for i, (p, q) in enumerate(zip(self.whole.parameters(), self.parts.parameters(), strict=True)):
            G = gradient(p.shape, i, step).to(p.dtype)
            p.grad = G
            q.grad = shard(G, q.device_mesh, q.placements) if isinstance(q, DTensor) else G.clone()
        for optimizer in self.optimizers:
            optimizer.step()

    def steps(self, num: int = 4, gradient: Callable[[Sequence[int], int, int], Tensor] = gradient) -> "Pair":
        for step in range(num):
            self.step(step, gradient)
        return self

    def assert_equal(self, tolerance: float = SHARDED) -> None:
        """Weights and state of every part are those of the whole; bit for bit if the tolerance is 0."""
        one, other = self.optimizers
        names = [name for name, _ in self.whole.named_parameters()]
        params = zip(names, self.whole.parameters(), self.parts.parameters(), self.start, strict=True)
        for name, p, q, start in params:
            moved = float((p.detach().float() - start.float()).abs().max())
            assert moved > 0, f"{name} stands still"
            assert_part(p.detach(), q.detach(), tolerance * moved, name)
            mine, theirs = one.state[p], other.state[q]
            assert mine.keys() == theirs.keys(), f"{name}: state {list(theirs)} instead of {list(mine)}"
            for key, value in mine.items():
                if isinstance(value, Tensor):
                    assert_part(value, theirs[key], tolerance * float(value.float().abs().max()), f"{key} of {name}")
                else:
                    assert value == theirs[key], f"{key} of {name}"


def assert_part(whole: Tensor, part: Tensor, atol: float, name: str) -> None:
    """``part``, a DTensor or not, is what ``whole`` has here; bit for bit if ``atol`` is 0."""
    assert whole.shape == part.shape, f"{name}: {part.shape} instead of {whole.shape}"
    assert whole.dtype == part.dtype, f"{name}: {part.dtype} instead of {whole.dtype}"
    here = whole
    if isinstance(part, DTensor):
        here, part = shard(whole, part.device_mesh, part.placements).to_local(), part.to_local()
    close = {"rtol": LAST_PLACES if atol else 0, "atol": atol, "msg": lambda text: f"{name}: {text}"}
    torch.testing.assert_close(part.float(), here.float(), **close)
