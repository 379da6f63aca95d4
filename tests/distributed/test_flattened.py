"""Wrappers that make vectors of matrices are refused by name: rows and columns would be lost."""

import pytest
import torch
from pairs import apollo, backward, small, tokens
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from insitu import APOLLO


def bare(model: nn.Module) -> APOLLO:
    return APOLLO(model.parameters(), rank=1)


MAKERS = {"by role": apollo(), "bare": bare}


def wrapped(model: nn.Module, use_orig_params: bool) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)


@pytest.mark.parametrize("use_orig_params", [True, False])
@on_ranks(2)
def test_fsdp1_is_refused_when_the_optimizer_is_made(use_orig_params: bool) -> None:
    model = wrapped(small(), use_orig_params)
    with pytest.raises(ValueError, match=r"FullyShardedDataParallel \(FSDP1\).*use fully_shard"):
        bare(model)


@pytest.mark.parametrize("kind", MAKERS)
@on_ranks(2)
def test_fsdp1_is_refused_at_the_first_step_when_it_wraps_later(kind: str) -> None:
    model = small()
    optimizer = MAKERS[kind](model)
    backward(wrapped(model, True), tokens(0))
    with pytest.raises(ValueError, match=r"FSDP1.*use fully_shard"):
        optimizer.step()
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("kind", MAKERS)
@on_ranks(2)
def test_one_flat_tensor_in_place_of_a_group_is_refused_by_name(kind: str) -> None:
    # What DeepSpeed ZeRO does with the groups of an optimizer.
    optimizer = MAKERS[kind](small())
    optimizer.load_state_dict(optimizer.state_dict())  # is not what makes it forget
    for group in optimizer.param_groups:
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))
        flat.grad = torch.ones_like(flat)
        group["params"] = [flat]
    with pytest.raises(ValueError, match=r"flattened.*use fully_shard"):
        optimizer.step()


@on_ranks(2)
def test_what_takes_adamw_anyway_may_be_flat() -> None:
    matrix = nn.Parameter(torch.ones(5, 3))
    optimizer = APOLLO([{"params": [matrix], "role": "adamw"}])
    flat = nn.Parameter(torch.ones(15))
    flat.grad = torch.ones(15)
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.step()
    assert (flat < 1).all()


@on_ranks(2)
def test_vectors_alone_are_no_flattened_matrices() -> None:
    p = nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    APOLLO([p]).step()
    assert (p < 1).all()
