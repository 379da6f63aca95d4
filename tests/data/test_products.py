"""bf16 linear layers in float32 where the CPU has no bf16: the same layer, rounded once, and nothing else touched."""

import copy

import pytest
import torch
from torch import nn

from insitu.data import products
from insitu.data.products import WideLinear, widen


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "bf16_is_slow", lambda: True)


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.float().bfloat16()


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("shape", [(3, 40), (2, 5, 40), (1, 40)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward_are_those_of_the_layer_rounded_once(shape: tuple[int, ...], bias: bool) -> None:
    layer = widen(nn.Linear(40, 24, bias=bias).bfloat16())
    assert type(layer) is WideLinear
    x = torch.randn(shape).bfloat16().requires_grad_()
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    W, X, G = layer.weight.double(), x.double(), grad.double()
    flat = G.reshape(-1, 24)
    expected = [
        (y, X @ W.T + (layer.bias.double() if bias else 0)),
        (x.grad, G @ W),
        (layer.weight.grad, flat.T @ X.reshape(-1, 40)),
        *([(layer.bias.grad, flat.sum(0))] if bias else []),
    ]
    for found, exact in expected:
        assert found is not None
        assert found.dtype == torch.bfloat16
        # Rounded once: all but what lies at the border of two bf16 numbers is the one next to the exact value.
        assert (found == rounded(exact)).float().mean() > 0.98
        torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=2**-7)


@pytest.mark.usefixtures("slow")
def test_few_rows_without_gradient_are_left_to_torch_and_many_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = widen(nn.Linear(40, 24).bfloat16()), []
    apply = products._Product.apply
    monkeypatch.setattr(products._Product, "apply", lambda *given: (calls.append(1), apply(*given))[1])
    with torch.no_grad():
        layer(torch.randn(2, 40).bfloat16())
        assert calls == []
        layer(torch.randn(2, 9, 40).bfloat16())
    assert calls == [1]


@pytest.mark.usefixtures("slow")
def test_only_bf16_layers_change_and_a_frozen_one_gets_no_gradient() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(
        nn.Linear(4, 4), nn.Linear(4, 4).bfloat16(), Own(4, 4).bfloat16(), nn.Conv1d(4, 4, 1).bfloat16()
    )
    state = copy.deepcopy(model.state_dict())
    widen(model)
    assert [type(module) for module in model] == [nn.Linear, WideLinear, Own, nn.Conv1d]
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    twin = copy.deepcopy(model[1])
    twin.weight.requires_grad_(False)
    x = torch.randn(9, 4).bfloat16().requires_grad_()
    twin(x).sum().backward()
    assert twin.weight.grad is None
    assert x.grad is not None
    assert twin.float()(torch.randn(9, 4)).dtype == torch.float32  # as any layer, once it is no bf16


@pytest.mark.usefixtures("slow")
def test_a_weight_of_another_kind_is_left_alone() -> None:
    class Shard(torch.Tensor):
        pass

    layer = nn.Linear(4, 4).bfloat16()
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Shard))
    assert type(widen(layer)) is nn.Linear


def test_where_bf16_is_fast_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "bf16_is_slow", lambda: False)
    assert type(widen(nn.Linear(4, 4).bfloat16())) is nn.Linear
