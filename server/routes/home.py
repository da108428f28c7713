"""GET /: a page for whoever opens the server's address in a browser."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from kvloom.server.console import curl_line
from kvloom.server.context import context_of
from kvloom.server.page import render

router = APIRouter()


@router.get("/", include_in_schema=False)
async def home(request: Request) -> HTMLResponse:
    """What is served, and a command to paste."""
    context = context_of(request)
    model = context.client.model
    command = curl_line(context.options, str(request.base_url).rstrip("/"), model.name)
    return HTMLResponse(render(model, await context.client.stats(), command))
