"""GET /v1/models and /v1/models/{id}, with the fields that OpenAI's clients read beside those that Anthropic's read."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request

from kvloom.engine.client import ModelInfo
from kvloom.server.context import context_of

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The served model, once for each of its names."""
    model = context_of(request).client.model
    cards = [_card(model, name) for name in model.names]
    return {"object": "list", "data": cards, "first_id": cards[0]["id"], "last_id": cards[-1]["id"], "has_more": False}


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
        "type": "model",
        "display_name": name,
        "created": model.created,
        "created_at": datetime.fromtimestamp(model.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "owned_by": "kvloom",
        "root": model.root,
        "max_model_len": model.max_model_len,
        "default_sampling": model.sampling.said(),
    }
