"""``GET /v1/models``, ``GET /v1/models/{id}`` and ``GET /health``, the one path that is open without a key."""

from typing import Any

from fastapi import APIRouter

from insitu.live.api.errors import ApiError
from insitu.live.api.serving import Serving


def models_router(serving: Serving) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(serving)]}

    @router.get("/v1/models/{id:path}")  # a Hub id has a slash
    async def retrieve_model(id: str) -> dict[str, Any]:
        serving.check_model(id)
        return _model(serving)

    @router.get("/health")
    async def health() -> dict[str, Any]:
        """Public, so it says nothing but yes; 503 when requests cannot be answered."""
        if not serving.engine.healthy():
            raise ApiError(503, "the engine cannot answer requests", code="engine_error")
        return {"status": "ok"}

    return router


def _model(serving: Serving) -> dict[str, Any]:
    info = serving.engine.info
    return {
        "id": info.model_name,
        "object": "model",
        "created": serving.created,
        "owned_by": "insitu",
        "context_length": info.context_length,
        "weight_version": serving.engine.version,
    }
