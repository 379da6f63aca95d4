"""What gradient release cannot do, and how it says so: never a clip that clips nothing, nor a gradient that is lost unseen."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_contract import OPTIMIZERS, OURS, Make, Tied, backward, model, same
from torch import nn

from insitu import APOLLO, GradientRelease
from insitu.optim.released import is_released

RELEASED = (
    r"the gradient of .* was used and freed in backward \(GradientRelease\).*max_grad_norm=0.*release.accumulate\(\)"
)


@pytest.fixture(params=OURS)
def make(request: pytest.FixtureRequest) -> Make:
    return OPTIMIZERS[request.param]


def pair(**options: Any) -> tuple[Tied, torch.optim.Optimizer, GradientRelease]:
    m = model()
    optimizer = OPTIMIZERS["APOLLO"](m.named_parameters(), **options)
    return m, optimizer, GradientRelease(optimizer)


# --- what needs all gradients at once ---


@pytest.mark.parametrize(
    "read",
    [
        lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1.0),
        lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1.0, foreach=False),
        lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1.0, foreach=True),
        lambda m: nn.utils.clip_grad_value_(m.parameters(), 1.0),
        lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1e9),
        lambda m: nn.utils.clip_grad_norm_(m.parameters(), float("inf"), norm_type=1.0),
        lambda m: nn.utils.clip_grads_with_norm_(m.parameters(), 1e9, torch.tensor(1.0)),
        lambda m: m.up.weight.grad.norm(1).item(),
        lambda m: m.up.weight.grad.norm(dim=0),
        lambda m: m.up.weight.grad.mul_(0.5),
        lambda m: m.up.weight.grad.data.clone(),
        lambda m: torch.stack([p.grad.abs().max() for p in m.parameters() if p.grad is not None]),
    ],
    ids=[
        "clip",
        "clip one by one",
        "clip foreach",
        "clip values",
        "clip far above",
        "other norm",
        "clip with norm",
        "norm 1",
        "norms",
        "scale",
        "copy",
        "largest",
    ],
)
def test_whatever_reads_a_released_gradient_is_told_that_it_is_gone(read: Callable[[nn.Module], Any]) -> None:
    m, _, _ = pair()
    backward(m, 0)
    with pytest.raises(ValueError, match=RELEASED):
        read(m)


@pytest.mark.parametrize(
    "measure",
    [
        lambda m: nn.utils.get_total_norm([p.grad for p in m.parameters() if p.grad is not None]),
        lambda m: nn.utils.clip_grad_norm_(m.parameters(), float("inf")),
        lambda m: nn.utils.clip_grad_norm_(m.parameters(), float("inf"), foreach=True),
        lambda m: m.up.weight.grad.norm(),
    ],
    ids=["total", "clip to infinity", "foreach", "one"],
)
def test_the_norm_is_still_known(measure: Callable[[nn.Module], torch.Tensor]) -> None:
    m, _, _ = pair()
    plain = model()
    backward(m, 0)
    backward(plain, 0)
    torch.testing.assert_close(measure(m), measure(plain), rtol=1e-6, atol=0)


def test_gradient_scaling_is_refused() -> None:
    m, optimizer, _ = pair()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(nn.functional.cross_entropy(m(torch.arange(9)), torch.arange(9))).backward()
    with pytest.raises(ValueError, match=RELEASED):
        scaler.step(optimizer)


def test_a_released_gradient_has_no_memory_and_says_what_it_is() -> None:
    m, _, _ = pair()
    backward(m, 0)
    gradient = m.up.weight.grad
    assert gradient is not None
    assert repr(gradient) == "Released('up.weight', (12, 8))"
    assert (gradient.shape, gradient.dtype, gradient.device) == ((12, 8), torch.float32, m.up.weight.device)
    assert gradient.data_ptr() == 0


@pytest.mark.parametrize("between", ["nothing", "zero_grad"])
def test_a_second_backward_before_step_is_refused(between: str) -> None:
    m, optimizer, _ = pair()
    backward(m, 0)
    if between == "zero_grad":
        optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"release\.accumulate\(\)"):
        backward(m, 1)


def test_a_closure_is_refused() -> None:
    m, optimizer, _ = pair()
    untouched = copy.deepcopy(m)
    for arguments in ((lambda: backward(m, 0),), ()):
        named = {} if arguments else {"closure": lambda: backward(m, 0)}
        with pytest.raises(ValueError, match=r"a closure with GradientRelease.*step\(\) without one"):
            optimizer.step(*arguments, **named)
    assert same(m, untouched)


@pytest.mark.parametrize("rate", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_options_that_change_between_backward_and_step_come_too_late(rate: Any) -> None:
    m, optimizer, _ = pair(lr=copy.copy(rate))
    backward(m, 0)
    if isinstance(rate, float):
        optimizer.param_groups[0]["lr"] = 0.25
    else:
        optimizer.param_groups[0]["lr"].mul_(0.5)
    with pytest.raises(
        ValueError, match=r"lr of group 0 changed from 0\.5 to 0\.25 between backward and optimizer\.step"
    ):
        optimizer.step()
    backward(m, 1)
    optimizer.step()  # what comes after is in order


# --- gradients that are not finite ---


def spoil(m: Tied, number: float) -> None:
    """The gradient of ``up.weight``, which comes after that of most, and before that of the table."""
    m.up.weight.register_hook(lambda gradient: gradient.index_put((torch.tensor(0),), torch.tensor(number)))


def test_the_error_comes_in_backward_when_what_came_before_has_been_updated(make: Make) -> None:
    m = model()
    optimizer = make(m.named_parameters())
    GradientRelease(optimizer)
    before = copy.deepcopy(m)
    handle = m.up.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ValueError, match=r"the gradient of up\.weight is not finite.*the tensor was not changed"):
        backward(m, 0)
    assert not torch.equal(m.down.weight, before.down.weight), "down is behind up, so its gradient came first"
    assert torch.equal(m.up.weight, before.up.weight)
    assert torch.equal(m.table.weight, before.table.weight)
    assert not any(is_released(p) for p in m.parameters())
    handle.remove()
    optimizer.zero_grad()
    for step in range(2):  # the next steps are as ever
        backward(m, step)
        optimizer.step()
        optimizer.zero_grad()
    assert int(optimizer.state[m.up.weight]["step"]) == 2
    assert int(optimizer.state[m.down.weight]["step"]) == 3


def test_skip_leaves_out_the_tensor_as_the_plain_step_does(make: Make) -> None:
    models = [model(torch.bfloat16), model(torch.bfloat16)]
    optimizers = [make(m.parameters(), nonfinite="skip") for m in models]
    GradientRelease(optimizers[1])
    for m, optimizer in zip(models, optimizers, strict=True):
        for step in range(5):
            handle = m.up.weight.register_hook(lambda g, step=step: g / (0.0 if step == 2 else 1.0))
            backward(m, step)
            handle.remove()
            optimizer.step()
            optimizer.zero_grad()
        assert int(optimizer.state[m.up.weight]["skipped"]) == 1
        assert int(optimizer.state[m.up.weight]["step"]) == 4
    assert same(*models)


def test_where_reading_waits_for_the_device_the_error_comes_one_step_later(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ("base", "counting"):
        monkeypatch.setattr(f"insitu.optim.{room}.readable", lambda tensor: False)
    m = model()
    optimizer = make(m.named_parameters(), backend="reference")
    GradientRelease(optimizer)
    before = copy.deepcopy(m)
    handle = m.up.weight.register_hook(lambda gradient: gradient * float("nan"))
    backward(m, 0)
    handle.remove()
    optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(m.up.weight, before.up.weight)
    assert not torch.equal(m.table.weight, before.table.weight)
    with pytest.raises(ValueError, match=r"the gradient of up\.weight is not finite"):
        backward(m, 1)


# --- what it is given ---


def test_other_optimizers_are_refused_with_the_way_out() -> None:
    with pytest.raises(TypeError, match=r"optimizer is a AdamW: expected an optimizer of insitu.*wrapper\.optimizer"):
        GradientRelease(torch.optim.AdamW([nn.Parameter(torch.ones(2))]))


def test_two_releases_of_one_optimizer_are_refused() -> None:
    m, optimizer, _ = pair()
    GradientRelease(optimizer)
    with pytest.raises(ValueError, match=r"used by another GradientRelease: expected one; call remove\(\)"):
        backward(m, 0)


def test_a_model_that_is_no_ddp_is_refused() -> None:
    m, optimizer, release = pair()
    release.remove()
    with pytest.raises(TypeError, match="ddp is a Tied: expected the DistributedDataParallel around the model"):
        GradientRelease(optimizer, ddp=m)  # type: ignore[arg-type]


def test_a_bad_option_is_refused_in_backward_before_anything_changes() -> None:
    m, optimizer, _ = pair()
    before = copy.deepcopy(m)
    optimizer.param_groups[0]["refresh"] = 0
    with pytest.raises(ValueError, match="refresh=0"):
        backward(m, 0)
    assert same(m, before)


# --- Hugging Face ---


def trained(path: Path, release: bool, **arguments: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from accelerate.state import GradientState

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    m = transformers.LlamaForCausalLM(config)
    optimizer = APOLLO(m.parameters(), lr=1e-2, rank=4)
    if release:
        GradientRelease(optimizer, last=lambda: GradientState().sync_gradients)
    examples = [
        {"input_ids": [(i + j) % 61 for j in range(8)], "labels": [(i + j) % 61 for j in range(8)]} for i in range(24)
    ]
    settings = transformers.TrainingArguments(
        output_dir=str(path), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=3, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, logging_strategy="no", **arguments,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of others
        transformers.Trainer(model=m, args=settings, train_dataset=examples, optimizers=(optimizer, None)).train()
    return m


def test_the_trainer_accumulates_as_without_release(tmp_path: Path) -> None:
    plain, released = (trained(tmp_path, release, max_grad_norm=0.0) for release in (False, True))
    assert same(plain, released)


def test_the_clipping_of_the_trainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=RELEASED):
        trained(tmp_path, release=True)  # max_grad_norm is 1.0 unless one says otherwise
