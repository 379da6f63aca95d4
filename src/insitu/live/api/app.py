"""The HTTP application: the routers behind one guard."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastapi import FastAPI

from insitu.live.api import errors
from insitu.live.api.auth import MAX_BODY, Guard
from insitu.live.api.canaries import canaries_router
from insitu.live.api.chat import chat_router
from insitu.live.api.completions import completions_router
from insitu.live.api.detokenize import Detokenizer
from insitu.live.api.feedback import feedback_router
from insitu.live.api.limits import Limits
from insitu.live.api.live import live_router
from insitu.live.api.models import models_router
from insitu.live.api.service import LiveService
from insitu.live.api.serving import Serving
from insitu.live.engines.base import Engine
from insitu.live.keys import Keys


def create_app(
    engine: Engine,
    service: LiveService,
    tokenizer: Any,
    keys: Keys,
    *,
    live_status: Callable[[], Mapping[str, Any]] = dict,
    allowed_hosts: Iterable[str] = (),
    max_body: int = MAX_BODY,
    limits: Limits | None = None,
) -> FastAPI:
    """Build the application over a started engine.

    Args:
        engine: what answers; its owner starts and closes it.
        service: the memory of learning, such as ``LocalService(store)``.
        tokenizer: the served model's, with its chat template. Encoding goes through here alone from now on.
        keys: see :func:`insitu.live.keys.load_keys`. Every route but ``GET /health`` needs one of the two.
        live_status: called in a thread at each ``GET /v1/live``; what it returns is merged over the facts known here, so it
            may set ``learner`` and ``state``.
        allowed_hosts: Host names, beside the loopback ones, under which clients reach this server.
        max_body: bytes of a request body; more is a 413.
        limits: how much feedback is taken.
    """
    serving = Serving(engine, service, tokenizer, Detokenizer(tokenizer), keys, int(time.time()), limits or Limits())
    # No documentation pages: they load scripts from elsewhere. openapi.json is there, behind the key.
    app = FastAPI(title="insitu", docs_url=None, redoc_url=None, redirect_slashes=False)
    errors.install(app)
    app.add_middleware(Guard, keys=keys, allowed_hosts=tuple(allowed_hosts), max_body=max_body)
    app.include_router(models_router(serving))
    app.include_router(chat_router(serving))
    app.include_router(completions_router(serving))
    app.include_router(feedback_router(serving))
    app.include_router(live_router(serving, live_status))
    app.include_router(canaries_router(serving))
    return app
