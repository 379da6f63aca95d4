"""What vLLM may not be asked for together with the arena is refused by the flag's name, before anything is loaded."""

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from insitu.live.vllm_plugin.refusals import TESTED_FAMILIES, TESTED_VLLM, RefusedError, check_config, untested

Config = SimpleNamespace


def plain() -> tuple[Config, Config]:
    """vLLM's configuration of a dense model on CPU, as far as it is looked at."""
    parallel = Config(
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        data_parallel_size=1,
        enable_eplb=False,
        enable_expert_parallel=False,
    )
    vllm = Config(
        parallel_config=parallel,
        lora_config=None,
        quant_config=None,
        speculative_config=None,
        device_config=Config(device_type="cpu"),
        offload_config=Config(uva=Config(cpu_offload_gb=0)),
        cache_config=Config(cpu_offload_gb=0),
    )
    return vllm, Config(enable_sleep_mode=False, is_moe=False)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "VLLM_SERVER_DEV_MODE",
        "VLLM_USE_RUST_FRONTEND",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_ALLOC_CONF",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_PLUGINS", "insitu")


def test_the_plain_configuration_passes() -> None:
    check_config(*plain())


def test_settings_of_an_older_or_newer_vllm_may_be_absent() -> None:
    vllm, model = plain()
    del vllm.offload_config
    check_config(vllm, model)
    vllm, model = plain()
    del vllm.cache_config.cpu_offload_gb
    check_config(vllm, model)
    vllm.offload_config.uva = None
    check_config(vllm, model)


FLAGS: dict[str, Callable[[Config, Config], object]] = {
    "--tensor-parallel-size": lambda vllm, model: setattr(vllm.parallel_config, "tensor_parallel_size", 2),
    "--pipeline-parallel-size": lambda vllm, model: setattr(vllm.parallel_config, "pipeline_parallel_size", 2),
    "--data-parallel-size": lambda vllm, model: setattr(vllm.parallel_config, "data_parallel_size", 2),
    "--enable-eplb": lambda vllm, model: setattr(vllm.parallel_config, "enable_eplb", True),
    "--enable-lora": lambda vllm, model: setattr(vllm, "lora_config", Config()),
    "--quantization": lambda vllm, model: setattr(vllm, "quant_config", Config()),
    "--enable-sleep-mode": lambda vllm, model: setattr(model, "enable_sleep_mode", True),
    "--speculative-config": lambda vllm, model: setattr(vllm, "speculative_config", Config()),
    "--cpu-offload-gb": lambda vllm, model: setattr(vllm.offload_config.uva, "cpu_offload_gb", 0.5),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_is_refused_by_its_name_with_the_reason_and_the_way_out(flag: str) -> None:
    vllm, model = plain()
    FLAGS[flag](vllm, model)
    said = rf"^--load-format insitu and {flag} do not go together: .{{20,}}; leave {flag} out$"
    with pytest.raises(RefusedError, match=said):
        check_config(vllm, model)


def test_offloading_is_found_where_older_versions_keep_it() -> None:
    vllm, model = plain()
    vllm.cache_config.cpu_offload_gb = 4
    with pytest.raises(RefusedError, match="--cpu-offload-gb"):
        check_config(vllm, model)


@pytest.mark.parametrize("value", [None, "", "other", "insitu2", "not-insitu,other", "INSITU"])
def test_without_the_plugins_routes_it_is_refused(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv("VLLM_PLUGINS")
    else:
        monkeypatch.setenv("VLLM_PLUGINS", value)
    with pytest.raises(RefusedError, match="VLLM_PLUGINS=insitu"):
        check_config(*plain())


@pytest.mark.parametrize("value", ["insitu", "other,insitu", "insitu,other", "a,insitu,b"])
def test_other_plugins_may_be_named_beside_it(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", value)
    check_config(*plain())


@pytest.mark.parametrize("name", ["VLLM_SERVER_DEV_MODE", "VLLM_USE_RUST_FRONTEND", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"])
def test_settings_that_open_another_door_to_the_weights_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for value in ("", "0"):
        monkeypatch.setenv(name, value)
        check_config(*plain())
    for value in ("1", "true"):
        monkeypatch.setenv(name, value)
        with pytest.raises(RefusedError, match=rf"^{name} and --load-format insitu do not.*; unset it$"):
            check_config(*plain())


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize("value", ["expandable_segments:True", "max_split_size_mb:64,Expandable_Segments:TRUE"])
def test_memory_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch, value: str, name: str) -> None:
    monkeypatch.setenv(name, "expandable_segments:False")
    check_config(*plain())
    monkeypatch.setenv(name, value)
    with pytest.raises(RefusedError, match=f"^{name} has expandable_segments"):
        check_config(*plain())


def test_experts_on_cpu_and_any_other_device_are_refused() -> None:
    vllm, model = plain()
    model.is_moe = True
    with pytest.raises(RefusedError, match="mixture-of-experts"):
        check_config(vllm, model)
    vllm.device_config.device_type = "cuda"
    check_config(vllm, model)  # where they are not packed
    for device in ("xpu", "tpu"):
        vllm.device_config.device_type = device
        with pytest.raises(RefusedError, match=f"device '{device}'"):
            check_config(vllm, model)


def test_what_nobody_has_tried_is_warned_of_and_not_refused() -> None:
    assert untested(f"{TESTED_VLLM}1", TESTED_FAMILIES[0]) == []
    (version,) = untested("9.9.9", TESTED_FAMILIES[-1])
    assert "vLLM 9.9.9" in version
    (family,) = untested(f"{TESTED_VLLM}0", "mamba3")
    assert "'mamba3'" in family
    assert len(untested("0.3.2", "")) == 2


def test_the_plugin_is_light_to_import_and_only_its_registration_needs_vllm() -> None:
    """vLLM imports it in each of its processes, whether insitu is asked for or not."""
    code = (
        "import sys\n"
        "import insitu.live.vllm_plugin as plugin\n"
        "assert plugin.LOAD_FORMAT == 'insitu'\n"
        "print(sorted({'torch', 'vllm', 'transformers', 'fastapi'} & sys.modules.keys()))\n"
        "sys.modules['vllm'] = None\n"
        "try:\n    plugin.register()\nexcept ImportError:\n    print('needs vllm')\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == "[]\nneeds vllm\n"


def test_registering_twice_registers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import ModuleType

    from insitu.live import vllm_plugin

    registered: dict[str, Any] = {}
    loaders = ModuleType("vllm.model_executor.model_loader")
    loaders._LOAD_FORMAT_TO_MODEL_LOADER = registered  # type: ignore[attr-defined]
    loaders.register_model_loader = lambda name: lambda cls: registered.setdefault(name, cls)  # type: ignore[attr-defined]
    loader = ModuleType("insitu.live.vllm_plugin.loader")
    loader.ArenaLoader = object()  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.model_executor"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (loaders, loader):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vllm_plugin.register()
    assert registered == {"insitu": loader.ArenaLoader}
    loader.ArenaLoader = object()  # type: ignore[attr-defined]
    vllm_plugin.register()
    assert registered["insitu"] is not loader.ArenaLoader
