"""Which backend is taken, what is compiled how often, and what is refused."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from backend_cases import MARKS, stepped
from torch import nn

from insitu import APOLLO
from insitu.optim import step as steps
from insitu.optim.options import BACKENDS
from insitu.optim.step import kernels, native

pytestmark = MARKS


def test_another_rate_step_or_norm_compiles_nothing() -> None:
    import torch._dynamo

    from insitu.optim.step import compiled

    def run(num: int, first: int) -> None:
        for i in range(first, first + num):
            optimizer.param_groups[0]["lr"] = 1e-3 * (i + 1)
            for p in params:
                p.grad = torch.randn_like(p) * (1 + i)
            optimizer.step()

    params = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((24, 16), (16, 24), (30, 30))]
    optimizer = APOLLO(params, rank=1, granularity="channel", backend="compiled", weight_decay=0.1, refresh=2)
    run(2, 0)
    made = compiled._compiled.cache_info().currsize
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(4, 2)
    assert compiled._compiled.cache_info().currsize == made
    assert made > 0


@pytest.mark.parametrize("name", ["compiled", "native", "fused"])
def test_without_a_compiler_it_warns_once_and_does_the_step(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("insitu.optim.step.compiled.missing_compiler", lambda device: "no C++ compiler (c++)")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(kernels, "installed", lambda: None)
    native.installed.cache_clear()
    native.build.cache_clear()
    steps._picked.cache_clear()
    try:
        with pytest.warns(UserWarning, match=rf"backend='{name}' on cpu finds no C\+\+ compiler") as caught:
            found, _ = stepped(name, (12, 8), torch.float32, rank=2)
        assert len(caught) == 1
        assert torch.equal(found, stepped("blocked", (12, 8), torch.float32, rank=2)[0])
    finally:
        monkeypatch.undo()
        steps._picked.cache_clear()
        native.installed.cache_clear()
        native.build.cache_clear()


def test_a_backend_is_refused_by_name_where_it_cannot_run() -> None:
    with pytest.raises(
        ValueError, match=r"backend='triton' cannot run on cpu: (it needs a CUDA|triton is not installed)"
    ):
        stepped("triton", (12, 8), torch.float32)
    with pytest.raises(ValueError, match="backend='blocked' on cuda: it is for CPUs"):
        steps.choose("blocked", torch.device("cuda"))
    with pytest.raises(ValueError, match=f"backend='fast': expected one of {', '.join(map(repr, BACKENDS))}"):
        stepped("fast", (12, 8), torch.float32)


def test_auto_never_compiles_on_a_cpu_and_says_once_what_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", None)
    monkeypatch.setattr(kernels, "compile_to", None)
    expected = "blocked" if kernels.installed() is None else "native"
    for installed, picked in ((kernels.installed, expected), (lambda: None, "blocked")):
        monkeypatch.setattr(kernels, "installed", installed)
        native.installed.cache_clear()
        steps._picked.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.INFO, "insitu.optim.step"):
            stepped("auto", (12, 8), torch.float32)
            stepped("auto", (12, 8), torch.bfloat16)
        said = [record.getMessage() for record in caplog.records if record.name == "insitu.optim.step"]
        assert said == [f"optimizer steps on cpu: backend='auto' is '{picked}'"]
    monkeypatch.undo()
    native.installed.cache_clear()
    steps._picked.cache_clear()


def test_installed_kernels_are_used_only_where_they_are_of_this_source_and_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "cpp"
    shutil.copytree(kernels.SOURCE, folder)
    source = folder / "sketch.cpp"
    monkeypatch.setattr(kernels, "SOURCE", folder)
    monkeypatch.setattr(kernels, "INSTALLED", tmp_path / "libnative.so")
    monkeypatch.setattr(kernels, "RECORD", tmp_path / "libnative.json")
    assert kernels.installed() is None
    assert kernels.install() is None
    assert kernels.installed() == tmp_path / "libnative.so"
    assert {path.name for path in tmp_path.iterdir()} == {"cpp", "libnative.so", "libnative.json"}

    have = kernels.instructions()
    assert have, "no instruction set was found"
    with monkeypatch.context() as other:
        other.setattr(kernels, "instructions", lambda: set(sorted(have)[1:]))
        assert kernels.installed() is None
    whole = kernels.INSTALLED.read_bytes()
    kernels.INSTALLED.write_bytes(whole[:-1])
    assert kernels.installed() is None
    kernels.INSTALLED.write_bytes(whole)
    assert kernels.installed() is not None
    for changed in (source, folder / "numbers.h"):
        before = changed.read_bytes()
        changed.write_bytes(before + b"// changed")
        assert kernels.installed() is None
        changed.write_bytes(before)
    assert kernels.installed() is not None
    source.write_text("not C++")
    reason = kernels.install()
    assert reason is not None
    assert "cannot make the kernels" in reason
    assert kernels.installed() is None
