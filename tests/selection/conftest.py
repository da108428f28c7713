"""An oracle for selection methods: attention as a dense softmax under a mask, written without the engine's own paths.

`Traced` wraps an engine's kernels and keeps, for every attention call, what every row saw; `masked_attention` computes the same
from the whole cache with -inf where nothing may be seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.calibration import HeadClasses
from kvloom.engine.requests.plan import StepPlan
from kvloom.engine.requests.request import KVOptions, Request, RequestOutput
from kvloom.engine.selection import Geometry
from kvloom.engine.selection.razor_view import RazorViewOptions
from kvloom.kernels.interface import Folded, PagedKV, Rows
from kvloom.kernels.reference import visible
from tests.conftest import write_tokenizer


class Call(NamedTuple):
    """One attention call: its rows, what they saw, inputs and output (copies)."""

    rows: Rows
    seen: list[list[Tensor]]
    """[row][kv head]: positions."""
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float
    dense: bool
    """Whether it is that of the rows that no method decides for."""
    left_out: bool
    """Whether it was made in two, each of which left heads out."""
    compensated: tuple[int, ...]
    """KV heads with one more position for what was folded."""


class Traced:
    """Kernels that keep every call of `attend`."""

    def __init__(self, kernels: Any, attention: Any) -> None:
        self._kernels, self._attention = kernels, attention
        self.calls: list[Call] = []
        self._partial: Call | None = None
        """The last one, if it left heads out."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def attend(self, q: Tensor, kv: PagedKV, plan: Any, *, scale: float, out: Tensor, heads: Tensor | None = None,
               positions: Tensor | None = None, folded: Folded | None = None, **wanted: Any) -> Tensor:  # fmt: skip
        more = {"heads": heads, "positions": positions, "folded": folded, **wanted}
        result: Tensor = self._kernels.attend(q, kv, plan, scale=scale, out=out, **more)
        seen = visible(plan.rows, kv.k.shape[1], heads, positions)
        rows = plan.rows._replace(  # the originals are the engine's work space
            tables=plan.rows.tables.clone(), request=plan.rows.request.clone(), start=plan.rows.start.clone(),
            stop=plan.rows.stop.clone()
        )  # fmt: skip
        dense = any(plan is other for other in self._attention._plans.values())
        present = [head for head in range(kv.k.shape[1]) if heads is None or heads[head] >= 0]
        compensated = () if folded is None else tuple(present)
        call = Call(rows, seen, q.clone(), kv.k.clone(), kv.v.clone(), result.clone(), scale, dense, False, compensated)
        if self._partial is not None:  # the other heads of the same rows
            seen = [[torch.cat(pair) for pair in zip(*of_row)] for of_row in zip(self._partial.seen, seen)]
            self.calls[-1], self._partial = call._replace(seen=seen, left_out=True), None
            return result
        self._partial = call if heads is not None and (heads < 0).any() else None
        self.calls.append(call)
        return result


def masked_attention(call: Call, compensated: Collection[int] | None = None) -> Tensor:
    """The call's output from dense logits over the whole sequence with -inf outside what was seen: [rows, heads, dim] fp64.

    compensated: KV heads with one more token, the mean of all they do not see, as often as there are of those; by default those
    of the call.
    """
    compensated = call.compensated if compensated is None else compensated
    rows, group = call.rows, call.q.shape[1] // call.k.shape[1]
    out = torch.zeros(call.q.shape, dtype=torch.float64)
    for row in range(rows.size):
        stop = int(rows.stop[row])
        table = rows.tables[int(rows.request[row])].long()
        for head in range(call.q.shape[1]):
            k = call.k[table, head // group].flatten(0, 1)[:stop].double()
            v = call.v[table, head // group].flatten(0, 1)[:stop].double()
            logits = k @ call.q[row, head].double() * call.scale
            mask = torch.full((stop,), -math.inf, dtype=torch.float64)
            mask[call.seen[row][head // group].long()] = 0.0
            if head // group in compensated and (unseen := mask.isinf()).any():
                token = k[unseen].mean(0) @ call.q[row, head].double() * call.scale + math.log(int(unseen.sum()))
                weights = torch.softmax(torch.cat([logits + mask, token[None]]), 0)
                out[row, head] = weights @ torch.cat([v, v[unseen].mean(0)[None]])
            else:
                out[row, head] = torch.softmax(logits + mask, 0) @ v
    return out


@pytest.fixture(autouse=True)
def retrieval_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models have no calibration: all heads of the first layer are retrieval heads, and one of every other."""

    def classes(options: RazorViewOptions, geometry: Geometry) -> HeadClasses:
        heads = [(0, head) for head in range(geometry.kv_heads)]
        heads += [(layer, (layer - 1) % geometry.kv_heads) for layer in range(1, geometry.layers)]
        return HeadClasses.of(heads, geometry.layers, geometry.kv_heads)

    monkeypatch.setattr("kvloom.engine.selection.razor_view.head_classes", classes)


@pytest.fixture
def trace() -> Iterator[Callable[[LLM], Traced]]:
    """Puts `Traced` into an engine's attention for the duration of a test."""
    undo: list[tuple[Any, Any]] = []

    def start(llm: LLM) -> Traced:
        runner: Any = llm.core.runner
        undo.append((runner, runner._kernels))
        runner.decoder._most = "none"
        runner._kernels = runner._attention._kernels = traced = Traced(runner._kernels, runner._attention)
        return traced

    yield start
    for runner, kernels in undo:
        runner._kernels = runner._attention._kernels = kernels


def greedy(tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **more)


def logprobs_of(llm: LLM, prompts: list[list[int]], tokens: int, kv: KVOptions = KVOptions(), **more: Any) -> list[list[float]]:
    """Log-probabilities of greedy continuations, all in one batch."""
    results = llm.generate(prompts, greedy(tokens, logprobs=0, **more), kv=kv)
    return [[entry.logprob for entry in result.logprobs] for result in results]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of seven layers, two KV heads of 16 and twice as many query heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("deep")
    vocab = write_tokenizer(folder)
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=7,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                         max_position_embeddings=512, bos_token_id=None, eos_token_id=2, pad_token_id=None,
                         initializer_range=0.15)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def stepped(
    llm: LLM, requests: Sequence[Request], lose: Callable[[int], int | None] = lambda step: None
) -> Iterator[RequestOutput]:
    """What requests get in one batch. lose: which of them loses its blocks before a step, in so many steps that everybody loses
    them more than once, and all finish."""
    core, steps = llm.core, 0
    for request in requests:
        core.add(request)
    while core.busy:
        steps += 1
        which = lose(steps) if steps < 60 else None
        if which is not None and requests[which] in core._scheduler.running:
            core._scheduler._preempt(requests[which], StepPlan([], []))
        yield from core.step()
        core.check()
