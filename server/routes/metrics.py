"""GET /metrics, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from kvloom.server.context import context_of, operator_only

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """All metrics in Prometheus's text format. Where there are tenants, for the operator alone."""
    operator_only(request, "figures of all tenants are")
    return Response(await context_of(request).metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})
