"""Precision of products: what is rounded, against oracles of others, and that a run under it is a run."""

import copy
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monitored import run, tiny_model, trainer, varied
from torch import nn

import insitu
from insitu.data import products
from insitu.train import precision
from insitu.train.emulated import DynamicLossScale, LossScale, eighth, emulate, half
from insitu.train.precision import PrecisionConfig

TYPES = ("fp32", "bf16", "fp16", "fp8")


def both_ways(layer: nn.Linear, x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """y and the gradients of x, W and b."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(g)
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    return y.detach(), x.grad, layer.weight.grad, layer.bias.grad


def numbers(scale_of_gradient: float = 1e-3) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(32, 48), torch.randn(2, 5, 32), torch.randn(2, 5, 48) * scale_of_gradient


# -- one layer ---------------------------------------------------------------------------------------------------------
def test_an_emulated_float16_layer_is_numpys_float16_on_both_ways() -> None:
    """float64 products of numbers that numpy has rounded, rounded again: what float16 hardware with exact sums gives."""
    layer, x, g = numbers()
    scale = LossScale(1024.0)
    plain = both_ways(layer, x, g)
    emulate([layer], scale)
    y, to_x, to_W, to_b = both_ways(layer, x, g)

    def f16(a: Any) -> np.ndarray:
        return np.asarray(a, dtype=np.float32).astype(np.float16).astype(np.float64)

    X, W, b = f16(x.numpy()), f16(layer.weight.detach().numpy()), layer.bias.detach().numpy().astype(np.float64)
    G = f16(g.numpy() * 1024.0) / 1024.0
    rows_x, rows_g, sums = X.reshape(-1, 32), G.reshape(-1, 48), g.double().numpy().reshape(-1, 48).sum(0)
    expected = (
        f16(X @ W.T + b),
        f16(G @ W * 1024.0) / 1024.0,
        f16(rows_g.T @ rows_x * 1024.0) / 1024.0,
        f16(sums * 1024.0) / 1024.0,
    )
    for found, wanted, free in zip((y, to_x, to_W, to_b), expected, plain, strict=True):
        # Float32 sums may cross the middle between two neighbours: one place of float16 then.
        np.testing.assert_allclose(found.double().numpy(), wanted, rtol=2**-10, atol=1e-8)
        assert (found.double().numpy() == wanted).mean() > 0.97
        assert not torch.equal(found, free)


def test_an_emulated_float8_layer_is_torchaos() -> None:
    float8 = pytest.importorskip("torchao.float8", reason="needs torchao, whose own emulation is the oracle")
    layer, x, g = numbers()
    theirs = float8.convert_to_float8_training(
        nn.Sequential(copy.deepcopy(layer)), config=float8.Float8LinearConfig(emulate=True)
    )[0]
    plain = both_ways(layer, x, g)
    emulate([layer], None)
    for i, (found, wanted, free) in enumerate(zip(both_ways(layer, x, g), both_ways(theirs, x, g), plain, strict=True)):
        assert torch.equal(found, wanted)
        assert torch.equal(found, free) is (i == 3)  # the gradient of b is no product


def test_float8_products_are_those_of_torchs_own_float8_numbers() -> None:
    """eighth() of a tensor is a float8 tensor times one scale."""
    x = torch.randn(64, 32) * 7
    kept = eighth(x, torch.float8_e4m3fn)
    scale = 448 / x.abs().max()
    assert torch.equal(kept, (x * scale).to(torch.float8_e4m3fn).float() / scale)
    assert len(kept.unique()) < 256 < len(x.unique())
    assert float(kept.abs().max()) == pytest.approx(float(x.abs().max()))
    assert torch.equal(eighth(torch.zeros(3), torch.float8_e4m3fn), torch.zeros(3))
    assert torch.equal(eighth(torch.tensor([1.0, math.inf]), torch.float8_e5m2), torch.tensor([1.0, math.inf]))
    assert torch.equal(eighth(torch.empty(0), torch.float8_e5m2), torch.empty(0))


def test_the_loss_scale_saves_small_gradients_and_nothing_else_changes() -> None:
    tiny = torch.tensor([1e-9, -3e-8, 1e-3])
    assert half(tiny, LossScale(1.0))[0] == 0
    kept = half(tiny, LossScale(2.0**16))
    assert torch.allclose(kept, tiny, rtol=2**-10, atol=0)
    assert torch.equal(half(torch.tensor([1e-3]), LossScale(2.0**10)), half(torch.tensor([1e-3]), LossScale(2.0**4)))
    assert math.isinf(half(torch.tensor([2.0]), LossScale(2.0**16)))


# -- what a model is made into -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "device", "bf16", "fp16"),
    [
        (PrecisionConfig(), "cpu", False, False),
        (PrecisionConfig(compute="bf16"), "cpu", True, False),
        (PrecisionConfig(compute="bf16", weights="bf16"), "cpu", False, False),
        (PrecisionConfig(compute="fp16"), "cuda", False, True),
        (PrecisionConfig(compute="fp16"), "cpu", False, False),
        (PrecisionConfig(compute="fp8"), "cpu", False, False),
    ],
)
def test_what_the_training_arguments_are_told(config: PrecisionConfig, device: str, bf16: bool, fp16: bool) -> None:
    model = tiny_model()
    names = list(model.state_dict())
    assert precision.apply(config, model, device=device) == {"bf16": bf16, "fp16": fp16}
    expected = torch.bfloat16 if config.weights == "bf16" else torch.float32
    assert {p.dtype for p in model.parameters()} == {expected}
    assert list(model.state_dict()) == names
    assert bool(precision.callbacks(config, model)) is (config.compute == "fp16" and device == "cpu")


def test_bf16_weights_are_multiplied_in_float32_where_the_cpu_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "bf16_is_slow", lambda: True)
    for weights, wide in (("fp32", False), ("bf16", True)):
        model = tiny_model()
        precision.apply(PrecisionConfig(compute="bf16", weights=weights), model, device="cpu")
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        assert layers
        assert all(isinstance(layer, products.WideLinear) is wide for layer in layers)


def test_emulation_is_named_in_the_log_and_nothing_else_is(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, logger="insitu.train"):
        for compute in ("fp32", "bf16"):
            precision.apply(PrecisionConfig(compute=compute), tiny_model(), device="cpu")
        assert caplog.text == ""
        precision.apply(PrecisionConfig(compute="fp8"), tiny_model(), device="cpu")
    assert "'fp8' is emulated on a CPU: the numbers of 7 linear layers" in caplog.text  # the head is not among them
    with caplog.at_level(logging.WARNING, logger="insitu.train"):
        precision.apply(PrecisionConfig(compute="fp16"), tiny_model(), device="cpu")
    assert "'fp16' is emulated on a CPU: the numbers of 8 linear layers" in caplog.text


def test_float8_leaves_out_the_head_and_what_its_products_do_not_fit() -> None:
    model = tiny_model()
    model.lm_head.weight.data.mul_(1.001)
    precision.apply(PrecisionConfig(compute="fp8"), model, device="cpu")
    assert "forward" not in vars(model.lm_head)
    assert "forward" in vars(model.model.layers[0].mlp.up_proj)
    model = tiny_model()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features = 17
    with pytest.raises(
        ValueError, match=r"no linear layer, besides its output head, with both sides in multiples of 16"
    ):
        precision.apply(PrecisionConfig(compute="fp8"), model, device="cpu")


def test_int8_weights_are_not_emulated_upon() -> None:
    model = tiny_model()
    precision.apply(PrecisionConfig(compute="fp8"), model, device="cpu")
    insitu.quantize(model)
    with pytest.raises(ValueError, match="are not emulated on int8 weights"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


def test_a_gpu_without_float8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an older one")
    with pytest.raises(ValueError, match=r"an older one, capability 8\.0\) has no float8.*compute in bf16"):
        precision.apply(PrecisionConfig(compute="fp8"), tiny_model(), device="cuda")


def test_on_a_gpu_float8_is_torchaos(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers that it takes over are those that would be emulated."""
    pytest.importorskip("torchao", reason="needs torchao")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    model = tiny_model()
    names = list(model.state_dict())
    assert precision.apply(PrecisionConfig(compute="fp8"), model, device="cuda") == {"bf16": True, "fp16": False}
    kinds = [type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)]
    assert kinds == ["Float8Linear"] * 7 + ["Linear"]
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compute": "fp64"}, r"precision\.compute='fp64'; expected one of 'fp32', 'bf16', 'fp16', 'fp8'"),
        ({"moments": "int8"}, r"precision\.moments='int8'"),
        ({"weights": "fp16"}, r"precision\.weights='fp16'; expected one of 'fp32', 'bf16'$"),
        ({"weights": "bf16"}, r"precision\.weights='bf16' with precision\.compute='fp32'.*give compute='bf16'"),
        (
            {"compute": "bf16", "weights": "bf16", "moments": "fp8"},
            r"precision\.moments='fp8' with precision\.weights='bf16'.*give moments='bf16', or weights='fp32'",
        ),
    ],
)
def test_a_bad_setting_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PrecisionConfig(**change)


# -- a run -------------------------------------------------------------------------------------------------------------
def trained(path: Path, compute: Any, steps: int = 8, **changes: Any) -> tuple[list[float], Any, list[Any]]:
    config = PrecisionConfig(compute=compute)
    model = tiny_model()
    overrides = precision.apply(config, model, device="cpu")
    more = precision.callbacks(config, model)
    resume = changes.pop("resume", {})
    made = trainer(path, varied(8) * 4, more, model, max_steps=steps, **overrides, **changes)
    return run(made, **resume), model, more


def test_the_loss_under_each_type_is_near_float32s_and_not_the_same(tmp_path: Path) -> None:
    losses = {compute: trained(tmp_path, compute)[0] for compute in TYPES}
    assert len({tuple(told) for told in losses.values()}) == 4
    for compute, most in (("bf16", 0.01), ("fp16", 0.002), ("fp8", 0.05)):
        apart = max(abs(a - b) / b for a, b in zip(losses[compute], losses["fp32"], strict=True))
        assert 0 < apart < most, compute
    assert all(told[-1] < told[0] for told in losses.values())


def test_the_saved_weights_are_those_of_the_plain_model(tmp_path: Path) -> None:
    _, model, _ = trained(tmp_path, "fp8", 2)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert "forward" not in vars(again.model.layers[0].mlp.up_proj)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_that_overflows_is_left_out_and_the_scale_halves(tmp_path: Path) -> None:
    """2^40 times any gradient here is beyond float16: the scale comes down until it fits, and until then nothing moves."""
    model = tiny_model()
    precision.apply(PrecisionConfig(compute="fp16"), model, device="cpu")
    (scaling,) = precision.callbacks(PrecisionConfig(compute="fp16"), model)
    assert scaling.value == 2.0**16
    scaling.value = 2.0**40
    start = [p.detach().clone() for p in model.parameters()]
    made = trainer(tmp_path, varied(16), [scaling], model, max_steps=3, weight_decay=0.1)
    run(made)
    assert (scaling.skipped, scaling.value) == (3, 2.0**37)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    run(trainer(tmp_path, varied(16 * 4), [scaling], model, max_steps=40))
    assert 3 < scaling.skipped < 40
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))


def test_the_scale_doubles_after_an_interval_without_overflow(tmp_path: Path) -> None:
    scale = LossScale()
    made = trainer(tmp_path, varied(16), [DynamicLossScale(scale, start=4.0, interval=3)], max_steps=7)
    run(made)
    assert scale.value == 16.0


def test_gradients_that_overflow_at_any_scale_are_an_error(tmp_path: Path) -> None:
    model = tiny_model()
    precision.apply(PrecisionConfig(compute="fp16"), model, device="cpu")
    with torch.no_grad():
        model.lm_head.weight.fill_(1e6)  # float16 has no such weight
    made = trainer(
        tmp_path, varied(16), precision.callbacks(PrecisionConfig(compute="fp16"), model), model, max_steps=40
    )
    with pytest.raises(ValueError, match=r"'fp16': gradients overflow at any loss scale.*compute in bf16"):
        run(made)


def test_an_emulated_run_resumes_exactly_with_its_loss_scale(tmp_path: Path) -> None:
    whole, model, (scaling,) = trained(tmp_path / "whole", "fp16", 8, save_strategy="steps", save_steps=4)
    scale_at_4 = scaling.good
    resume = {"resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-4")}
    rest, again, (scaling_again,) = trained(tmp_path / "again", "fp16", 8, resume=resume)
    assert rest == whole
    assert scaling_again.good == scale_at_4
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
