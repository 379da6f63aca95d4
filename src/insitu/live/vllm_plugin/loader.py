"""``--load-format insitu``: vLLM's own loading, into the arena, with every copy recorded.

The order matters. Parameters are pointed into the arena before the checkpoint is read, so there never are two copies; layout
and committed version are settled before vLLM post-processes and compiles, so it bakes in the right addresses and bytes; what
post-processing would hide in a private copy is switched off before it, or registered for refresh after it.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from insitu.live.config import default_state_dir
from insitu.live.state import open_store, state_directory
from insitu.live.versions import Versions
from insitu.live.vllm_plugin.recorder import Recorder
from insitu.live.vllm_plugin.refusals import RefusedError, check_config, untested
from insitu.live.vllm_plugin.unpacked import Derived, keep_plain, packed, padded, restore_plain
from insitu.live.vllm_plugin.worker import WeightServer
from insitu.live.weights import layout
from insitu.live.weights.arena import Arena, plan

log = logging.getLogger("insitu.vllm")


class ArenaLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads one model into one arena and hands the arena out at ``run/weights.sock`` of the state directory."""

    def __init__(self, load_config: Any) -> None:
        # The base class looks at the format again, to choose the files.
        super().__init__(dataclasses.replace(load_config, load_format="safetensors"))
        self._recorder: Recorder | None = None

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Any:
        tensors = super().get_all_weights(model_config, model)
        return tensors if self._recorder is None else self._recorder.watch(tensors)

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        if self._recorder is not None:
            raise RefusedError("insitu loads one model once; weights are replaced by training them")
        parameters = dict(model.named_parameters())
        slots = plan((name, p.dtype, p.shape) for name, p in parameters.items())
        device = next(iter(parameters.values())).device
        for parameter in parameters.values():  # nothing is in them yet, and there may be no room for both
            parameter.data = parameter.data.new_empty(0)
        torch.accelerator.empty_cache()
        self.engine_arena = Arena.create(slots, device)
        self.views = self.engine_arena.views()
        for name, parameter in parameters.items():
            parameter.data = self.views[name]
        self._recorder = Recorder(self.views)
        with self._recorder:
            super().load_weights(model, model_config)
        self._recorder.forget()
        aliases = _aliases(model, self._recorder.sources)
        self.arena = self.engine_arena.renamed(
            layout.derive(self._recorder.copies, self._recorder.sources, slots, padded=padded(model), aliases=aliases)
        )
        self._bring_up(Path(model_config.model), aliases)
        self._aliases = aliases
        keep_plain(model)

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        check_config(vllm_config, model_config)
        for warning in untested(vllm.__version__, model_config.hf_text_config.model_type):
            log.warning("%s; every check must hold before anything is served", warning)
        model: torch.nn.Module = super().load_model(vllm_config, model_config, prefix)
        derived = restore_plain(model, self.views)
        self.weight_server = WeightServer(
            self.arena, self.state_dir / "run", lambda: _refresh(model, self.views, derived), self._restore
        )
        _refresh(model, self.views, derived)  # whatever does not hold must be known before the first request
        self.weight_server.start()
        log.info(
            "%d tensors of the checkpoint lie in an arena of %d bytes", len(self.arena.slots), self.arena.num_bytes
        )
        return model

    def _bring_up(self, base: Path, aliases: dict[str, str]) -> None:
        """The checkpoint is in the arena: make it the last committed version."""
        if not base.is_dir():
            raise RefusedError(
                f"model {str(base)!r} is no directory; --load-format insitu needs the path of a local checkpoint"
            )
        self.state_dir = state_directory(default_state_dir())
        self._versions = Versions(self.state_dir, base.resolve(), open_store(self.state_dir))
        self._versions.bring_up(self.arena, aliases)

    def _restore(self, version: int) -> None:
        self._versions.restore(version, self.arena, self._aliases)


def _aliases(model: torch.nn.Module, sources: Any) -> dict[str, str]:
    """Names of tied parameters that the checkpoint may repeat -> the name that is loaded."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        kept = first.setdefault(id(parameter), name)
        if kept != name and name in sources:
            found[name] = kept
    return found


def _refresh(model: torch.nn.Module, views: dict[str, torch.Tensor], derived: list[Derived]) -> int:
    """Recompute what vLLM derived from the weights, after checking that it still reads them where they are written."""
    copies = {id(each.parameter) for each in derived}
    for name, parameter in model.named_parameters():
        if id(parameter) not in copies and parameter.data_ptr() != views[name].data_ptr():
            raise RefusedError(f"vLLM has moved {name!r} away from the arena: what is trained would not be served")
    if (private := packed(model)) is not None:
        raise RefusedError(f"vLLM reads a private copy of {private!r}: what is trained would not be served")
    for each in derived:
        each.refresh()
    return len(derived)
