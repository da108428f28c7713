"""GET /health and its other names, /load and /version."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvloom.server.context import context_of, operator_only
from kvloom.server.errors import WireError
from kvloom.version import __version__

router = APIRouter()


@router.get("/health")
@router.get("/ready")
@router.get("/ping")
@router.post("/ping")
async def health(request: Request) -> Response:
    """200 with an empty body while the engine runs, else 503 that says why. /ready is for probes of readiness, and /ping for
    SageMaker: a server that answers at all has loaded its model, so that all three are one."""
    state = await context_of(request).client.health()
    if state.ok:
        return Response()
    return WireError(503, f"the engine is not healthy: {state.reason}", code="engine_dead").response()


@router.get("/load")
async def load(request: Request) -> dict[str, int]:
    """Requests that run or wait now, under vLLM's name of it, for who spreads requests over servers. For the operator."""
    operator_only(request, "the load by all tenants is")
    stats = await context_of(request).client.stats()
    return {"server_load": stats.running + stats.waiting}


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of kvloom."""
    return {"version": __version__}
