"""GET /health and /version."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvloom.server.context import context_of
from kvloom.server.errors import WireError
from kvloom.version import __version__

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Response:
    """200 with an empty body while the engine runs, else 503 that says why."""
    state = await context_of(request).client.health()
    if state.ok:
        return Response()
    return WireError(503, f"the engine is not healthy: {state.reason}", code="engine_dead").response()


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of kvloom."""
    return {"version": __version__}
