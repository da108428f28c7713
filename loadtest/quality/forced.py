"""Teacher forcing: what an engine thinks of every token of a given text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.request import Request
from kvloom.engine.scheduling import Chunk, StepPlan


def log_probabilities(llm: LLM, tokens: Sequence[int], chunk: int = 256) -> Iterator[Tensor]:
    """The distribution after every token but the last, in chunks of [rows, vocab] fp32, in order.

    Runs beside the queue, on blocks of its own that it gives back.
    """
    core = llm.core
    request = Request(id="forced", prompt=tokens, sampling=SamplingParams(), tokens=list(tokens))
    table = core.cache.open(core.domain("", ""), publishes=False, looks_up=False)
    try:
        if not core.cache.reserve(table, len(tokens)):
            raise ValueError(f"the KV cache of {core.cache.capacity_tokens} tokens cannot hold a text of {len(tokens)}")
        for start in range(0, len(tokens) - 1, chunk):
            count = min(chunk, len(tokens) - 1 - start)
            result = core.runner.run(StepPlan([Chunk(request, table, start, count)], []))
            yield torch.log_softmax(core.runner.logits(result, list(range(count))), dim=-1)
    finally:
        core.cache.close(table)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How one engine's distributions compare with another's on the same text."""

    tokens: int
    perplexity: float
    kl_mean: float
    """KL(reference || this), nats per token."""
    kl_p99: float
    top1: float
    """Share of positions with the same likeliest token."""


def agreement(llm: LLM, texts: Sequence[Sequence[int]], references: Sequence[Tensor]) -> Agreement:
    """Compare with reference distributions, one [len(text) - 1, vocab] tensor of log-probabilities per text."""
    losses, divergences, same = [], [], []
    for text, reference in zip(texts, references):
        start = 0
        for found in log_probabilities(llm, text):
            wanted = reference[start : start + len(found)].float()
            targets = torch.tensor(text[start + 1 : start + 1 + len(found)])
            losses.append(-found.gather(1, targets[:, None])[:, 0])
            divergences.append((wanted.exp() * (wanted - found)).sum(-1))
            same.append(wanted.argmax(-1) == found.argmax(-1))
            start += len(found)
    loss, divergence = torch.cat(losses), torch.cat(divergences)
    return Agreement(len(loss), float(loss.mean().exp()), float(divergence.mean()), float(divergence.quantile(0.99)),
                     float(torch.cat(same).float().mean()))  # fmt: skip
