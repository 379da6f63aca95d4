"""The published recipes make optimizers, and are what the paper prints."""

import math

import pytest
import torch
from torch import nn

import insitu
from insitu.optim.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.filterwarnings("ignore:rank=")
def test_every_preset_makes_an_optimizer_that_steps(name: str) -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 12))
    if name.startswith("q-"):
        insitu.quantize(model, group_size=128)
    optimizer = insitu.APOLLO(insitu.param_groups(model), **preset(name))
    before = [value.clone() for value in model.state_dict().values()]
    model(torch.tensor([1, 2])).square().sum().backward()
    optimizer.step()
    after = list(model.state_dict().values())
    assert not torch.equal(after[1], before[1])  # the weight of the linear layer


def test_the_numbers_of_the_paper() -> None:
    # Appendix of arXiv 2412.05270: lr 0.01, T = 200, r = d / 4 with hidden sizes 512, 768, 1024, 2048; 256 for 7B.
    for size, hidden in (("60m", 512), ("130m", 768), ("350m", 1024), ("1b", 2048)):
        assert preset(f"apollo-{size}")["rank"] == hidden // 4
    assert preset("apollo-7b")["rank"] == 256
    assert all(PRESETS[name]["refresh"] == 200 and PRESETS[name]["limiter"] == 1.01 for name in PRESETS)
    assert all(PRESETS[name]["lr"] == 0.01 for name in PRESETS if "finetune" not in name)
    assert preset("apollo-mini-60m")["alpha"] == math.sqrt(128)
    assert preset("apollo-finetune")["lr"] == 3e-4
    assert preset("q-apollo-350m") == {**preset("apollo-350m"), "eps": 1e-8}


def test_a_preset_is_a_copy_and_an_unknown_name_lists_the_known() -> None:
    preset("apollo-60m")["rank"] = 1
    assert insitu.preset("apollo-60m")["rank"] == 128
    with pytest.raises(ValueError, match=r"apollo-60M.*apollo-mini-7b"):
        preset("apollo-60M")
