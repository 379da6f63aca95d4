"""Which tensors are projected, and what is refused, by name."""

from typing import Any

import pytest
import torch
from torch import nn

import insitu
from insitu import APOLLO, APOLLOMini


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layer = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 4, 3)
        self.head = nn.Linear(8, 20, bias=False)
        if tie:
            self.head.weight = self.embed.weight


def roles(model: nn.Module, **options: Any) -> dict[str, str]:
    return {name: group["role"] for group in insitu.param_groups(model, **options) for name in group["param_names"]}


@pytest.mark.parametrize("tie", [True, False])
def test_every_trainable_tensor_is_in_exactly_one_group(tie: bool) -> None:
    model = Tied(tie)
    model.layer.bias.requires_grad_(False)
    groups = insitu.param_groups(model)
    listed = [p for group in groups for p in group["params"]]
    assert {id(p) for p in listed} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(listed) == len({id(p) for p in listed})
    found = roles(model)
    assert found["embed.weight"] == "dense"
    assert found["layer.weight"] == found["conv.weight"] == "matrix"
    assert found["conv.bias"] == "adamw"
    assert "layer.bias" not in found
    assert ("head.weight" in found) is not tie
    assert tie or found["head.weight"] == "dense"


def test_a_tied_tensor_follows_dense_whichever_of_its_uses_comes_last() -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20, bias=False), nn.Linear(20, 8, bias=False))
    model[1].weight = model[0].weight
    assert roles(model) == {"0.weight": "dense", "2.weight": "matrix"}
    assert roles(nn.Sequential(model[1], model[0], model[2])) == {"0.weight": "dense", "2.weight": "matrix"}


def test_the_grouping_can_be_read() -> None:
    told = str(insitu.param_groups(Tied()))
    for word in ("matrix", "dense", "adamw", "layer.weight", "embed.weight", "(20, 8)"):
        assert word in told


def test_patterns_keep_adamw_and_must_match() -> None:
    assert roles(Tied(), adamw=["layer.*"])["layer.weight"] == "adamw"
    with pytest.raises(ValueError, match="nothing-like-it"):
        insitu.param_groups(Tied(), adamw=["nothing-like-it"])


def test_the_limiter_is_off_for_dense_groups_unless_they_set_it() -> None:
    by_role = {g["role"]: g for g in APOLLO(insitu.param_groups(Tied()), rank=2).param_groups}
    assert by_role["dense"]["limiter"] is None
    assert by_role["matrix"]["limiter"] == 1.01


def test_a_module_is_a_type_error_that_names_the_way_out() -> None:
    with pytest.raises(TypeError, match=r"insitu\.param_groups\(model\)"):
        APOLLO(Tied())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"rank": True}, "rank=True"),
        ({"refresh": 0}, "refresh=0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1.0"),
        ({"betas": 0.9}, "betas=0.9"),
        ({"eps": -1e-8}, "eps=-1e-08"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"alpha": "big"}, "alpha='big'"),
        ({"alpha": 0}, "alpha=0"),
        ({"limiter": 0.9}, "limiter=0.9"),
        ({"projection": "pca"}, "'gaussian', 'rademacher', 'sketch', 'svd'"),
        ({"granularity": "row"}, "granularity='row'"),
        ({"denominator": "none"}, "denominator='none'"),
        ({"dense": "lion"}, "'adamw', 'apollo', 'sgd'"),
        ({"rounding": "up"}, "rounding='up'"),
        ({"moments": "int8"}, "'float32', 'bfloat16'"),
        ({"nonfinite": "ignore"}, "'error', 'skip'"),
        ({"maximize": 1}, "maximize=1"),
        ({"lr": torch.tensor([1.0, 2.0])}, "a finite number"),
        ({"backend": "gpu"}, "backend='gpu'"),
        ({"seed": 1.5}, "seed=1.5"),
    ],
    ids=str,
)
def test_a_bad_option_is_named_with_its_value(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        APOLLO([nn.Parameter(torch.zeros(4, 4))], **{"rank": 1, **options})


def test_scale_is_refused_with_an_explanation() -> None:
    with pytest.raises(TypeError, match=r"scale=128 is alpha=11\.3"):
        APOLLO([nn.Parameter(torch.zeros(4, 4))], scale=128)
    with pytest.raises(TypeError, match="rank 1"):
        APOLLOMini([nn.Parameter(torch.zeros(4, 4))], rank=4)


def test_tensors_that_cannot_be_optimized_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"layer.weight is torch.complex64"):
        APOLLO([("layer.weight", nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)))], rank=1)
    sparse = nn.Embedding(5, 4, sparse=True)
    optimizer = APOLLO(sparse.parameters(), rank=1)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


def test_what_decays_may_be_named_and_splits_a_role_in_two() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    groups = insitu.param_groups(model, weight_decay=0.1, decays={"0.weight", "1.bias"})
    assert [(g["role"], g["weight_decay"], g["param_names"]) for g in groups] == [
        ("matrix", 0.1, ["0.weight"]), ("matrix", 0.0, ["1.weight"]), ("adamw", 0.1, ["1.bias"]), ("adamw", 0.0, ["0.bias"])
    ]  # fmt: skip
    with pytest.raises(ValueError, match="decays names 1 parameters but no weight_decay: give both"):
        insitu.param_groups(model, decays={"0.weight"})
