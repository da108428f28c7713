"""Log-probabilities and answers of any OpenAI-compatible server, through /v1/completions, and how far two servers are apart.

    score    a prompt with `echo`, `logprobs` and one token to generate, as lm-eval does: every server that lm-eval can score
             can be scored here. Prompts go as text, so that no tokenizer is needed; the server says how it cut them
    force    teacher-forced through the decode path: after a prompt the server is made to generate given tokens and says the
             log-probability of each and the likeliest others. The first one is scored from the prompt's last row, not from a
             decode row, and is left out

Servers tell only the likeliest few tokens, so both divergences are lower bounds of the full KL. `coarse_divergence` counts all
that one of the servers does not list as one class; `kl` is taken over all tokens that the reference lists: where the other
server does not list one, its probability is at most that of the last one it does list.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from kvloom.engine.errors import KVLoomError
from kvloom.loadtest.study.intervals import Interval, bootstrap
from kvloom.loadtest.workloads.corpus import TextSource

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

    async def force(self, prompt: Sequence[int], tokens: Sequence[int], top: int) -> dict[str, Any]:
        """The choice of a server that is made to generate given tokens (kvloom's `forced_tokens`). Raises ServerError."""
        body = {"prompt": list(prompt), "max_tokens": len(tokens), "forced_tokens": list(tokens), "logprobs": top}
        return self._choice(await self._post({**body, "ignore_eos": True}))

    async def complete(self, prompt: str, tokens: int) -> str:
        """Greedy continuation. Raises ServerError."""
        return str(self._choice(await self._post({"prompt": prompt, "max_tokens": tokens}))["text"])

    def _choice(self, reply: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return {"text": reply["choices"][0]["text"], **reply["choices"][0]}
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


async def all_of(jobs: Sequence[Coroutine[Any, Any, T]], done: Callable[[], None]) -> list[T]:
    """Run jobs at once; their results in order. `done` is called as each ends. The first failure ends the others."""

    async def one(job: Coroutine[Any, Any, T]) -> T:
        result = await job
        done()
        return result

    tasks = [asyncio.create_task(one(job)) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


FLOOR = -100.0
"""Log-probability of what cannot be less likely; some servers send -9999 for minus infinity."""


def coarse_divergence(reference: Mapping[str, float], found: Mapping[str, float]) -> float:
    """KL(reference || found) in nats over the tokens that both list, and one class for all the rest.

    Merging classes never adds to a KL, so this is a lower bound of the whole one.
    """
    shared = reference.keys() & found.keys()
    p = [math.exp(max(reference[token], FLOOR)) for token in shared]
    q = [math.exp(max(found[token], FLOOR)) for token in shared]
    p.append(max(1.0 - sum(p), 0.0))
    q.append(max(1.0 - sum(q), 1e-12))
    return max(0.0, sum(a * math.log(a / max(b, 1e-45)) for a, b in zip(p, q) if a > 0.0))


def likeliest(top: Mapping[str, float]) -> str:
    """The token with the highest log-probability."""
    return max(top, key=lambda token: top[token])


TOP = 20
LEAST = 1e-9
"""Probability below which the rest of a distribution counts as this much."""


class ProbeError(ServerError):
    """A server cannot be probed; says why."""


class Window(NamedTuple):
    """A piece of text to score."""

    prompt: list[int]
    forced: list[int]
    text: str
    """What the forced tokens say."""


class Position(NamedTuple):
    """What a server thought of one token."""

    token: str
    logprob: float
    top: Mapping[str, float]
    """Log-probabilities of the likeliest tokens, by their text; the token itself is among them."""


Scores = list[list[Position]]
"""Per window, per decode row."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a server's distributions compare with the reference's."""

    tokens: int
    perplexity: float
    perplexity_reference: float
    top1: float
    """Share of positions with the same likeliest token."""
    kl_mean: float
    """KL(reference || server), nats per token, a lower bound."""
    kl_p99: float
    covered: float
    """Mean probability that the reference gives to the tokens it lists; the less, the looser the bound."""
    kl_interval: Interval | None
    """95%, by bootstrap over windows."""


def windows(source: TextSource, count: int, context: int, scored: int) -> list[Window]:
    """`count` pieces of real text: `context` tokens of prompt, then tokens to force so that `scored` come from decode rows."""
    found = []
    for i in range(count):
        tokens = source.tokens(context + scored + 1, f"agreement {i}")
        found.append(Window(tokens[:context], tokens[context:], source.decode(tokens[context:])))
    return found


def score(url: str, model: str, pieces: Sequence[Window], api_key: str | None = None) -> Scores:
    """What a server thinks of every piece. Raises ProbeError if it does not answer, or does not force tokens."""

    async def ask() -> Scores:
        async with Completions(url, model, api_key=api_key) as server:
            return [_positions(piece, await server.force(piece.prompt, piece.forced, TOP)) for piece in pieces]

    try:
        return asyncio.run(ask())
    except ProbeError:
        raise
    except ServerError as error:
        raise ProbeError(f"the server could not be asked to score given tokens: {error}") from None


def _positions(piece: Window, choice: Mapping[str, Any]) -> list[Position]:
    if str(choice.get("text", "")).strip() != piece.text.strip():
        raise ProbeError("the server generates tokens of its own where given ones are asked for (no forced_tokens)")
    given = choice.get("logprobs") or {}
    tokens, values, tops = (given.get(key) or [] for key in ("tokens", "token_logprobs", "top_logprobs"))
    if not len(tokens) == len(values) == len(tops) == len(piece.forced):
        raise ProbeError(f"the server gave {len(values)} log-probabilities for {len(piece.forced)} tokens")
    return [Position(token, value, {**top, token: value}) for token, value, top in zip(tokens, values, tops)][1:]


def compare(reference: Scores, found: Scores) -> Agreement:
    """Agreement of a server with the reference on the same pieces. Raises ProbeError if they are not the same."""
    pairs = [(i, a, b) for i, (ours, theirs) in enumerate(zip(reference, found)) for a, b in zip(ours, theirs)]
    if not pairs or [len(part) for part in reference] != [len(part) for part in found]:
        raise ProbeError("the servers did not score the same tokens")
    blocks = [i for i, _, _ in pairs]
    divergence = np.array([kl(a, b) for _, a, b in pairs])
    return Agreement(
        tokens=len(pairs),
        perplexity=math.exp(-float(np.mean([b.logprob for _, _, b in pairs]))),
        perplexity_reference=math.exp(-float(np.mean([a.logprob for _, a, _ in pairs]))),
        top1=float(np.mean([likeliest(a.top) == likeliest(b.top) for _, a, b in pairs])),
        kl_mean=float(divergence.mean()),
        kl_p99=float(np.percentile(divergence, 99)),
        covered=float(np.mean([sum(map(math.exp, a.top.values())) for _, a, _ in pairs])),
        kl_interval=bootstrap(divergence, blocks),
    )


def kl(reference: Position, found: Position) -> float:
    """KL(reference || found) in nats over the reference's listed tokens and one bucket for the rest; a lower bound."""
    p = {token: math.exp(value) for token, value in reference.top.items()}
    q = {token: math.exp(value) for token, value in found.top.items()}
    listed = [value for token, value in q.items() if token != found.token] or [1.0]
    most = min(listed)  # no token that is not listed is likelier
    named = sum(value * math.log(value / max(LEAST, q.get(token, most))) for token, value in p.items() if value > 0)
    rest_p, rest_q = (max(LEAST, 1 - sum(part)) for part in (p.values(), [q[token] for token in p if token in q]))
    return max(0.0, named + rest_p * math.log(rest_p / rest_q))
