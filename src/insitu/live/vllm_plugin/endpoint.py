"""The door of vLLM's API server: keys on every route, the learning routes, and the line to the learner.

One object lives in the API server process. Its two halves are called by vLLM: :meth:`Endpoint.attach_router` while the
application is built, :meth:`Endpoint.init_state` once the engine is up.
"""

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any

from insitu.live import disk
from insitu.live.api import errors
from insitu.live.api.auth import Guard
from insitu.live.api.canaries import canaries_router
from insitu.live.api.detokenize import Detokenizer
from insitu.live.api.feedback import feedback_router
from insitu.live.api.limits import limits_of_environment
from insitu.live.api.live import live_router
from insitu.live.api.service import LocalService
from insitu.live.api.serving import Serving
from insitu.live.config import default_state_dir
from insitu.live.control import ControlServer
from insitu.live.engines.base import EngineInfo
from insitu.live.engines.vllm import VLLMEngine
from insitu.live.events import note
from insitu.live.keys import load_keys
from insitu.live.repair import repair
from insitu.live.state import state_directory
from insitu.live.store import Store
from insitu.live.vllm_plugin import LOAD_FORMAT
from insitu.live.vllm_plugin.answers import Answers, note_spans
from insitu.live.vllm_plugin.gate import Gate
from insitu.live.vllm_plugin.refusals import RefusedError
from insitu.live.vllm_plugin.worker import WeightClient
from insitu.live.vllm_server import PARENT
from insitu.live.weights.arena import resident

log = logging.getLogger("insitu.vllm")


class Endpoint:
    """``vllm.endpoint_plugins`` entry point. Does nothing unless vLLM loads with ``--load-format insitu``."""

    name = "insitu"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.control: ControlServer | None = None

    def attach_router(self, app: Any) -> None:
        from transformers import AutoTokenizer

        args = app.state.args
        if args.load_format != LOAD_FORMAT:
            return
        if (args.api_server_count or 1) > 1:
            raise RefusedError(
                "--load-format insitu and --api-server-count do not go together: one process talks to the learner"
            )
        self.state_dir = state_directory(default_state_dir())
        self.weights = WeightClient(self.state_dir / "run")  # the engine is up: vLLM builds the application after it
        self.store = Store(self.state_dir / "insitu.db")
        keys = load_keys(self.state_dir)
        given = args.api_key or [key for key in [os.environ.get("VLLM_API_KEY")] if key]
        if given and not {keys.api, keys.learn} <= set(given):
            raise RefusedError(
                "vLLM's --api-key and insitu's keys differ: set INSITU_API_KEY and INSITU_LEARN_KEY, and give both to "
                "--api-key; or leave --api-key out, insitu's keys guard every route"
            )
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
        name = (args.served_model_name or [args.model])[0]
        self.engine = VLLMEngine(EngineInfo(name, 0, ()), self.weights.header.label)
        service = LocalService(self.store)
        limits = limits_of_environment()
        serving = Serving(self.engine, service, tokenizer, Detokenizer(tokenizer), keys, int(time.time()), limits)
        errors.install(app)
        app.include_router(feedback_router(serving))
        app.include_router(live_router(serving, self.live_status))
        app.include_router(canaries_router(serving))
        # The last one added is the first one asked: the guard, then the gate, then the notes on answers.
        app.add_middleware(Answers, service=service, version=lambda: self.engine.version)
        app.add_middleware(Gate, closed=self.closed)
        app.add_middleware(Guard, keys=keys, allowed_hosts=tuple(filter(None, [args.host])))

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        if args.load_format != LOAD_FORMAT:
            return
        self.engine.info = EngineInfo(
            self.engine.info.model_name,
            int(engine_client.model_config.max_model_len),
            _ends(engine_client.model_config),
        )
        _end_with(os.environ.get(PARENT))
        await self.engine.bind(engine_client, self.weights)
        note_spans(state, engine_client)
        self.control = ControlServer(
            self.engine, self.weights, self.state_dir / "run" / "engine.sock", self._repair, proven=False
        )
        self.control.start()
        note(self.store, "server.started", "server", pid=os.getpid(), engine="vllm", version=self.weights.header.label)

    def closed(self) -> str | None:
        """Why nobody may be answered yet, or None."""
        if self.control is None:
            return "the engine is starting"
        if self.control.proven:
            return None
        if self.control.refusal is not None:
            return f"the weights cannot be trained in place: {self.control.refusal}"
        return "the learner has not yet compared the weights with their version"

    def _repair(self, paused: bool) -> None:
        found = self.weights.header
        note(self.store, "learner.died", "learner", found=found.label, paused=paused)
        try:
            head = self.store.head()
            assert head is not None

            def restore() -> None:
                self.weights.restore(head)
                note(self.store, "repair.done", f"version {head}", found=found.label, torn=bool(found.writer))

            repair(self.engine, self.weights.header, head, restore, paused)
        except Exception:  # nobody may be answered from weights of which nothing is known
            log.exception("the last committed version could not be restored; vLLM ends")
            os.kill(os.getpid(), signal.SIGTERM)

    def live_status(self) -> Mapping[str, Any]:
        """Facts of this server for GET /v1/live."""
        control, header = self.control, self.weights.header
        assert control is not None
        pid = control.learner_pid
        learner = "absent" if pid is None else "ready" if control.learner_ready else "attaching"
        return {
            "engine": "vllm",
            "weight_version": header.label,
            "paused": control.paused,
            "trial": bool(header.step or header.writer),
            **({} if control.proven else {"state": "degraded" if control.refusal else "starting"}),
            "learner": {
                "state": learner,
                "pid": pid,
                "refusal": control.refusal,
                "problem": control.problem or disk.shortage(self.state_dir),
            },
            "arena": {"bytes": self.weights.num_bytes, "pid": self.weights.pid, **_resident(self.weights.pid)},
        }


def _resident(pid: int) -> Mapping[str, int]:
    try:
        return resident(pid)
    except OSError:  # the worker has died, and this process is about to end too
        return {}


def _end_with(parent: str | None) -> None:
    """End in order when the process that started this vLLM is gone, however it ended."""
    if parent is None:
        return

    def watch() -> None:
        try:
            process = os.pidfd_open(int(parent))
        except ProcessLookupError:
            pass
        else:
            poll = select.poll()
            poll.register(process, select.POLLIN)
            poll.poll()
        log.critical("the process that started this server is gone; ending")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="insitu-parent", daemon=True).start()


def _ends(model_config: Any) -> tuple[int, ...]:
    """Token ids that end a reply."""
    found = model_config.try_get_generation_config().get("eos_token_id") or model_config.hf_text_config.eos_token_id
    ids = found if isinstance(found, list) else [found]
    return tuple(i for i in ids if i is not None)
