"""How far a method's distributions are from dense ones, token by token.

Dense distributions are kept once per text, as fp16 log-probabilities (2 bytes per vocabulary entry and token), a window at a
time. Both sides are rounded alike, so that an engine agrees with itself exactly. With rounded p and q neither sums to one, so
the divergence is the generalised one,

    sum_v  p (log p - log q) - p + q        >= 0 term by term, and KL(p || q) where both sum to one

in which rounding enters only in second order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvloom.engine import LLM
from kvloom.engine.requests.request import KVOptions
from kvloom.loadtest.quality.decoding import Cost, Passage, follow
from kvloom.loadtest.study.intervals import bootstrap, exponential

BLOCK = 32
"""Tokens of a text that the bootstrap draws together."""


def divergence(reference: Tensor, found: Tensor) -> Tensor:
    """Generalised KL(reference || found) in nats. Both: [..., vocab] log-probabilities. Returns [...] fp32."""
    log_p, log_q = reference.float(), found.float()
    p = log_p.exp()
    return (p * (log_p - log_q) - p + log_q.exp()).sum(-1)


class Scores:
    """Per scored token of every window: [windows, scored] arrays, NaN where nothing was measured yet."""

    def __init__(self, windows: int, scored: int) -> None:
        self.loss, self.kl, self.same = (np.full((windows, scored), np.nan) for _ in range(3))
        self.cost = Cost()

    def figures(self, dense: Scores) -> dict[str, Any]:
        """Means over all tokens with 95% intervals (`*_ci`), drawn by blocks of BLOCK tokens."""
        done = ~np.isnan(self.kl)
        windows, positions = np.nonzero(done)
        blocks = windows * 1_000_000 + positions // BLOCK
        kl, same, loss, exact = (a[done] for a in (self.kl, self.same, self.loss, dense.loss))
        p99: Callable[[Any], float] = lambda values: float(np.quantile(values, 0.99))  # noqa: E731
        return {
            "n": int(done.sum()),
            "kl_mean": float(kl.mean()),
            "kl_mean_ci": bootstrap(kl, blocks),
            "kl_p99": p99(kl),
            "kl_p99_ci": bootstrap(kl, blocks, p99, resamples=400),
            "top1": float(same.mean()),
            "top1_ci": bootstrap(same, blocks),
            "ppl": float(np.exp(loss.mean())),
            "ppl_ci": exponential(bootstrap(loss, blocks)),
            "ppl_dense": float(np.exp(exact.mean())),
        }


class Agreement:
    """Texts, and what the dense engine thinks of every scored token of them."""

    def __init__(self, llm: LLM, passages: Sequence[Passage], batch: int) -> None:
        """All passages force the same number of tokens; the first one's distribution comes from a prompt row and is not
        scored. Windows run `batch` at once."""
        lengths = {len(passage.forced) for passage in passages}
        if len(lengths) != 1 or min(lengths) < 2:
            raise ValueError(f"passages force {sorted(lengths)} tokens; give all the same number, 2 or more")
        self._llm, self.passages, self.batch = llm, list(passages), batch
        self.scored = lengths.pop() - 1
        self._reference: dict[int, Tensor] = {}
        self._likeliest = np.zeros((len(passages), self.scored), np.int64)
        self.dense = Scores(len(passages), self.scored)

    def remember_dense(self, done: Callable[[], None] = lambda: None) -> None:
        """Compute the reference; `done` is called after every batch."""
        self.dense = self.measure(KVOptions(selection="dense"), done, keep=True)

    @property
    def batches(self) -> int:
        return -(-len(self.passages) // self.batch)

    def measure(
        self, kv: KVOptions, done: Callable[[], None] = lambda: None, *, on: LLM | None = None, keep: bool = False
    ) -> Scores:
        """Compare a method with the reference. on: another engine of the same model, such as one that keeps less; keep: it is
        the reference itself.

        Raises InvalidRequestError if the method cannot be used.
        """
        scores = Scores(len(self.passages), self.scored)
        for first in range(0, len(self.passages), self.batch):

            def observe(number: int, index: int, logits: Tensor, first: int = first) -> None:
                self._score(scores, first + number, index, logits, keep)

            found = follow(on or self._llm, self.passages[first : first + self.batch], kv, observe=observe)
            scores.cost.add(found.cost)
            done()
        return scores

    def _score(self, scores: Scores, window: int, index: int, logits: Tensor, keep: bool) -> None:
        found = torch.log_softmax(logits, dim=-1)
        rounded = found.half()
        if keep:
            if window not in self._reference:
                self._reference[window] = torch.empty(self.scored, len(logits), dtype=torch.float16)
            self._reference[window][index - 1] = rounded
            self._likeliest[window, index - 1] = int(logits.argmax())
        reference = self._reference[window][index - 1]
        scores.loss[window, index - 1] = -float(found[self.passages[window].forced[index]])
        scores.kl[window, index - 1] = float(divergence(reference, rounded))
        scores.same[window, index - 1] = float(self._likeliest[window, index - 1] == int(logits.argmax()))
