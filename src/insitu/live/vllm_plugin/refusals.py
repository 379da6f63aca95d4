"""What cannot be trained in place, refused before anything is loaded: the reason, and the flag to change."""

import os
from typing import Any

_UNSAFE = {
    "VLLM_SERVER_DEV_MODE": "its routes let anybody change the weights without a key",
    "VLLM_USE_RUST_FRONTEND": "it has no place for the keys and the learning routes",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "adapters wrap the layers whose memory is trained",
}


TESTED_VLLM = "0.32."
TESTED_FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_5_text")


class RefusedError(ValueError):
    """vLLM was asked for something that would break the promise of one copy; the message names the flag or the tensor."""


def check_config(vllm_config: Any, model_config: Any) -> None:
    """Raise :class:`RefusedError` for the first setting that insitu cannot serve."""
    if "insitu" not in os.environ.get("VLLM_PLUGINS", "").split(","):
        # vLLM would serve without the routes, the keys and the learner's line.
        raise RefusedError("--load-format insitu needs VLLM_PLUGINS=insitu (with the names of other plugins you use)")
    for name, why in _UNSAFE.items():
        if os.environ.get(name, "0") not in ("", "0"):
            raise RefusedError(f"{name} and --load-format insitu do not go together: {why}; unset it")
    parallel, load = vllm_config.parallel_config, "--load-format insitu"
    checks = (
        (
            parallel.tensor_parallel_size > 1,
            "--tensor-parallel-size",
            "each rank would hold slices the learner cannot see whole",
        ),
        (parallel.pipeline_parallel_size > 1, "--pipeline-parallel-size", "the weights would lie in several processes"),
        (parallel.data_parallel_size > 1, "--data-parallel-size", "there would be several copies of the weights"),
        (parallel.enable_eplb, "--enable-eplb", "it moves experts between allocations"),
        (vllm_config.lora_config is not None, "--enable-lora", "adapters wrap the layers whose memory is trained"),
        (vllm_config.quant_config is not None, "--quantization", "quantized weights are derived, not the checkpoint's"),
        (
            model_config.enable_sleep_mode,
            "--enable-sleep-mode",
            "it gives the weights' memory away and loads them again",
        ),
        (
            vllm_config.speculative_config is not None,
            "--speculative-config",
            "a second model would be loaded, and never trained",
        ),
        (_offloads(vllm_config), "--cpu-offload-gb", "offloaded weights are copies"),
    )
    for refused, flag, why in checks:
        if refused:
            raise RefusedError(f"{load} and {flag} do not go together: {why}; leave {flag} out")
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:true" in os.environ.get(name, "").lower():
            raise RefusedError(f"{name} has expandable_segments:True, whose memory cannot be shared; unset it")
    if vllm_config.device_config.device_type == "cpu" and model_config.is_moe:
        raise RefusedError("mixture-of-experts models are packed into private copies on CPU; serve them on a GPU")
    if vllm_config.device_config.device_type not in ("cpu", "cuda"):
        raise RefusedError(f"device {vllm_config.device_config.device_type!r}: the arena is CPU or CUDA memory")


def untested(vllm_version: str, model_type: str) -> list[str]:
    """What to warn of: nobody has tried it, and the checks at attach decide."""
    found = []
    if not vllm_version.startswith(TESTED_VLLM):
        found.append(f"vLLM {vllm_version} is not the version that insitu was tested with ({TESTED_VLLM}x)")
    if model_type not in TESTED_FAMILIES:
        found.append(f"model type {model_type!r} is none of those tested: {', '.join(TESTED_FAMILIES)}")
    return found


def _offloads(vllm_config: Any) -> bool:
    offload = getattr(vllm_config, "offload_config", None)
    uva = getattr(offload, "uva", None)
    return bool(getattr(uva, "cpu_offload_gb", 0) or getattr(vllm_config.cache_config, "cpu_offload_gb", 0))
