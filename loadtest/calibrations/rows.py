"""Decode rows by the hundred: the same arithmetic as decoding given tokens one by one, in a single step.

    text   [0, n - rows)   prompt, computed densely once
           [n - rows, n)   one decode row per token, each a chunk of its own

Row p of a layer depends on rows up to p of that layer alone, and a layer stores the K and V of all rows before any of them
attends. So the rows of one step see exactly what they would see in successive steps, approximate KV of their forerunners
included, and a set of selection layers is judged in the time of a short prompt. Runs beside the queue, on blocks of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from kvloom.engine.cache import BlockTable
from kvloom.engine.errors import ConfigError
from kvloom.engine.llm import LLM
from kvloom.engine.requests.request import Request
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.engine.scheduling import Chunk, StepPlan
from kvloom.engine.selection.base import Selector

_CHUNK = 256


class DecodeRows:
    """Texts whose last tokens are decoded, again and again, under different selectors. A context: blocks go back at its end."""

    def __init__(self, llm: LLM, texts: Sequence[Sequence[int]], rows: int) -> None:
        """rows: decode rows per text. Raises ConfigError if the KV cache cannot hold the texts."""
        self._llm, self._texts, self._rows = llm, texts, rows
        core = llm.core
        needed = sum(core.cache.blocks_for(len(text)) for text in texts) * core.cache.block_size
        if needed > core.cache.pool.available * core.cache.block_size:
            raise ConfigError(f"{len(texts)} texts need {needed} tokens of KV cache; it has {core.cache.capacity_tokens}")
        self._tables: list[BlockTable] = []

    def __enter__(self) -> DecodeRows:
        cache = self._llm.core.cache
        for text in self._texts:
            table = cache.open(self._llm.core.domain("", ""), publishes=False, looks_up=False)
            self._tables.append(table)
            cache.reserve(table, len(text))
            self._prompt(table, list(text))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for table in self._tables:
            self._llm.core.cache.close(table)
        self._tables.clear()

    def log_probs(self, selector: Selector | None) -> Tensor:
        """[texts * rows, vocab] fp32 natural-log probabilities after every decode row; None: dense rows."""
        runner = self._llm.core.runner
        result = runner.run(StepPlan(self._chunks(selector), []))
        return torch.log_softmax(runner.logits(result, result.starts), dim=-1)

    def run(self, selector: Selector) -> None:
        """Only let the selector's hook see every layer."""
        self._llm.core.runner.run(StepPlan(self._chunks(selector), []))

    def _prompt(self, table: BlockTable, text: list[int]) -> None:
        stop = len(text) - self._rows
        request = Request(id="prompt", prompt=text, sampling=SamplingParams(), tokens=text)
        for start in range(0, stop, _CHUNK):
            chunk = Chunk(request, table, start, min(_CHUNK, stop - start))
            self._llm.core.runner.run(StepPlan([chunk], []))

    def _chunks(self, selector: Selector | None) -> list[Chunk]:
        chunks = []
        for text, table in zip(self._texts, self._tables):
            first = len(text) - self._rows
            for position in range(first, len(text)):
                tokens = list(text[: position + 1])
                request = Request(id="row", prompt=tokens[:first], sampling=SamplingParams(), tokens=tokens, selector=selector)
                chunks.append(Chunk(request, table, position, 1))
        return chunks
