"""A served application over an engine in this process, that is asked by `asgi`, and has nothing left of it afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from kvloom.engine import LLM
from kvloom.engine.startup.build import Built
from kvloom.engine.thread.client import ThreadEngineClient
from kvloom.loadtest.fuzz.asgi import Reply, ask
from kvloom.loadtest.fuzz.fuzzer import FuzzError, look
from kvloom.server.app import create_app
from kvloom.server.options import ServerOptions

SECONDS = 60.0
"""In which a request must be answered, and an engine become idle."""


class Application:
    """One application over one engine."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._client = ThreadEngineClient(lambda: Built(llm.core, llm.model, llm.tokenizer))
        self._app: Any = create_app(self._client, ServerOptions(access_log=False))

    async def post(self, path: str, body: bytes, leave_after: int | None = None) -> Reply:
        """One request. leave_after: as in `asgi.ask`, which raises HangError where there is no end."""
        return await ask(self._app, "POST", path, body, leave_after=leave_after, seconds=SECONDS)

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
