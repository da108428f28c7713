"""Preemption that does not show: what was computed as decode rows is computed as decode rows again.

A preempted request has lost its KV. A decode row that read less than everything left other KV than a pass over a prompt would
leave, so what such rows computed is not made part of the prompt: its tokens are taken off the known ones, and come back one by
one, each after the row that was computed before it.

    known tokens   [0, kept)     prompt, and what was computed like a prompt    computed as a prompt again, or found
                   [kept, n)     `Request.replay`                               a decode row each, nothing is sampled

A selection method's state begins empty (`engine.requests.state`), so it chooses what it chose before, and the tokens
that follow are those of a request that was never preempted.
"""

from __future__ import annotations

from kvloom.engine.requests.request import Request


def rewind(request: Request, *, evicted: bool) -> None:
    """The request's KV is given up. evicted: part of its KV had been dropped before (`engine.retention`)."""
    request.drop_drafts()
    kept = request.prefill = _kept(request, evicted)
    request.replay[:0] = request.tokens[kept:]
    del request.tokens[kept:]
    request.computed = request.exact = 0
    request.repair, request.looks, request.correcting = None, None, False


def replay_next(request: Request) -> None:
    """The row in front of the first token to be replayed has been computed: the token is known again."""
    append(request, request.replay.pop(0))
    correct(request)


def append(request: Request, token: int) -> None:
    """One more token is known; all before it are computed."""
    if request.correcting:
        request.corrected = len(request.tokens)
    request.tokens.append(token)


def correct(request: Request) -> None:
    """Cache correction: once enough tokens have approximate KV, the next rows compute them again, densely, in place."""
    request.correcting = False
    if request.correct_every and len(request.tokens) - 1 - request.exact >= request.correct_every:
        assert request.selector is not None
        request.computed, request.correcting = request.exact, True
        request.selector.stats.refreshes += 1


def _kept(request: Request, evicted: bool) -> int:
    """Tokens in front that a pass over a prompt computes as they were.

    Up to a method's budget decode rows see everything and leave no state; what is exact is then as a prompt's. Drafts are
    verified by rows that no method decides for.
    """
    known, selector = len(request.tokens), None if request.draft_tokens else request.selector
    if selector is None and not evicted:
        return known
    exact = request.exact if selector is None else min(request.exact, selector.budget)
    return min(known, max(len(request.prompt), request.corrected, exact))
