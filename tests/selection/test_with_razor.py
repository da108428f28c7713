"""Selection methods on the retrieval heads of retention razor: against a plain torch model in which every head sees what it is
said to see, and what must hold whatever a method selects: exactness within the budget, batches, drafts, preemption."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kvloom.engine import LLM
from kvloom.engine.calibration import RazorCalibration, TidalCalibration, TidalChoice
from kvloom.engine.requests.request import KVOptions, Request
from kvloom.engine.selection.geometry import Geometry
from kvloom.engine.selection.tidal_decode import TidalDecode, TidalDecodeOptions
from kvloom.kernels.reference import ReferenceKernels
from tests.engine import test_razor
from tests.selection.conftest import greedy, stepped

Make = Callable[..., LLM]
LAYERS, HEADS, GROUP, DIM = 7, 2, 2, 16
RETRIEVAL = ((0, 1), (), (1,), (0, 1), (0,), (), (0, 1))
"""By layer: two, one or no heads."""
BLOCK, BUDGET, SINKS = 16, 24, 3
OPTIONS = '{"induction_share": 0.55, "echo_share": 0.0, "sinks": 3, "min_window": 24, "window_divisor": 4}'
DENSE = KVOptions()


@pytest.fixture
def razor(deep: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Builds engines that evict; afterwards proves that each gave everything back."""
    scores = tuple(tuple(float(head in heads) for head in range(HEADS)) for heads in RETRIEVAL)
    found = RazorCalibration(model_key="", model="deep", induction=scores, echo=scores)
    monkeypatch.setattr("kvloom.engine.retention.window.find_razor", lambda key: found)
    made: list[LLM] = []

    def build(**config: Any) -> LLM:
        settings = {"dtype": "fp32", "kv_memory": "16MiB", "step_time_ms": 0, "threads": 1, "reuse": "off",
                    "retention": "razor", "retention_options": OPTIONS}  # fmt: skip
        made.append(LLM(str(deep), **{**settings, **config}))
        assert made[-1].core.runner.geometry.heads == RETRIEVAL
        return made[-1]

    yield build
    for llm in made:
        llm.core.check()
        assert llm.core.cache.bytes_in_use == 0 and llm.stats().selection_bytes == 0


METHODS: dict[str, KVOptions] = {
    "sink_window": KVOptions(selection="sink_window", budget=BUDGET, options={"sinks": SINKS}),
    "tidal_decode": KVOptions(selection="tidal_decode", budget=BUDGET, options={"layers": (1, 4), "sinks": 3, "recent": 6}),
    "tidal_decode, dense output": KVOptions(
        selection="tidal_decode", budget=BUDGET, options={"layers": (1, 4), "sinks": 3, "recent": 6, "output": "dense"}
    ),
    "tidal_decode, one list": KVOptions(selection="tidal_decode", budget=BUDGET, options={"layers": (1, 4), "pool": "all"}),
    "token_select": KVOptions(
        selection="token_select", budget=BUDGET, options={"sinks": 3, "local": 5, "theta": 0.2, "max_gap": 6}
    ),
    "recycled": KVOptions(
        selection="recycled", budget=BUDGET, options={"sinks": 3, "recent": 6, "stride": 9, "check_every": 2, "similarity": 0.2}
    ),
    "recycled, dense refresh": KVOptions(
        selection="recycled", budget=BUDGET, options={"refresh": "dense", "stride": 4, "similarity": -1.0}
    ),
    "recycled, seeded": KVOptions(selection="recycled", budget=BUDGET, options={"seed_rows": 5, "stride": 6}),
    "token_select, sparse prompts": KVOptions(
        selection="token_select", budget=BUDGET, options={"prefill_budget": 40, "chunk": 16}
    ),
}
each_method = pytest.mark.parametrize("name", METHODS)


def texts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 300) for _ in range(length)] for length in lengths]


def run(
    llm: LLM, jobs: Sequence[tuple[list[int], KVOptions]], tokens: int = 24, lose: Callable[[int], int | None] = lambda _: None
) -> list[list[Any]]:
    """Jobs in one batch: every greedy token with its log-probability. lose: which loses its blocks before a step."""
    requests = [
        Request(id=str(i), prompt=text, sampling=greedy(tokens, logprobs=0), kv=kv) for i, (text, kv) in enumerate(jobs)
    ]
    found: dict[str, list[Any]] = {request.id: [] for request in requests}
    for output in stepped(llm, requests, lose):
        assert output.finish_reason != "error"
        found[output.id] += [(entry.token, entry.logprob) for entry in output.logprobs]
    return list(found.values())


def assert_same(found: list[list[Any]], expected: list[list[Any]]) -> None:
    for row, other in zip(found, expected, strict=True):
        assert [token for token, _ in row] == [token for token, _ in other]
        assert [score for _, score in row] == pytest.approx([score for _, score in other], abs=2e-5)


# What rows see -------------------------------------------------------------------------------------------------------------


def best(scores: Tensor, first: int, count: int) -> list[int]:
    """The positions of the best candidates, ascending; ties to the lower. scores: of [first, first + len)."""
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return sorted((order + first).tolist())


class Oracle(test_razor.Oracle):
    """What the retrieval heads of decode rows see, by a method's definition."""

    layers, retrieval = LAYERS, {(layer, head) for layer, heads in enumerate(RETRIEVAL) for head in heads}

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, BLOCK, compensation=True)
        self.known = self.end = self.made = self.reused = 0

    def scores(self, prompt: list[int], after: list[int]) -> list[float]:
        self.known, self.end = len(prompt), len(prompt) + len(after)
        return super().scores(prompt, after)

    def sees(self, layer: int, q: Tensor, n: int) -> dict[int, list[int]]:
        if n <= max(self.known, BUDGET) or n == self.end or not RETRIEVAL[layer]:  # nothing comes of the last row
            return {}
        return self.chosen(layer, q, n)

    def chosen(self, layer: int, q: Tensor, n: int) -> dict[int, list[int]]:
        raise NotImplementedError

    def logits(self, layer: int, q: Tensor, head: int, last: int) -> Tensor:
        """[query heads of the group, last]: products, not scaled."""
        return q[head * GROUP : (head + 1) * GROUP] @ self.k[layer][:last, head].T


class SinkWindow(Oracle):
    def chosen(self, layer: int, q: Tensor, n: int) -> dict[int, list[int]]:
        return {head: [*range(SINKS), *range(n - BUDGET + SINKS, n)] for head in RETRIEVAL[layer]}


class Tidal(Oracle):
    """Layers 1 and 4 choose; 1 has no heads, so 2 does in its place, with one head alone."""

    READS: ClassVar = {2: {1: (2, 1)}, 3: {0: (2, 1), 1: (2, 1)}, 4: {0: (4, 0)}, 6: {0: (4, 0), 1: (4, 0)}}
    """[layer][head]: layer and head whose list is read."""
    output, recent = "sparse", 6

    def chosen(self, layer: int, q: Tensor, n: int) -> dict[int, list[int]]:
        if layer == 0:
            return {}
        if layer in (2, 4):
            self.made = {head: self.made_by(layer, q, head, n) for head in RETRIEVAL[layer]}
            if self.output == "dense":
                return {}
        return {head: [*range(3), *self.made[source], *range(n - 6, n)] for head, (_, source) in self.READS[layer].items()}

    def made_by(self, layer: int, q: Tensor, head: int, n: int) -> list[int]:
        weights = torch.softmax(self.logits(layer, q, head, n) * DIM**-0.5, -1).sum(0)
        return best(weights[3 : n - 6], 3, BUDGET - 9)


class TidalDense(Tidal):
    output = "dense"


class Votes(Oracle):
    """TokenSelect."""

    sinks, local, theta, gap = 3, 5, 0.2, 6

    def scores(self, prompt: list[int], after: list[int]) -> list[float]:
        self.kept: dict[int, tuple[Tensor, list[int], int]] = {}
        return super().scores(prompt, after)

    def chosen(self, layer: int, q: Tensor, n: int) -> dict[int, list[int]]:
        own = torch.cat([q[head * GROUP : (head + 1) * GROUP] for head in RETRIEVAL[layer]])
        query = self.rotate(own[None], torch.tensor([1 - n])).flatten()
        if layer in self.kept:
            before, _, at = self.kept[layer]
            again = n - at <= self.gap and float(torch.cosine_similarity(query, before, dim=0)) >= self.theta
            self.reused += again
        if layer not in self.kept or not again:
            self.made += 1
            chosen = self.voted(layer, q, self.sinks, n - self.local, BUDGET - self.sinks - self.local)
            self.kept[layer] = query, chosen, n
        _, chosen, at = self.kept[layer]
        return {head: [*range(self.sinks), *chosen, *range(at - self.local, n)] for head in RETRIEVAL[layer]}

    def voted(self, layer: int, q: Tensor, first: int, last: int, count: int) -> list[int]:
        """The best of [first, last)."""
        votes = [torch.softmax(self.logits(layer, q, head, last)[:, first:], -1).sum(0) for head in RETRIEVAL[layer]]
        return best(torch.stack(votes).sum(0), first, count)


class SparsePrompts(Votes):
    """Cells of 16 rows, which read 40 positions of what is before them; in local heads everything."""

    sinks, local, theta, gap = 3, 3, 0.9, 128

    def sees(self, layer: int, q: Tensor, n: int) -> dict[int, list[int]]:
        if n > self.known or not RETRIEVAL[layer]:
            return super().sees(layer, q, n)
        begin = (n - 1) // 16 * 16
        if begin < 40:
            return {}
        mean = self.q[begin - self.first : begin - self.first + 16].mean(0)
        chosen = self.voted(layer, mean, 4, begin + 1 - 5, 40 - 4 - 5)
        return {head: [*range(4), *chosen, *range(begin + 1 - 5, n)] for head in RETRIEVAL[layer]}


class Recycled(Oracle):
    """Stride 9 and comparisons at every second token, layers in turns."""

    def scores(self, prompt: list[int], after: list[int]) -> list[float]:
        self.kept: dict[int, tuple[Tensor, dict[int, list[int]], int]] = {}
        return super().scores(prompt, after)

    def chosen(self, layer: int, q: Tensor, n: int) -> dict[int, list[int]]:
        query = torch.cat([q[head * GROUP : (head + 1) * GROUP] for head in RETRIEVAL[layer]]).mean(0)
        due = layer not in self.kept or (n + layer * 9 // LAYERS) % 9 == 0
        if not due and (n + layer * 2 // LAYERS) % 2 == 0:
            due = float(torch.cosine_similarity(query, self.kept[layer][0], dim=0)) <= 0.2
        self.made, self.reused = self.made + due, self.reused + (not due)
        if due:
            lists = {}
            for head in RETRIEVAL[layer]:
                scores = torch.softmax(self.logits(layer, q, head, n)[:, 3 : n - 6] * DIM**-0.5, -1).amax(0)
                pooled = torch.nn.functional.max_pool1d(scores[None], 7, stride=1, padding=3)[0]
                lists[head] = best(pooled, 3, BUDGET - 9)
            self.kept[layer] = query, lists, n
        _, lists, at = self.kept[layer]
        return {head: [*range(3), *lists[head], *range(at - 6, n)] for head in RETRIEVAL[layer]}


ORACLES: dict[str, type[Oracle]] = {
    "sink_window": SinkWindow,
    "tidal_decode": Tidal,
    "tidal_decode, dense output": TidalDense,
    "token_select": Votes,
    "token_select, sparse prompts": SparsePrompts,
    "recycled": Recycled,
}


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("name", ORACLES)
def test_heads_see_what_the_method_and_the_paper_say(deep: Path, razor: Make, name: str, backend: str) -> None:
    """Every decode row of two head groups, from the first beyond the budget on, in fp32 against fp64."""
    (prompt, after), oracle = texts(70, 50, seed=3), ORACLES[name](deep)
    expected = oracle.scores(prompt, after)
    llm = razor(backend=backend, max_batched_tokens=48, max_num_seqs=8)
    sampling = greedy(len(after), logprobs=0, forced_tokens=tuple(after))
    (result,) = llm.generate([prompt], sampling, kv=METHODS[name])
    assert [entry.logprob for entry in result.logprobs] == pytest.approx(expected, abs=1e-4)
    if type(oracle) in (Votes, Recycled):
        stats = llm.stats().selection[METHODS[name].selection or ""]
        assert (stats.selections, stats.reused) == (oracle.made, oracle.reused) and min(oracle.made, oracle.reused) > 20, (
            oracle.made,
            oracle.reused,
        )
    alone = test_razor.scores(llm, prompt, after)
    assert max(abs(a - b) for a, b in zip(expected, alone)) > 1e-2, "the method changed nothing"


def test_layers_and_heads_without_lists_read_those_of_others() -> None:
    """TidalDecode: selection layers without heads, and the calibration's map where its heads have no list."""
    geometry = Geometry(LAYERS, HEADS * GROUP, HEADS, DIM, 512, 512, torch.ones(8), "", BLOCK, RETRIEVAL)
    swapped = tuple(tuple((1, 0) for _ in range(layer + 1, LAYERS)) for layer in range(LAYERS))
    choice = TidalChoice(layers=(0, 5), figures={})
    found = TidalCalibration(model_key="", model="", choices=(choice,), default=2, head_map=swapped)
    method = TidalDecode(TidalDecodeOptions(), BUDGET, geometry, ReferenceKernels(), found)
    assert method.layers == (0, 6) and method.lists == 2
    assert method.roles == ["choose", "none", "reuse", "reuse", "reuse", "none", "choose"]
    read = [None if reads is None else (reads.columns, reads.heads if reads.heads is None else reads.heads.tolist())
            for reads in method.reads]  # fmt: skip
    own = ((0, 1), None)
    assert read == [own, None, ((0,), None), ((0, 1), [1, 0]), ((1,), None), None, own], "head 1 is like head 0, and 0 like 1"
    plain = TidalDecode(TidalDecodeOptions(layers=(1, 5)), BUDGET, geometry, ReferenceKernels())
    assert plain.layers == (2, 6) and plain.lists == 2
    assert [reads and reads.columns for reads in plain.reads] == [None, None, (0,), (0, 0), (0,), None, (0, 1)]


@each_method
def test_within_the_budget_is_razor_alone(razor: Make, name: str) -> None:
    """To the bit, while local heads drop what they drop."""
    kv = METHODS[name]
    kept = {"sinks": 3} if "prompts" not in name else {"prefill_budget": 160, "chunk": 16}
    wide = KVOptions(selection=kv.selection, budget=160, options={**kv.options, **kept})
    llm, jobs = razor(block_size=4), texts(70, 30, 5, 100)
    alone = run(llm, [(text, DENSE) for text in jobs])
    assert run(llm, [(text, wide) for text in jobs]) == alone
    stats = llm.stats().selection[kv.selection or ""]
    assert 0 < stats.attended < stats.held, "local heads drop as ever"


@each_method
def test_beyond_the_budget_reads_less(razor: Make, name: str) -> None:
    """Of the retrieval heads' KV; what local heads read is the same. Counted in positions and in bytes."""
    (text,) = texts(160)
    read: list[int] = []
    shares: list[float] = []
    for kv in (DENSE, METHODS[name]):
        llm = razor(block_size=4, shadow_interval=0)
        llm.core.add(Request(id="0", prompt=text, sampling=greedy(30), kv=kv))
        before = 0
        while llm.core.busy:
            (output,) = llm.core.step() or [None]
            before = before or llm.stats().kv_bytes_read
        assert output is not None
        read.append(llm.stats().kv_bytes_read - before)
        shares.append(output.usage.attended_tokens / output.usage.held_tokens)
    assert read[1] < 0.75 * read[0] and shares[1] < shares[0] < 0.8
    retrieval = sum(map(len, RETRIEVAL)) / (LAYERS * HEADS)
    window = (3 + 160 // 4) / 160
    assert shares[0] == pytest.approx(retrieval + (1 - retrieval) * window, abs=0.03)


@pytest.mark.parametrize("room", [512, 40])
def test_alone_and_in_a_mixed_batch(razor: Make, room: int) -> None:
    """All methods, razor alone and drafting requests together; the less room, the more prompts are cut."""
    jobs = [(texts(75)[0], DENSE)]
    for i, kv in enumerate(METHODS.values()):
        jobs.append((texts(60 + 3 * i, seed=i)[0], kv))
        if "prefill_budget" not in kv.options:
            drafting = KVOptions(selection=kv.selection, budget=40, options=kv.options, draft=True, draft_tokens=3)
            jobs.append((texts(47 + 5 * i, seed=i)[0], drafting))
    alone = razor(max_batched_tokens=512, block_size=4)
    expected = [run(alone, [job], 12)[0] for job in jobs]
    assert_same(run(razor(max_batched_tokens=room, max_num_seqs=24, block_size=4), jobs, 12), expected)


@pytest.mark.parametrize("draft_tokens", [2, 16])
@pytest.mark.parametrize("name", [name for name in METHODS if "prompts" not in name])
def test_drafting_gives_the_tokens_of_razor_alone(razor: Make, name: str, draft_tokens: int) -> None:
    """Where windows move on within a draft, and through preemption."""
    kv = METHODS[name]
    drafting = KVOptions(selection=kv.selection, budget=BUDGET, options=kv.options, draft=True, draft_tokens=draft_tokens)
    narrow = '{"induction_share": 0.55, "echo_share": 0.0, "sinks": 1, "min_window": 2, "window_divisor": 30}'
    llm, jobs = razor(block_size=4, retention_options=narrow), texts(60, 23, 90, 3)
    alone = run(llm, [(text, DENSE) for text in jobs], 40)
    assert_same(run(llm, [(text, drafting) for text in jobs], 40), alone)
    assert llm.stats().drafted_tokens > llm.stats().accepted_tokens > 0
    assert_same(run(llm, [(text, drafting) for text in jobs], 40, lambda step: step % 4 if step % 6 == 0 else None), alone)
    assert llm.stats().preemptions > 3 and llm.stats().replayed_tokens > 0


@each_method
def test_preemption_does_not_show(razor: Make, name: str) -> None:
    jobs = [(text, METHODS[name]) for text in texts(60, 33, 18)]
    config = {"block_size": 4, "max_batched_tokens": 64, "max_num_seqs": 8, "reuse": "exact", "shadow_interval": 5}
    expected = run(razor(**config), jobs)
    llm = razor(**config)
    lose = lambda step: (step // 7) % 3 if step % 7 == 0 else 1 if step % 16 == 15 else None  # noqa: E731
    assert_same(run(llm, jobs, lose=lose), expected)
    assert llm.stats().preemptions > 4 and llm.stats().replayed_tokens > 8
    stats = llm.stats().selection[METHODS[name].selection or ""]
    assert stats.mass_samples > 20 and 0.2 < stats.mass / stats.mass_samples < 1.0


@pytest.mark.parametrize("compensation", ["true", "false"])
@pytest.mark.parametrize("name", ["sink_window", "tidal_decode", "token_select", "recycled"])
def test_captured_steps_give_the_bits_of_calls_made_one_by_one(razor: Make, name: str, compensation: str) -> None:
    """One method alone, and beside requests without one."""
    found = []
    for captures in (True, False):
        options = OPTIONS.replace("}", f', "compensation": {compensation}' + "}")
        llm = razor(weights="int8", dtype="bf16", retention_options=options, max_batched_tokens=48, shadow_interval=0)
        decoder = llm.core.runner.decoder
        assert decoder._most == "full"
        decoder._most = "full" if captures else "none"
        jobs = [(text, METHODS[name] if i != 1 else DENSE) for i, text in enumerate(texts(60, 7, 90, 41))]
        found.append([run(llm, jobs[:1]), run(llm, jobs, 20), run(llm, jobs[2:]), llm.stats().kv_bytes])
        whole = [key for key in decoder._graphs if key.mode == "full" and key.program is not None]
        assert bool(whole) == captures
    assert found[0] == found[1]


def test_state_is_counted_by_the_heads_that_there_are(razor: Make) -> None:
    """Of seven layers two have no retrieval head, and keep nothing of a request."""
    llm = razor()
    core = llm.core
    core.add(Request(id="0", prompt=texts(60)[0], sampling=greedy(8), kv=METHODS["recycled"]))
    for _ in range(3):
        core.step()
        core.check()
    lists = sum(map(len, RETRIEVAL)) * (BUDGET - 6) + 5 * (1 + DIM)
    sums = (LAYERS * HEADS - sum(map(len, RETRIEVAL))) * 2 * DIM
    assert llm.stats().selection_bytes == 4 * (lists + sums)
    while core.busy:
        core.step()
