"""Log-probabilities and answers of any OpenAI-compatible server, through /v1/completions.

A prompt is scored with `echo`, `logprobs` and one token to generate, as lm-eval does: every server that lm-eval can score can
be scored here. Prompts go as text, so that no tokenizer is needed; the server says how it cut them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kvloom.engine.errors import KVLoomError

T = TypeVar("T")


class ServerError(KVLoomError):
    """A server that cannot be reached, refuses, or does not answer as it should."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What a server thinks of a text."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    """Of every token but the first, natural log."""
    top: tuple[Mapping[str, float], ...]
    """Of every token but the first: the likeliest ones, and the token itself."""


class Completions:
    """One model of one server. Use as an async context manager."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        extra: Mapping[str, Any] | None = None,
        concurrency: int = 4,
        timeout: float = 600.0,
    ) -> None:
        """`base_url` without /v1; `extra`: more body fields, such as {"kv": {...}}; timeout in seconds per request."""
        self.base_url, self.model = base_url.rstrip("/"), model
        self._extra = dict(extra or {})
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = timeout
        self._limit = asyncio.Semaphore(concurrency)

    async def __aenter__(self) -> Completions:
        import aiohttp  # not before it is needed: of the `bench` extra, and a command's help is read without it

        timeout = aiohttp.ClientTimeout(total=self._timeout, sock_connect=10)
        self._failures = (TimeoutError, aiohttp.ClientError, OSError, ValueError)
        self._session = aiohttp.ClientSession(timeout=timeout, headers=self._headers)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

    async def score(self, text: str, top: int) -> Scored:
        """Log-probabilities of a text's tokens with `top` alternatives. Raises ServerError."""
        body = {"prompt": text, "max_tokens": 1, "echo": True, "logprobs": top}
        reply = await self._post(body)
        try:
            found = reply["choices"][0]["logprobs"]
            count = int((reply.get("usage") or {}).get("prompt_tokens") or len(found["tokens"]) - 1)
            values, alternatives = found["token_logprobs"][1:count], found["top_logprobs"][1:count]
            return Scored(
                tuple(found["tokens"][:count]), tuple(float(v) for v in values), tuple(dict(a or {}) for a in alternatives)
            )
        except (KeyError, IndexError, TypeError, ValueError):
            raise ServerError(
                f"{self.base_url} gave no log-probabilities of the prompt; it must support echo with logprobs in "
                "/v1/completions, as lm-eval needs"
            ) from None

    async def complete(self, prompt: str, tokens: int) -> str:
        """Greedy continuation. Raises ServerError."""
        reply = await self._post({"prompt": prompt, "max_tokens": tokens})
        try:
            return str(reply["choices"][0]["text"])
        except (KeyError, IndexError, TypeError):
            raise ServerError(f"{self.base_url} answered without a text: {str(reply)[:200]}") from None

    async def _post(self, body: Mapping[str, Any]) -> dict[str, Any]:
        url = f"{self.base_url}/v1/completions"
        try:
            async with self._limit, self._session.post(
                url, json={"model": self.model, "temperature": 0, **body, **self._extra}
            ) as reply:  # fmt: skip
                if reply.status != 200:
                    wait = reply.headers.get("Retry-After")
                    hint = f" (retry after {wait} s)" if wait else ""
                    raise ServerError(f"{url} answered {reply.status}{hint}: {' '.join((await reply.text())[:300].split())}")
                found = await reply.json(content_type=None)
        except self._failures as error:
            raise ServerError(f"{url} cannot be used: {type(error).__name__}: {error}") from None
        if not isinstance(found, dict):
            raise ServerError(f"{url} answered with no JSON object: {str(found)[:200]}")
        return found


async def all_of(jobs: Sequence[Coroutine[Any, Any, T]], done: Callable[[int, T], None]) -> None:
    """Run jobs at once; `done(index, result)` as each ends, in any order. The first failure ends the others."""

    async def one(index: int, job: Coroutine[Any, Any, T]) -> None:
        done(index, await job)

    tasks = [asyncio.create_task(one(i, job)) for i, job in enumerate(jobs)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
