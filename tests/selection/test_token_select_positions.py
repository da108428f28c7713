"""Re-indexed positions (T8), and with them sequences beyond the model's trained length."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from kvloom import kernels
from kvloom.engine import LLM
from kvloom.engine.client import MethodStats
from kvloom.engine.errors import ConfigError, ContextLengthError
from kvloom.engine.model.rope import RopeConfig, rotary_table
from kvloom.engine.requests.request import KVOptions
from kvloom.engine.requests.state import StateMemory
from kvloom.engine.requests.traits import Layer
from kvloom.engine.selection import Batch, Geometry, Scratch
from kvloom.engine.selection.token_select_positions import Reindexed, TurnBack, neutral_query, neutral_scores
from kvloom.kernels.interface import PagedKV, Rows
from kvloom.kernels.reference import ReferenceKernels
from tests.selection.conftest import greedy

Make = Callable[..., LLM]
SIZE, HEADS, GROUP, DIM, LONGEST = 8, 2, 3, 16, 400
LONG: dict[str, Any] = {
    "max_model_len": 1024, "selection": "token_select", "budget": 96,
    "selection_options": '{"positions": "reindexed", "prefill_budget": 128, "chunk": 64}',
}  # fmt: skip


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(300) for _ in range(length)]


class World(NamedTuple):
    """Keys and queries before rotation, and a batch over a cache that holds the keys rotated at true positions."""

    keys: list[Tensor]
    """Per run: [positions, kv_heads, dim] fp64, un-rotated."""
    values: list[Tensor]
    queries: Tensor
    """[rows, q_heads, dim] fp64, un-rotated."""
    batch: Batch
    layer: Layer


def turned(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """x: [n, heads, dim] fp64, rotated to positions."""
    return ReferenceKernels().rotate(x, positions.int(), inv_freq, torch.empty_like(x))


def world(backend: str, stops: list[int], counts: list[int]) -> World:
    generator = torch.Generator().manual_seed(3)
    table = rotary_table(RopeConfig(dim=DIM), LONGEST)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    keys, values = [draw(stop, HEADS, DIM) for stop in stops], [draw(stop, HEADS, DIM) for stop in stops]
    queries = draw(sum(counts), GROUP * HEADS, DIM)
    back_end, most = kernels.load(backend), LONGEST // SIZE
    kv = PagedKV(*(torch.zeros(len(stops) * most, HEADS, SIZE, DIM) for _ in range(2)))
    tables = torch.randperm(len(stops) * most, generator=generator).int().view(len(stops), most)
    for i, stop in enumerate(stops):
        at = torch.arange(stop)
        slots = tables[i, at // SIZE].long() * SIZE + at % SIZE
        back_end.store(turned(keys[i], at, table.inv_freq).float(), values[i].float(), kv, slots)
    true = torch.cat([torch.arange(stop - count, stop) for stop, count in zip(stops, counts)])
    heads = (tuple(range(HEADS)),)
    geometry = Geometry(1, GROUP * HEADS, HEADS, DIM, LONGEST, LONGEST, table.inv_freq, "", SIZE, heads)
    runs = len(stops)
    batch = Batch(
        requests=[], counts=np.array(counts, np.int32), begins=np.array(stops, np.int32) - np.array(counts, np.int32),
        tables=tables, of=np.arange(runs, dtype=np.int32), read=torch.zeros(sum(counts), dtype=torch.int64),
        kernels=back_end, geometry=geometry, scratch=Scratch(), states=StateMemory(0), stats=MethodStats(),
    )  # fmt: skip
    return World(keys, values, queries, batch, Layer(0, turned(queries, true, table.inv_freq).float(), kv))


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_keys_stand_at_their_place_in_the_list(backend: str) -> None:
    """Two runs, a cell of five rows and a decode row: keys rotated at 0, 1, 2 ... and each query at the last place it sees."""
    stops, counts, width, starts = [395, 140], [5, 1], 24, [370, 131]
    here = world(backend, stops, counts)
    generator = torch.Generator().manual_seed(5)
    lists = [torch.randperm(start, generator=generator)[:width].sort().values for start in starts]
    own = Reindexed(here.batch, np.arange(2), np.array(starts, np.int32), width, SIZE)
    assert own.counts.tolist() == [width + 25, width + 9]
    out = torch.zeros(6, GROUP * HEADS, DIM)
    own.attend(here.layer, torch.stack(lists).int(), out)
    inv_freq, row = here.batch.geometry.inv_freq, 0
    for run, (stop, count) in enumerate(zip(stops, counts)):
        for position in range(stop - count, stop):
            seen = torch.cat([lists[run], torch.arange(starts[run], position + 1)])
            keys = turned(here.keys[run][seen], torch.arange(len(seen)), inv_freq)
            query = turned(here.queries[row : row + 1], torch.tensor([len(seen) - 1]), inv_freq)[0]
            for head in range(GROUP * HEADS):
                weights = torch.softmax(keys[:, head // GROUP] @ query[head] / math.sqrt(DIM), 0)
                expected = weights @ here.values[run][seen, head // GROUP]
                torch.testing.assert_close(out[row, head].double(), expected, atol=2e-5, rtol=0)
            row += 1


def test_a_complete_list_changes_nothing() -> None:
    """T8: with every position in the list, re-indexed attention is the dense one."""
    here = world("native", [200, 90], [1, 3])
    lists = torch.arange(64, dtype=torch.int32).expand(2, -1)
    out, dense = torch.zeros(4, GROUP * HEADS, DIM), torch.zeros(4, GROUP * HEADS, DIM)
    Reindexed(here.batch, np.arange(2), np.array([64, 64], np.int32), 64, SIZE).attend(here.layer, lists, out)
    request, stop = torch.tensor([0, 1, 1, 1], dtype=torch.int32), torch.tensor([200, 88, 89, 90], dtype=torch.int32)
    rows = Rows(here.batch.tables, request, torch.zeros(4, dtype=torch.int32), stop)
    back_end = here.batch.kernels
    back_end.attend(here.layer.q, here.layer.kv, back_end.plan(rows, GROUP * HEADS, HEADS, DIM), scale=DIM**-0.5, out=dense)
    torch.testing.assert_close(out, dense, atol=2e-6, rtol=0)


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_votes_do_not_look_at_positions(backend: str) -> None:
    """Every candidate is scored as if `local` tokens before the query, wherever it is."""
    here, local = world(backend, [200, 91], [1, 1]), 12
    batch, first, last = here.batch, np.array([4, 7], np.int32), np.array([188, 80], np.int32)
    table = np.array([0, 1], np.int32)
    q = neutral_query(batch, here.layer.q, batch.begins, local)
    turn_back = TurnBack(np.arange(LONGEST, dtype=np.int32), batch.geometry.inv_freq)
    found = neutral_scores(batch, turn_back, q, here.layer.kv, table, first, last, 1.0)
    at = torch.tensor([local, local])
    queries = turned(here.queries, at, batch.geometry.inv_freq)
    for run in range(2):
        for head in range(GROUP * HEADS):
            expected = here.keys[run][first[run] : last[run], head // GROUP] @ queries[run, head]
            torch.testing.assert_close(found[run, head, : len(expected)].double(), expected, atol=1e-4, rtol=0)


def test_reindexed_prompts_beyond_the_trained_length(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 512 positions reads 700: every row's window stays inside what was trained, and output is finite."""
    counts: list[int] = []
    attend = Reindexed.attend

    def counted(self: Reindexed, *arguments: Any) -> None:
        counts.extend(self.counts.tolist())
        attend(self, *arguments)

    monkeypatch.setattr(Reindexed, "attend", counted)
    llm = make_llm(**LONG)
    assert llm.model.max_model_len == 1024
    result = llm.generate([prompt(700)], greedy(40, logprobs=0, prompt_logprobs=0))[0]
    assert result.prompt_logprobs is not None and len(result.prompt_logprobs) == 700
    values = [entry.logprob for entry in (*result.prompt_logprobs[1:], *result.logprobs) if entry is not None]
    assert len(values) == 739 and all(math.isfinite(value) for value in values)
    assert max(counts) <= 128 + 64 and min(counts) == 96
    assert result.usage is not None
    assert 39 * 96 <= result.usage.attended_tokens < 39 * (96 + 128) < result.usage.held_tokens
    again = llm.generate([prompt(700)], greedy(40, logprobs=0))[0]
    assert again.usage is not None and again.usage.cached_tokens == 640
    assert [e.logprob for e in again.logprobs] == pytest.approx([e.logprob for e in result.logprobs], abs=1e-4)


def test_output_may_grow_beyond_the_trained_length(make_llm: Make) -> None:
    llm = make_llm(**LONG)
    result = llm.generate([prompt(500)], greedy(60, logprobs=0))[0]
    assert len(result.tokens) == 60 and all(math.isfinite(entry.logprob) for entry in result.logprobs)


def test_lists_never_leave_the_trained_length(make_llm: Make) -> None:
    """Without any other bound on the gap, a list is made anew before positions would leave what was trained."""
    llm = make_llm(**LONG)
    kv = KVOptions(budget=480, options={"positions": "reindexed", "prefill_budget": 128, "chunk": 64, "theta": -1.0,
                                        "max_gap": None})  # fmt: skip
    result = llm.generate([prompt(490)], greedy(70), kv=kv)[0]
    stats = llm.stats().selection["token_select"]
    assert stats.selections == 3 * 6 + 3 * 3  # cells of the prompt; at 491 tokens, and whenever the gap exceeds 32
    assert result.usage is not None and result.usage.attended_tokens <= 69 * 512


def test_below_the_budget_positions_are_true_ones(make_llm: Make) -> None:
    """Nothing is dropped, so nothing moves: bit for bit dense."""
    llm = make_llm(reuse="off")
    dense = llm.generate([prompt(60)], greedy(8, logprobs=0))[0]
    kv = KVOptions(selection="token_select", budget=80, options={"positions": "reindexed", "prefill_budget": 80, "chunk": 32})
    assert llm.generate([prompt(60)], greedy(8, logprobs=0), kv=kv)[0].logprobs == dense.logprobs


def test_only_reindexed_sparse_prompts_go_beyond(make_llm: Make) -> None:
    options = {"positions": "reindexed"}
    for default in ({}, {"selection": "sink_window"}, {"selection": "token_select"},
                    {"selection": "token_select", "selection_options": '{"positions": "reindexed"}'},
                    {"selection": "token_select", "selection_options": '{"prefill_budget": 128, "chunk": 64}'}):  # fmt: skip
        with pytest.raises(ConfigError, match="max_model_len is 1024, but this model was trained for 512"):
            make_llm(max_model_len=1024, budget=96, **default)
    llm = make_llm(**LONG)
    for kv in (KVOptions(selection="dense"), KVOptions(selection="token_select", options=options),
               KVOptions(selection="token_select", options={"prefill_budget": 128, "chunk": 64})):  # fmt: skip
        with pytest.raises(
            ContextLengthError,
            match=r"^This model's maximum context length is 512 tokens\. However, the prompt has 600 tokens.*re-indexed",
        ):
            llm.generate([prompt(600)], greedy(2), kv=kv)
        with pytest.raises(ContextLengthError, match=r"the prompt has 450 tokens and max_tokens is 100; ask for at most 62"):
            llm.generate([prompt(450)], greedy(100), kv=kv)
    dense = llm.generate([prompt(505)], greedy(None), kv=KVOptions(selection="dense"))[0]
    assert len(dense.tokens) == 7 and dense.finish_reason == "length"
    with pytest.raises(ContextLengthError, match="maximum context length is 1024 tokens"):
        llm.generate([prompt(1024)], greedy(1))
