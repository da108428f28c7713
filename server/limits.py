"""Bounds on bodies: what form they may have, how long they may be, how much memory all of them may take, and how much of the
time reading them may take.

A body that is too long is never held in memory. It is answered with 413 and then read and thrown away for a moment: a
connection closed under a client that is still sending would show it a reset instead of the answer.

Every body is counted as it comes, whatever its headers promise, and handed on whole. Parsing JSON holds the interpreter, and
with it every stream: what that will take is estimated before, and long bodies are handed on one after the other, with pauses.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import Counter
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvloom.server.errors import WireError

LINGER_SECONDS = 2.0
LINGER_BYTES = 64 * 1024**2
SMALL_BODY = 32 * 1024
"""Bytes of a body that is never kept waiting or refused for the sake of others."""
HELD_BODIES = 16
"""All bodies that are being received or wait to be parsed take at most as much memory as so many of the longest."""
PARSE_SHARE = 0.03
"""Most of the time that parsing long bodies may take."""
LONGEST_TURN = 20.0
"""Seconds that a body waits for its turn; beyond that it is refused, to come again later."""
PARSE_BYTE_SECONDS, PARSE_VALUE_SECONDS = 8e-9, 6e-7
"""What a byte and what a value of JSON take to parse and check, in seconds; measured."""


def parse_seconds(body: bytes) -> float:
    """About how long a body will hold the interpreter. Values are counted by what stands between them."""
    values = body.count(b",") + body.count(b"[") + body.count(b"{")
    return len(body) * PARSE_BYTE_SECONDS + values * PARSE_VALUE_SECONDS


class BodyHall:
    """What all bodies of a server have in common: the memory they take, and whose turn it is to be parsed.

    Nobody can take all of either: a named tenant holds at most as much as is left, and turns are counted per tenant.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        """most: bytes held at once."""
        self._most = most
        self._clock = clock
        self._held: Counter[str] = Counter()
        self._free_at: dict[str, float] = {}

    @property
    def held(self) -> int:
        """Bytes held now."""
        return self._held.total()

    def take(self, tenant: str, size: int) -> bool:
        """Hold so many bytes more; False if there is no room."""
        own, left = self._held[tenant] + size, self._most - self.held
        if size > left or (tenant and own > left):
            return False
        self._held[tenant] = own
        return True

    def give(self, tenant: str, size: int) -> None:
        """Hold so many bytes less."""
        self._held[tenant] -= size
        self._held += Counter()  # forgets who holds nothing

    def turn(self, tenant: str, body: bytes) -> float:
        """Seconds to wait before this body is parsed. The tenant's next waits until this has taken no more than its share.

        Infinite if that would be too long: then the body does not take its turn. Stored items that a request continues are
        parsed as its body is, and take a turn of their own.
        """
        if len(body) <= SMALL_BODY:
            return 0.0
        now = self._clock()
        self._free_at = {name: free for name, free in self._free_at.items() if free > now}
        begin = self._free_at.get(tenant, now)
        if begin - now > LONGEST_TURN:
            return math.inf
        self._free_at[tenant] = begin + parse_seconds(body) / PARSE_SHARE
        return begin - now


class BodyLimitMiddleware:
    """Receives bodies within a limit and hands them on whole."""

    def __init__(self, app: ASGIApp, limit: int, refused: Callable[[int], None], hall: BodyHall | None = None) -> None:
        self.app = app
        self._limit = limit
        self._refused = refused
        self._hall = hall or BodyHall(HELD_BODIES * limit)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            await self.app(scope, receive, send)
            return
        unserved = unserved_form(scope)
        if unserved is not None:
            await self._refuse(unserved, scope, receive, send)
            return
        declared = _declared(scope)
        if declared is not None and declared > self._limit:
            await self._refuse(self._too_large(), scope, receive, send)
            return
        tenant = str(scope.get("state", {}).get("tenant", ""))
        held = _Held(self._hall, tenant)
        try:
            body = await self._received(receive, held)
            if isinstance(body, WireError):
                await self._refuse(body, scope, receive, send)
            elif body is not None:
                await self._hand_on(body, held, scope, receive, send)
        finally:
            held.release()

    async def _received(self, receive: Receive, held: _Held) -> bytes | WireError | None:
        """The whole body, or why it is refused; None if the client has gone."""
        parts: list[bytes] = []
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
            if held.size + len(parts[-1]) > self._limit:
                return self._too_large()
            if not held.grow(len(parts[-1])):
                return _NO_ROOM
        return b"".join(parts)

    async def _hand_on(self, body: bytes, held: _Held, scope: Scope, receive: Receive, send: Send) -> None:
        wait = self._hall.turn(held.tenant, body)
        if wait == math.inf:
            await self._refuse(_NO_TURN, scope, receive, send)
            return
        if wait > 0 and await _left_within(receive, wait):
            return
        waiting: Message | None = {"type": "http.request", "body": body, "more_body": False}
        del body

        async def replay() -> Message:
            nonlocal waiting
            if waiting is None:
                return await receive()
            message, waiting = waiting, None
            held.release()  # it is parsed before anything else can run
            return message

        await self.app(scope, replay, send)

    def _too_large(self) -> WireError:
        return WireError(
            413, f"the body is larger than {self._limit} bytes; send less, or raise --max-body", code="body_too_large"
        )

    async def _refuse(self, error: WireError, scope: Scope, receive: Receive, send: Send) -> None:
        self._refused(error.status)
        response = error.response({"Connection": "close", **({"Accept-Encoding": "identity"} if error.status == 415 else {})})
        await send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
        if _header(scope, b"expect") is None:  # a client that asked first has not begun to send
            await _discard(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Held:
    """The bytes that one body takes."""

    def __init__(self, hall: BodyHall, tenant: str) -> None:
        self.tenant = tenant
        self.size = 0
        self._counted = 0
        self._hall = hall

    def grow(self, size: int) -> bool:
        """So many bytes more; False if there is no room for them and the body is not small."""
        self.size += size
        if self._hall.take(self.tenant, size):
            self._counted += size
            return True
        return self.size <= SMALL_BODY

    def release(self) -> None:
        """Give all of it back."""
        self._hall.give(self.tenant, self._counted)
        self._counted = 0


_JSON = re.compile(rb"application/([^/]+\+)?json\Z")
"""What FastAPI reads as JSON."""

_NO_ROOM = WireError(
    429, "too many long bodies are being received; try again later, or send less at once", code="overloaded", retry_after=5.0
)

_NO_TURN = WireError(
    429,
    "too many long bodies wait to be read; try again later, or send less at once",
    code="overloaded",
    retry_after=LONGEST_TURN,
)


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


def unserved_form(scope: Scope) -> WireError | None:
    """Why a body is refused before it is read: it is compressed, or says that it is no JSON. One that says nothing may be."""
    coding = (_header(scope, b"content-encoding") or b"").strip().lower()
    if coding not in (b"", b"identity"):
        message = (
            f"content encoding is {coding[:80].decode('latin-1')!r}; allowed: none, as bodies are bounded as they are sent"
        )
        return WireError(415, message, code="invalid_content_encoding")
    kind = (_header(scope, b"content-type") or b"").split(b";")[0].strip().lower()
    if kind and not _JSON.match(kind):
        message = f"content type is {kind[:80].decode('latin-1')!r}; allowed: application/json"
        return WireError(415, message, code="invalid_content_type")
    return None


def _has_body(scope: Scope) -> bool:
    return _header(scope, b"content-length") not in (None, b"0") or _header(scope, b"transfer-encoding") is not None


def _declared(scope: Scope) -> int | None:
    """What the header promises: only good for refusing at once, since the parser's reading of it may differ."""
    digits = (_header(scope, b"content-length") or b"").strip().lstrip(b"0")
    return int(digits[:20]) if digits.isdigit() else None


async def _left_within(receive: Receive, seconds: float) -> bool:
    """Wait so long; True at once if the client leaves meanwhile."""
    gone = asyncio.ensure_future(receive())  # the body is complete: the next thing to come is a disconnect
    try:
        done, _ = await asyncio.wait([gone], timeout=seconds)
        return bool(done)
    finally:
        gone.cancel()


async def _discard(receive: Receive) -> None:
    size = 0
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while size < LINGER_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        pass
