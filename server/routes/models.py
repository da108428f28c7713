"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from kvloom.engine.client import ModelInfo
from kvloom.server.context import context_of

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The served model, once for each of its names."""
    model = context_of(request).client.model
    return {"object": "list", "data": [_card(model, name) for name in model.names]}


@router.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> dict[str, Any]:
    """The served model. Names may hold slashes, as repo ids do."""
    context = context_of(request)
    context.check_model(name)
    return _card(context.client.model, name)


def _card(model: ModelInfo, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "kvloom",
        "root": model.root,
        "max_model_len": model.max_model_len,
        "default_sampling": model.sampling.said(),
    }
