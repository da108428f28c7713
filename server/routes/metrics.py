"""GET /metrics, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from kvloom.server.context import context_of, sees_all
from kvloom.server.errors import WireError

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """All metrics in Prometheus's text format. Where there are tenants, for the operator alone."""
    if not sees_all(request):
        message = "figures of all tenants are for the operator; send an admin key (set with --admin-key) as the bearer token"
        refusal = WireError(403, message, code="admin_only")
        context_of(request).metrics.refused(refusal.status)
        return refusal.response()
    return Response(await context_of(request).metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})
