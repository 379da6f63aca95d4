"""What is foretold on meta tensors is what real optimizers hold after a step, byte for byte."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import insitu
from insitu.diagnostics.memory import INT8_GROUP, OPTIMIZERS, PEERS, memory
from insitu.diagnostics.skeleton import LLAMAS, skeleton
from insitu.optim import quantize
from insitu.optim.quantized import Int8Weight


class Odd(nn.Module):
    """Every kind of tensor: tied embeddings, odd and even sides, a stack of experts, convolutions, norms, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(131, 40)
        self.tall, self.wide, self.thin = nn.Linear(40, 173), nn.Linear(173, 67), nn.Linear(1, 9)
        self.even = nn.Linear(64, 64)
        self.experts = nn.Parameter(torch.randn(3, 24, 60))
        self.conv, self.conv1 = nn.Conv2d(3, 8, 3), nn.Conv1d(5, 7, 1)
        self.norm, self.scalar = nn.LayerNorm(40), nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(50, 90).requires_grad_(False)
        self.head = nn.Linear(40, 131, bias=False)
        self.head.weight = self.embedding.weight


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


def held(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the state, also those inside tensor subclasses and objects; what is shared counts once."""
    found: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor) and hasattr(value, "tensor_attrs"):  # torchao's quantized state
            for name in value.tensor_attrs:
                visit(getattr(value, name))
        elif isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.nbytes
        elif isinstance(value, dict):
            for part in value.values():
                visit(part)
        elif hasattr(value, "__dict__"):
            visit(vars(value))

    for state in optimizer.state.values():
        visit(state)
    return sum(found.values())


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def models(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A model, and the same without memory."""
    with torch.device("meta"):  # moved there later, tied tensors would come apart
        meta = Odd().to(request.param)
    return Odd().to(request.param), meta


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("apollo", {}),
        ("apollo", {"dense": "apollo", "moments": "bfloat16", "rounding": "compensated"}),
        ("apollo", {"dense": "sgd", "projection": "sketch"}),
        ("apollo", {"projection": "svd"}),
        ("apollo-mini", {}),
        ("apollo-mini", {"dense": "apollo", "projection": "rademacher"}),
        ("apollo-qn", {"moments": "bfloat16"}),
        ("apollo-qn", {"weight_decay": 0.1, "decay": "decoupled"}),
    ],
    ids=str,
)
def test_the_state_of_ours_is_foretold(models: tuple[nn.Module, nn.Module], name: str, options: dict[str, Any]) -> None:
    model, meta = models
    groups = insitu.param_groups(model)
    real: dict[str, Callable[[], insitu.APOLLO | insitu.ApolloQN]] = {
        "apollo": lambda: insitu.APOLLO(groups, rank=2, **options),
        "apollo-mini": lambda: insitu.APOLLOMini(groups, **options),
        "apollo-qn": lambda: insitu.ApolloQN(groups, **options),
    }
    optimizer = real[name]()
    foretold = memory(meta, name, rank=2, **options)
    assert foretold.state_bytes == held(stepped(model, optimizer)) > 0
    if isinstance(optimizer, insitu.APOLLO):
        assert foretold.projections == optimizer._projections._bytes
    assert foretold.weights == sum(p.nbytes for p in model.parameters())
    assert foretold.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def test_projections_are_counted_up_to_what_is_kept() -> None:
    from insitu.optim.projection import CACHE_BYTES

    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(8192, 8192, bias=False) for _ in range(40))
    assert memory(model, "apollo", rank=256).projections == CACHE_BYTES == 8 * 256 * 8192 * 4


def test_torchs_adamw_is_foretold(models: tuple[nn.Module, nn.Module]) -> None:
    model, meta = models
    trained = [p for p in model.parameters() if p.requires_grad]
    assert memory(meta, "adamw").state_bytes == held(stepped(model, torch.optim.AdamW(trained)))


def test_bitsandbytes_is_foretold(models: tuple[nn.Module, nn.Module]) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model, meta = models
    optimizer = bnb.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad])
    assert memory(meta, "adamw-8bit").state_bytes == held(stepped(model, optimizer))


def test_torchao_is_foretold(models: tuple[nn.Module, nn.Module]) -> None:
    torchao = pytest.importorskip("torchao.optim")
    model, meta = models
    optimizer = torchao.AdamW8bit([p for p in model.parameters() if p.requires_grad])
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():  # its step compiles, for a minute
        warnings.simplefilter("ignore")
        stepped(model, optimizer)
    assert memory(meta, "adamw-8bit-torchao").state_bytes == held(optimizer)


def test_galore_is_foretold(models: tuple[nn.Module, nn.Module]) -> None:
    peers = pytest.importorskip("pytorch_optimizer")
    model, meta = models
    galore = {"rank": 2, "update_proj_gap": 200, "scale": 0.25, "projection_type": "std"}
    groups = [
        {"params": group["params"], **(galore if group["role"] == "matrix" else {})}
        for group in insitu.param_groups(model)
    ]
    optimizer = stepped(model, peers.GaLore(groups, foreach=False))
    assert memory(meta, "galore", rank=2).state_bytes == held(optimizer)


def test_release_leaves_the_largest_gradient() -> None:
    with torch.device("meta"):
        model = Odd()
    assert memory(model, "apollo-mini", release=True).gradients == 173 * 67 * 4
    assert memory(model, "adamw", release=True).peak < memory(model, "adamw").peak


def test_int8_weights_are_a_byte_each_and_a_scale_for_each_group() -> None:
    with torch.device("meta"):
        model = nn.Linear(300, 10, bias=False, dtype=torch.bfloat16)
        model.experts = nn.Parameter(torch.ones(3, 8, 8))  # no linear layer, so not in int8
    saved = memory(model, "apollo-mini").weights - memory(model, "q-apollo-mini").weights
    assert INT8_GROUP == 128
    assert saved == 300 * 10 * (2 - 1) - 10 * 3 * 2


def test_int8_weights_are_what_quantize_makes() -> None:
    """The same layers, and the same bytes."""
    model = nn.Sequential(nn.Embedding(11, 40), nn.Linear(40, 300), nn.Conv1d(4, 4, 3), nn.Linear(300, 7, bias=False))
    foretold = memory(model, "q-apollo-mini").weights
    quantized = quantize(model)
    assert quantized
    stored = sum(
        p.int_data.nbytes + p.scale.nbytes if isinstance(p, Int8Weight) else p.nbytes for p in model.parameters()
    )
    assert foretold == stored


def test_a_7b_model_is_trained_by_mini_with_less_than_a_tenth_of_a_gigabyte_of_state() -> None:
    pytest.importorskip("transformers")
    model = skeleton("llama-7b")
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    mini = memory(model, "apollo-mini", dense="apollo")
    # 2 n float32 numbers per matrix: 4 of n = 4096 and 3 of 11008 a layer, 2 of 32000; and AdamW for 65 norms.
    moments = 8 * (32 * (4 * 4096 + 3 * 11008) + 2 * 32000 + 65 * 4096)
    norms, counters = 4 * (7 * 32 + 2), 16 * (7 * 32 + 2 + 65)
    assert mini.state_bytes == moments + norms + counters < 0.1e9
    assert memory(model, "adamw").state_bytes == pytest.approx(4 * 6_738_415_616, rel=1e-6)


@pytest.mark.parametrize("name", LLAMAS)
def test_the_llamas_have_the_size_they_are_called_by(name: str) -> None:
    pytest.importorskip("transformers")
    size = float(name.removeprefix("llama-").removesuffix("m").removesuffix("b")) * (1e6 if name.endswith("m") else 1e9)
    assert sum(p.numel() for p in skeleton(name).parameters()) == pytest.approx(size, rel=0.35)


def test_what_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="'adam' is unknown: expected one of adamw"):
        memory(nn.Linear(2, 2), "adam")
    with pytest.raises(TypeError, match="galore takes no dense"):
        memory(nn.Linear(2, 2), "galore", dense="apollo")
    assert set(PEERS) < set(OPTIMIZERS)
