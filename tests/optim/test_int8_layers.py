"""Int8 weights in a model: which ones, what a layer computes, how they are copied, moved, saved and loaded."""

import copy
import io
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import insitu
from insitu.optim.quantized import Int8Weight


def llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 50, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, tie_word_embeddings=False)).to(dtype)


def layer(rows: int = 9, cols: int = 21, group_size: int | None = 8, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(cols, rows)).to(dtype)
    insitu.quantize(holder, group_size=group_size)
    return holder[0]


def same(one: Tensor, other: Tensor) -> bool:
    assert isinstance(one, Int8Weight)
    assert isinstance(other, Int8Weight)
    return torch.equal(one.int_data, other.int_data) and torch.equal(one.scale, other.scale)


# -- which weights


def test_the_matrices_that_apollo_projects_and_no_others() -> None:
    model = llama()
    names = insitu.quantize(model, group_size=16)
    groups = {group["role"]: group["param_names"] for group in insitu.param_groups(model)}
    assert names == groups["matrix"]
    assert len(names) == 14
    assert {n for n, p in model.named_parameters() if isinstance(p, Int8Weight)} == set(names)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_what_stays_float() -> None:
    model = nn.ModuleDict({
        "a": nn.Linear(4, 4), "tied": nn.Linear(4, 4), "frozen": nn.Linear(4, 4), "conv": nn.Conv1d(4, 4, 1),
        "attention": nn.MultiheadAttention(4, 2), "embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6),
        "shared": nn.Bilinear(4, 4, 4), "skipped": nn.Linear(4, 4), "out": nn.Linear(4, 4),
    })  # fmt: skip
    model["tied"].weight = model["a"].weight
    model["frozen"].weight.requires_grad_(False)
    model["shared"].register_parameter("also", model["out"].weight)
    assert insitu.quantize(model, head="head", skip=["skip*"]) == ["a.weight"]
    assert model["tied"].weight is model["a"].weight
    assert isinstance(model["a"].weight, Int8Weight)


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "row"])
def test_bad_group_sizes(size: Any) -> None:
    with pytest.raises(ValueError, match=rf"group_size={size!r}: expected an integer of at least 1, or None"):
        insitu.quantize(llama(), group_size=size)


def test_what_is_refused_leaves_the_model_as_it_was() -> None:
    with pytest.raises(ValueError, match=r"skip=\['x\*'\] matches no weight"):
        insitu.quantize(llama(), skip=["x*"])
    with pytest.raises(ValueError, match="no weight to quantize"):
        insitu.quantize(nn.LayerNorm(3))
    model = llama()
    insitu.quantize(model)
    with pytest.raises(ValueError, match=r"q_proj\.weight is int8 already, in groups of 24"):
        insitu.quantize(model)
    for spoil, says in ((float("nan"), "is not finite"), (torch.float64, r"torch\.float64: expected torch\.float32")):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].to(spoil) if isinstance(spoil, torch.dtype) else model[1].weight.data.fill_(spoil)
        with pytest.raises(ValueError, match=r"1\.weight.*" + says):
            insitu.quantize(model)
        assert type(model[0].weight) is nn.Parameter


# -- what a layer computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group_size", [1, 8, 21, None])
def test_forward_and_gradients_are_those_of_the_dequantized_weight(
    dtype: torch.dtype, bias: bool, group_size: int | None
) -> None:
    mine = layer(dtype=dtype, group_size=group_size)
    if not bias:
        mine.bias = None
    W = (
        mine.weight.int_data.double() * mine.weight.scale.double().repeat_interleave(mine.weight.group_size, 1)[:, :21]
    ).to(dtype)
    assert torch.equal(mine.weight.dequantize(), W)
    W.requires_grad_()
    b = None if mine.bias is None else mine.bias.detach().clone().requires_grad_()
    x, y = (torch.randn(4, 5, 21).to(dtype).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    out, expected = mine(x), F.linear(y, W, b)
    assert torch.equal(out, expected)
    direction = torch.randn(4, 5, 9).to(dtype)
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(x.grad, y.grad, **near)
    torch.testing.assert_close(mine.weight.grad, W.grad, **near)
    assert type(mine.weight.grad) is Tensor
    assert mine.weight.grad.dtype == dtype
    if b is not None:
        torch.testing.assert_close(mine.bias.grad, b.grad, **near)


def test_autocast_and_activations_of_another_type() -> None:
    mine = layer()
    x = torch.randn(3, 21)
    with torch.autocast("cpu", torch.bfloat16):
        out = mine(x)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, F.linear(x, mine.weight.dequantize(), mine.bias))
    out.sum().backward()
    assert mine.weight.grad.dtype == torch.float32
    mine.bias = None
    assert mine(x.bfloat16()).dtype == torch.bfloat16


def test_a_step_between_forward_and_backward_is_noticed() -> None:
    mine = layer()
    optimizer = insitu.APOLLO([mine.weight], rank=2)
    x = torch.randn(3, 21, requires_grad=True)
    first = mine(x).sum()
    first.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


def test_frozen_later_and_second_use() -> None:
    mine = layer(rows=21)
    x = torch.randn(3, 21, requires_grad=True)
    mine(mine(x)).sum().backward()
    twice = mine.weight.grad.clone()
    W = mine.weight.dequantize().requires_grad_()
    F.linear(F.linear(x, W, mine.bias), W, mine.bias).sum().backward()
    torch.testing.assert_close(twice, W.grad)
    mine.weight.grad = None
    mine.weight.requires_grad_(False)
    mine(x).sum().backward()
    assert mine.weight.grad is None


UNDEFINED = [
    lambda w: w + 1,
    lambda w: w.mul_(2),
    lambda w: torch.randn(3, 21) @ w.T,
    lambda w: torch.cat([w, w]),
    lambda w: w[:, :2],
    lambda w: w.to(torch.float64),
    lambda w: w.to(torch.int8),
    lambda w: F.linear(w, torch.ones(2, 21)),
    lambda w: w.data.copy_(torch.zeros(9, 21)),
    lambda w: w.data.copy_(layer(group_size=7).weight.data),
    lambda w: torch.zeros(9, 21).copy_(w.data),
]


@pytest.mark.parametrize("what", UNDEFINED)
def test_what_is_not_defined_says_so(what: Any) -> None:
    weight = layer().weight
    before = copy.deepcopy(weight)
    with pytest.raises((NotImplementedError, ValueError, TypeError), match="int8"), torch.no_grad():
        what(weight)
    assert same(weight, before)


def test_a_compiled_model_is_the_eager_one() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(21, 50), nn.RMSNorm(50), nn.SiLU(), nn.Linear(50, 21))
    insitu.quantize(model, group_size=16)
    x = torch.randn(6, 21)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = insitu.APOLLO(insitu.param_groups(model), lr=1e-2, rank=4)
    losses = []
    for _ in range(5):  # the weights change under the compiled code
        both = []
        for run in (compiled, model):
            model.zero_grad()
            loss = (run(x) - x).square().mean()
            loss.backward()
            both.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(both[0], both[1], rtol=1e-4, atol=1e-6)
        losses.append(float(both[0][0]))
        optimizer.step()
    assert losses == sorted(losses, reverse=True)


def test_compiled_code_is_cached_by_what_it_depends_on() -> None:
    told = [layer(**how).weight._stable_hash_for_caching() for how in ({}, {}, {"group_size": 10}, {"rows": 10})]
    told.append(layer().bfloat16().weight._stable_hash_for_caching())
    assert told[0] == told[1]
    assert len(set(told)) == 4


# -- copies, types, files


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_another_type_is_that_of_the_gradient_and_no_bit_is_lost(dtype: torch.dtype) -> None:
    mine = layer()
    before = copy.deepcopy(mine.weight)
    mine.to(dtype)
    assert isinstance(mine.weight, nn.Parameter)
    assert mine.weight.dtype == dtype
    assert mine.weight.scale.dtype == torch.bfloat16
    mine(torch.randn(2, 21).to(dtype)).sum().backward()
    assert mine.weight.grad.dtype == dtype
    assert same(mine.float().weight, before)
    assert mine.weight.dtype == torch.float32


def test_deepcopy_meta_and_pickle() -> None:
    mine = layer()
    mine(torch.randn(2, 21)).sum().backward()
    other = copy.deepcopy(mine)
    assert same(other.weight, mine.weight)
    assert other.weight.int_data.data_ptr() != mine.weight.int_data.data_ptr()
    assert torch.equal(other.weight.grad, mine.weight.grad)
    empty = copy.deepcopy(mine).to("meta")
    assert empty.weight.is_meta
    assert empty.weight.int_data.is_meta
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(mine.state_dict())
    assert same(filled.weight, mine.weight)
    for thing, only in ((mine, False), (mine.weight, True)):
        file = io.BytesIO()
        torch.save(thing, file)
        file.seek(0)
        read = torch.load(file, weights_only=only)
        read = read.weight if isinstance(read, nn.Module) else read
        assert same(read, mine.weight)
        assert isinstance(read, nn.Parameter)
        assert read.requires_grad


def through_torch(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("carry", [through_torch, lambda state: load(save(state))], ids=["torch", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_as_plain_tensors_and_loaded_to_the_bit(carry: Any, dtype: torch.dtype) -> None:
    one, other = llama(0, dtype), llama(1, dtype)
    for model in (one, other):
        insitu.quantize(model, group_size=16)
    state = carry(one.state_dict())
    assert all(type(value) is Tensor for value in state.values())
    name = "model.layers.1.mlp.down_proj.weight"
    assert {k: (tuple(v.shape), v.dtype) for k, v in state.items() if k.startswith(name)} == {
        f"{name}_int8": ((24, 50), torch.int8),
        f"{name}_scale": ((24, 4), torch.bfloat16),
        f"{name}_group": ((), torch.int64),
    }
    before = dict(other.named_parameters())
    other.load_state_dict(state)
    for key, p in one.named_parameters():
        q = other.get_parameter(key)
        assert q is before[key]
        assert same(p, q) if isinstance(p, Int8Weight) else torch.equal(p, q)


def test_float_weights_are_rounded_to_nearest_and_int8_never_become_float_ones() -> None:
    plain, model = llama(1), llama(0)
    insitu.quantize(model, group_size=16)
    model.load_state_dict(plain.state_dict())
    reference = copy.deepcopy(plain)
    insitu.quantize(reference, group_size=16)
    for key, p in reference.named_parameters():
        assert same(p, q) if isinstance(q := model.get_parameter(key), Int8Weight) else torch.equal(p, q)
    before = copy.deepcopy(plain.state_dict())
    told = plain.load_state_dict(model.state_dict(), strict=False)
    assert "model.layers.0.mlp.up_proj.weight" in told.missing_keys
    assert "model.layers.0.mlp.up_proj.weight_int8" in told.unexpected_keys
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(plain.state_dict()[key], before[key])
    with pytest.raises(RuntimeError, match=r"Missing key.*up_proj\.weight"):
        plain.load_state_dict(model.state_dict())


def test_another_grouping_and_damaged_states_are_refused_by_name() -> None:
    mine, other = layer(group_size=8), layer(group_size=10)  # 3 groups of 21 columns, both
    assert mine.weight.scale.shape == other.weight.scale.shape
    before = copy.deepcopy(mine.weight)
    with pytest.raises(
        RuntimeError, match=r"weight: was saved with 10 columns to a scale.*has 8.*group_size=10"
    ) as told:
        mine.load_state_dict(other.state_dict())
    assert "Missing" not in str(told.value)
    spoiled: list[tuple[Any, str]] = [
        (lambda s: s.pop("weight_scale"), "has weight_int8, weight_group, expected weight_int8, weight_scale"),
        (lambda s: s.update(weight_int8=s["weight_int8"][:3]), r"is \(3, 21\) torch.int8"),
        (lambda s: s.update(weight_scale=s["weight_scale"].float()), r"torch.float32, expected \(9, 21\) int8"),
    ]
    for spoil, says in spoiled:
        state = mine.state_dict()
        spoil(state)
        with pytest.raises(RuntimeError, match=says):
            mine.load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        mine.load_state_dict({"weight": torch.zeros(3, 3), "bias": mine.bias})
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        mine.load_state_dict({"bias": mine.bias})
    assert same(mine.weight, before)


def test_a_group_wider_than_a_row_is_the_row() -> None:
    mine = layer(group_size=None)
    mine.load_state_dict(layer(group_size=64).state_dict())
    assert mine.weight.group_size == 21
