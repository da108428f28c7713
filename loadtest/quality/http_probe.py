"""Quality of a server as its clients get it: agreement with a reference server on the same text, token by token.

Teacher-forced through the decode path: after a prompt the server is made to generate given tokens (kvloom's `forced_tokens` on
/v1/completions) and says the log-probability of each and the likeliest alternatives. The first forced token is scored from the
prompt's last row, not from a decode row, and is left out.

KL is taken over the tokens that the reference lists, with all others as one bucket. Where the server does not list a token, its
probability is at most that of the last one it does list; that bound is used, so the figure is a lower bound of the full KL.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kvloom.engine.errors import KVLoomError
from kvloom.loadtest.study.intervals import Interval, bootstrap
from kvloom.loadtest.workloads.corpus import TextSource

TOP = 20
LEAST = 1e-9
"""Probability below which the rest of a distribution counts as this much."""
TIMEOUT = 600.0


class ProbeError(KVLoomError):
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
    return [_positions(piece, _ask(url, model, piece, api_key)) for piece in pieces]


def _ask(url: str, model: str, piece: Window, api_key: str | None) -> Mapping[str, Any]:
    body = {"model": model, "prompt": piece.prompt, "max_tokens": len(piece.forced), "forced_tokens": piece.forced,
            "logprobs": TOP, "temperature": 0, "ignore_eos": True}  # fmt: skip
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
            choice: Mapping[str, Any] = json.load(reply)["choices"][0]
            return choice
    except urllib.error.HTTPError as error:
        said = " ".join(error.read(400).decode(errors="replace").split())
        raise ProbeError(f"the server refused to score given tokens: HTTP {error.code} {said}") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ProbeError(f"the server did not answer a request for scores: {error}") from None


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
        top1=float(np.mean([likeliest(a) == likeliest(b) for _, a, b in pairs])),
        kl_mean=float(divergence.mean()),
        kl_p99=float(np.percentile(divergence, 99)),
        covered=float(np.mean([sum(map(math.exp, a.top.values())) for _, a, _ in pairs])),
        kl_interval=bootstrap(divergence, blocks),
    )


def likeliest(position: Position) -> str:
    return max(position.top, key=lambda token: position.top[token])


def kl(reference: Position, found: Position) -> float:
    """KL(reference || found) in nats over the reference's listed tokens and one bucket for the rest; a lower bound."""
    p = {token: math.exp(value) for token, value in reference.top.items()}
    q = {token: math.exp(value) for token, value in found.top.items()}
    listed = [value for token, value in q.items() if token != found.token] or [1.0]
    most = min(listed)  # no token that is not listed is likelier
    named = sum(value * math.log(value / max(LEAST, q.get(token, most))) for token, value in p.items() if value > 0)
    rest_p, rest_q = (max(LEAST, 1 - sum(part)) for part in (p.values(), [q[token] for token in p if token in q]))
    return max(0.0, named + rest_p * math.log(rest_p / rest_q))
