"""HEAD and OPTIONS, for every route alike.

HEAD is GET without its body, as HTTP has it: load balancers and monitors ask so. OPTIONS tells which methods a path has.
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


class HeadMiddleware:
    """Lets the application answer a HEAD as the GET that it stands for, and keeps the body back."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self.app({**scope, "method": "GET"}, receive, send_head)


def methods_of(routes: Iterable[BaseRoute], scope: Scope) -> list[str]:
    """The methods of a path, OPTIONS among them; none if there is no such path."""
    routes = list(routes)
    found = {name for name in _METHODS if any(route.matches({**scope, "method": name})[0] is Match.FULL for route in routes)}
    if "GET" in found:
        found.add("HEAD")
    return sorted({*found, "OPTIONS"}) if found else []
