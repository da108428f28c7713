"""A served application without sockets: requests go to it as a server would hand them on, and clients leave when they like."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from kvloom.engine import LLM
from kvloom.engine.startup.build import Built
from kvloom.engine.thread.client import ThreadEngineClient
from kvloom.loadtest.fuzz.fuzzer import FuzzError, look
from kvloom.server.app import create_app
from kvloom.server.options import ServerOptions

SECONDS = 60.0
"""In which a request must be answered, and an engine become idle."""


class Reply(NamedTuple):
    """What a client got."""

    status: int
    """0 where it left before there was one."""
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body; raises UnicodeDecodeError where it is none."""
        return self.body.decode()

    def json(self) -> Any:
        """The body's value."""
        return json.loads(self.body)


class Application:
    """One application over one engine."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._client = ThreadEngineClient(lambda: Built(llm.core, llm.model, llm.tokenizer))
        self._app: Any = create_app(self._client, ServerOptions(access_log=False, allowed_hosts=("fuzz",)))

    async def post(self, path: str, body: Sequence[bytes], leave_after: int | None = None) -> Reply:
        """One request. body: its pieces. leave_after: the client leaves after so many pieces of the answer, or with 0 while it
        waits for the first. Raises FuzzError where there is no end."""
        headers = [(b"host", b"fuzz"), (b"content-type", b"application/json"), (b"content-length", b"%d" % sum(map(len, body)))]
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
                 "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
                 "client": ("127.0.0.1", 1), "server": ("fuzz", 80)}  # fmt: skip
        waiting, gone = list(body), asyncio.Event()
        status, found, parts = 0, dict[str, str](), list[bytes]()

        async def receive() -> dict[str, Any]:
            if waiting:
                return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Mapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                found.update((key.decode(), value.decode()) for key, value in message["headers"])
            else:
                parts.append(bytes(message.get("body", b"")))
                if leave_after is not None and len(parts) >= leave_after:
                    gone.set()

        if leave_after == 0:
            asyncio.get_running_loop().call_soon(gone.set)
        try:
            await asyncio.wait_for(self._app(scope, receive, send), SECONDS)
        except TimeoutError:
            raise FuzzError(f"{path} does not end") from None
        return Reply(status, found, b"".join(parts))

    async def check(self) -> None:
        """Once nothing runs any more: raises FuzzError where something is left behind."""
        for _ in range(int(SECONDS / 0.01)):
            stats = await self._client.stats()
            if not (stats.running or stats.waiting or self._client._streams):
                break
            await asyncio.sleep(0.01)
        else:
            raise FuzzError("requests go on that nobody waits for")
        await self._client._ask("", look)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        if left or self._app.state.context.asking:
            raise FuzzError(f"tasks or questions are left: {left[:3]}")

    def close(self) -> None:
        """End its threads."""
        self._app.state.context.prompts.close()
        self._client.close()


@asynccontextmanager
async def serving(llm: LLM) -> AsyncGenerator[Application, None]:
    """An application for a while."""
    application = Application(llm)
    try:
        yield application
    finally:
        application.close()
