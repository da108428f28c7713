"""Log-probabilities of tokens, for outputs and prompts alike.

On raw logits: before temperature, penalties and filters, so they do not depend on how a request samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvloom.engine.requests.request import TokenLogprob

_ROWS = 64  # at a time: bounds the memory for a long prompt's rows


def logprobs(logits: torch.Tensor, tokens: Sequence[int], top: int, instead: Sequence[int] = ()) -> list[TokenLogprob]:
    """Per row: the natural-log probability and rank of a given token, and the `top` likeliest, or those `instead` of them.

    logits: [n, vocab], any float type; tokens: n ids; 0 <= top <= vocab; instead: ids, whose order is kept. Rank 1 is the
    likeliest; equals rank by id. Computed in fp32. A row with NaN gives NaN; check rows first (`Sampler.sample` does).
    """
    found: list[TokenLogprob] = []
    for start in range(0, len(tokens), _ROWS):
        rows = torch.log_softmax(logits[start : start + _ROWS].float(), dim=-1).cpu()
        found += _of_rows(rows, tokens[start : start + _ROWS], top, instead)
    return found


def _of_rows(rows: torch.Tensor, tokens: Sequence[int], top: int, instead: Sequence[int]) -> list[TokenLogprob]:
    """rows: [n, vocab] fp32 log-probabilities."""
    own = rows.gather(1, torch.tensor(tokens, dtype=torch.int64)[:, None])
    above = (rows > own).sum(dim=1).tolist()
    equal = [int((row[:token] == value).sum()) for row, token, value in zip(rows, tokens, own)]
    tops = _given(rows, instead) if instead else _likeliest(rows, top)
    return [
        TokenLogprob(token, value, 1 + more + same, best)
        for token, value, more, same, best in zip(tokens, own[:, 0].tolist(), above, equal, tops)
    ]


def _given(rows: torch.Tensor, tokens: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    values = rows[:, list(tokens)].tolist()
    return [tuple(zip(tokens, row)) for row in values]


def _likeliest(rows: torch.Tensor, top: int) -> list[tuple[tuple[int, float], ...]]:
    """The `top` highest of every row, ties to the lower id (torch.topk leaves their order open)."""
    if top == 0:
        return [() for _ in rows]
    lowest = rows.topk(top, dim=1).values[:, -1].tolist()
    return [_above(row.numpy(), low, top) for row, low in zip(rows, lowest)]


def _above(row: np.ndarray, low: float, top: int) -> tuple[tuple[int, float], ...]:
    ids = np.flatnonzero(row >= np.float32(low))
    ids = ids[np.argsort(-row[ids], kind="stable")][:top]
    return tuple((int(i), float(row[i])) for i in ids)
