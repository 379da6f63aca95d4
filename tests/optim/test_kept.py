"""What a step keeps for the next one: it must change no bit, whatever happens in between, and hold no gradient."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from insitu import APOLLO, ApolloQN
from insitu.optim.base import TensorWise

SHAPES = ((24, 24), (24, 24), (40, 24), (24, 40), (24,), (24,))
Change = Callable[[APOLLO, list[nn.Parameter]], None]


def made(**options: Any) -> tuple[APOLLO, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    groups = [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.1}]
    return APOLLO(groups, **{"lr": 1e-2, "rank": 4, "refresh": 3, **options}), params


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(change: Change, keep: bool, steps: int = 6, at: int = 3, **options: Any) -> list[Tensor]:
    """Weights and states after some steps; ``change`` comes once the gradients of one of them are there."""
    optimizer, params = made(**options)
    for step in range(steps):
        give_gradients(params, step)
        if step == at:
            change(optimizer, params)
        if not keep:
            optimizer._kept = None
        optimizer.step()
    states = [x for p in params for x in optimizer.state[p].values() if isinstance(x, Tensor)]
    return [p.detach() for p in params] + states


def exchanged(optimizer: APOLLO, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"][1] = params[1] = nn.Parameter(params[1].detach() + 1)
    params[1].grad = torch.ones_like(params[1])


def another_dict_of_a_group(optimizer: APOLLO, _: list[nn.Parameter]) -> None:
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])
    optimizer.param_groups[0]["lr"] = 0.1


def option(name: str, value: Any) -> Change:
    return lambda optimizer, _: optimizer.param_groups[0].update({name: value})


def moved(optimizer: APOLLO, params: list[nn.Parameter]) -> None:
    old = [p.data for p in params]
    for p in params:
        p.data = p.data.clone()
    for x in old:
        x.fill_(7.0)  # whoever writes there still, or reads, is found out


def turned(_: APOLLO, params: list[nn.Parameter]) -> None:
    params[0].data = params[0].data.t()


def other_state(optimizer: APOLLO, params: list[nn.Parameter]) -> None:
    state = optimizer.state[params[1]]
    old, state["exp_avg"] = state["exp_avg"], state["exp_avg"].clone()
    old.fill_(7.0)


def moved_state(name: str) -> Change:
    def change(optimizer: APOLLO, params: list[nn.Parameter]) -> None:
        value = optimizer.state[params[1]][name]
        # Held, so that whoever writes there still does it unseen.
        params[0].old, value.data = value.data, value.data.clone()  # type: ignore[attr-defined]
        if name != "step":  # with other counts than its neighbours' it would be looked up anyway
            params[0].old.fill_(7)  # type: ignore[attr-defined]

    return change


def exchanged_states(optimizer: APOLLO, params: list[nn.Parameter]) -> None:
    states = list(optimizer.state.values())
    optimizer.state.clear()
    optimizer.state.update(zip([params[1], params[0], *params[2:]], states, strict=True))


def another_dict(optimizer: APOLLO, params: list[nn.Parameter]) -> None:
    optimizer.state[params[2]] = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in optimizer.state[params[2]].items()
    }


def later_count(optimizer: APOLLO, params: list[nn.Parameter]) -> None:
    optimizer.state[params[0]]["step"].add_(5)


def loaded(optimizer: APOLLO, params: list[nn.Parameter]) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def set_gradient(make: Callable[[Tensor], Tensor | None]) -> Change:
    def change(_: APOLLO, params: list[nn.Parameter]) -> None:
        assert params[0].grad is not None
        params[0].grad = make(params[0].grad)

    return change


CHANGES: dict[str, Change] = {
    "nothing": lambda *_: None,
    "lr": option("lr", 0.1),
    "lr as a tensor": option("lr", torch.tensor(0.1)),
    "betas": option("betas", (0.5, 0.9)),
    "lr in another dict": another_dict_of_a_group,
    "rank": option("rank", 6),
    "decay": option("weight_decay", 0.5),
    "alpha": option("alpha", 2.0),
    "granularity": option("granularity", "tensor"),
    "denominator": option("denominator", "exact"),
    "projection": option("projection", "sketch"),
    "refresh": option("refresh", 1),
    "svd": option("projection", "svd"),
    "moments": option("moments", "bfloat16"),
    "limiter": option("limiter", None),
    "other memory": moved,
    "strides": turned,
    "other state": other_state,
    **{
        f"other memory of {name}": moved_state(name)
        for name in ("exp_avg", "exp_avg_sq", "update_norm", "step", "skipped")
    },
    "exchanged states": exchanged_states,
    "another state dict": another_dict,
    "no state": lambda optimizer, params: optimizer.state.pop(params[0]) and None,
    "count": later_count,
    "loaded": loaded,
    "no gradient": set_gradient(lambda _: None),
    "gradient of zeros": set_gradient(torch.zeros_like),
    "gradient that is not finite": set_gradient(lambda g: g * torch.nan),
    "strided gradient": set_gradient(lambda g: g.t().contiguous().t()),
    "another group": lambda optimizer, _: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(9, 9))]}),
    "another parameter": exchanged,
    "fewer parameters": lambda optimizer, _: optimizer.param_groups[0]["params"].pop(),
}


# Beside other memory.
_SAME_NUMBERS = {"strides", "other state", "another state dict", "loaded", "another group", "strided gradient"}


@pytest.mark.parametrize("backend", ["reference", "blocked", "native", "fused"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_kept_changes_no_bit(name: str, backend: str) -> None:
    kept, fresh = (run(CHANGES[name], keep, backend=backend, nonfinite="skip") for keep in (True, False))
    assert len(kept) == len(fresh)
    for one, other in zip(kept, fresh, strict=True):
        assert torch.equal(one, other)
    if name != "nothing":
        unchanged = run(CHANGES["nothing"], True, backend=backend, nonfinite="skip")
        changed = any(not torch.equal(x, y) for x, y in zip(kept, unchanged, strict=False) if x.shape == y.shape)
        assert changed or name.startswith("other memory") or name in _SAME_NUMBERS, "the change must be one"


@pytest.mark.parametrize("options", [{"moments": "bfloat16"}, {"projection": "sketch"}, {"projection": "svd"}], ids=str)
def test_nor_with_other_storage_and_projections(options: dict[str, Any]) -> None:
    for one, other in zip(*(run(CHANGES["nothing"], keep, **options) for keep in (True, False)), strict=True):
        assert torch.equal(one, other)


def test_nothing_is_looked_up_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = made()
    bound: list[int] = []
    turn = TensorWise._turn

    def counted(self: TensorWise, place: Any) -> Any:
        bound.append(place.position)
        return turn(self, place)

    monkeypatch.setattr(TensorWise, "_turn", counted)
    for step in range(4):
        give_gradients(params, step)
        optimizer.step()
    assert bound == list(range(len(params)))


@pytest.mark.parametrize("cls", [APOLLO, ApolloQN])
def test_gradients_are_not_held(cls: type[TensorWise]) -> None:
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = cls(params, **({"rank": 4} if cls is APOLLO else {"warmup": 500}))
    for step in range(3):
        give_gradients(params, step)
        held = [weakref.ref(p.grad) for p in params if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert [ref() for ref in held] == [None] * len(params)


def test_what_is_kept_goes_with_the_optimizer() -> None:
    optimizer, params = made()
    give_gradients(params, 0)
    optimizer.step()
    moment = weakref.ref(optimizer.state[params[0]]["exp_avg"])
    gc.disable()  # no cycle may hold it
    try:
        del optimizer
        assert moment() is None
    finally:
        gc.enable()


def test_a_shape_or_a_type_that_changes_is_refused_all_the_same() -> None:
    for change in (lambda x: x.float(), lambda x: x.view(torch.float16), lambda x: x.view(12, 48)):
        optimizer, params = made()
        for step in range(2):
            for p in params:
                p.grad, p.data = None, p.data.bfloat16()
            give_gradients(params, step)
            optimizer.step()
        params[0].grad = None
        params[0].data = change(params[0].data)
        give_gradients(params, 2)
        with pytest.raises(ValueError, match="when this optimizer first stepped it"):
            optimizer.step()


@pytest.mark.parametrize(
    ("turned", "message"),
    [
        (Tensor.to_sparse, "the gradient of parameter 1 is sparse"),
        (Tensor.int, "the gradient of parameter 1 is torch.int32"),
    ],
    ids=["sparse", "int"],
)
def test_so_is_a_gradient_of_another_kind(turned: Callable[[Tensor], Tensor], message: str) -> None:
    optimizer, params = made()
    for step in range(2):
        give_gradients(params, step)
        optimizer.step()
    params[1].grad_dtype = None  # torch then takes any
    params[1].grad = turned(torch.ones(24, 24))
    with pytest.raises(ValueError, match=message):
        optimizer.step()
