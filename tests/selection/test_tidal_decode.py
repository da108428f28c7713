"""TidalDecode against its definition: roles of layers, lists, exactness limits D1 to D8 of the specification, correction."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom.engine import LLM
from kvloom.engine.calibration import TidalCalibration, TidalChoice, save_tidal, store
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.request import KVOptions, Request
from kvloom.kernels.interface import PagedKV
from kvloom.kernels.reference import gather
from tests.selection.conftest import Call, Traced, greedy, masked_attention

Make = Callable[..., LLM]
LAYERS, HEADS, GROUP = 7, 2, 2
SINKS, RECENT, BUDGET = 3, 6, 24
SELECTED = BUDGET - SINKS - RECENT


@pytest.fixture
def make(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Builds engines on it, with calibrations of their own; afterwards proves that each gave every block back."""
    monkeypatch.setattr(store, "own_folder", lambda: tmp_path)
    made: list[LLM] = []

    def build(**config: Any) -> LLM:
        made.append(LLM(str(deep), **{"dtype": "fp32", "kv_memory": "16MiB", "step_time_ms": 0, **config}))
        return made[-1]

    yield build
    for llm in made:
        llm.core.check()
        assert llm.core.cache.pool.in_use == 0


def tidal(budget: int = BUDGET, **options: Any) -> KVOptions:
    fixed = {"layers": (1, 4), "sinks": SINKS, "recent": RECENT, "output": "dense"}
    return KVOptions(selection="tidal_decode", budget=budget, options={**fixed, **options})


def prompts(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(300) for _ in range(length)] for length in lengths]


def logprobs(llm: LLM, text: list[int], forced: list[int], kv: KVOptions) -> list[float]:
    """Of forced tokens, each through the decode path."""
    (result,) = llm.generate([text], greedy(len(forced), logprobs=0, forced_tokens=tuple(forced)), kv=kv)
    return [entry.logprob for entry in result.logprobs]


def decode_steps(traced: Traced) -> list[list[Call]]:
    """Calls of every decode step, layer by layer."""
    calls = [call for call in traced.calls if call.rows.size == 1]
    return [calls[i : i + LAYERS] for i in range(0, len(calls), LAYERS)]


def weights(call: Call) -> Tensor:
    """[kv heads, positions]: softmax over everything, summed over each KV head's query heads."""
    stop, table = int(call.rows.stop[0]), call.rows.tables[0]
    found = []
    for head in range(HEADS):
        keys = gather(call.k, table, torch.arange(stop), head)
        logits = call.q[0, head * GROUP : (head + 1) * GROUP] @ keys.T * call.scale
        found.append(torch.softmax(logits, dim=-1).sum(0))
    return torch.stack(found)


def chosen(call: Call, head: int) -> list[int]:
    """What a layer's attention would choose for a head: sinks, its best candidates, recent tokens."""
    found, stop = weights(call)[head], int(call.rows.stop[0])
    candidates = found[SINKS : stop - RECENT]
    best = torch.sort(candidates, descending=True, stable=True).indices[:SELECTED] + SINKS
    return [*range(SINKS), *sorted(best.tolist()), *range(stop - RECENT, stop)]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_layers_play_their_roles(make: Make, trace: Callable[[LLM], Traced], backend: str) -> None:
    """Dense, selection, sparse; lists are the top-k of pooled probabilities (D7), outputs the masked softmax."""
    llm = make(backend=backend)
    traced = trace(llm)
    llm.generate(prompts((70,)), greedy(5), kv=tidal())
    steps = decode_steps(traced)
    assert len(steps) == 4
    for step in steps:
        for layer, call in enumerate(step):
            everything = list(range(int(call.rows.stop[0])))
            for head in range(HEADS):
                seen = call.seen[0][head].tolist()
                if layer in (0, 1, 4):
                    assert seen == everything
                else:
                    assert seen == chosen(step[1 if layer < 4 else 4], head)
                    assert seen == sorted(set(seen)) and len(seen) == BUDGET
            torch.testing.assert_close(call.out.double(), masked_attention(call), atol=1e-5, rtol=0)
    stats = llm.stats().selection["tidal_decode"]
    assert (stats.selections, stats.reused, stats.decode_rows) == (4 * 2, 4 * 4, 4)


def test_sparse_output_reads_what_it_chose(make: Make, trace: Callable[[LLM], Traced]) -> None:
    llm = make()
    traced, scored = trace(llm), llm.stats().kv_bytes["score"]
    llm.generate(prompts((70,)), greedy(4), kv=tidal(output="sparse"))
    for step in decode_steps(traced):
        for layer, call in enumerate(step):
            for head in range(HEADS):
                anchor = step[0 if layer == 0 else 1 if layer < 4 else 4]
                expected = list(range(int(call.rows.stop[0]))) if layer == 0 else chosen(anchor, head)
                assert call.seen[0][head].tolist() == expected
            torch.testing.assert_close(call.out.double(), masked_attention(call), atol=1e-5, rtol=0)
    assert llm.stats().kv_bytes["score"] - scored == 2 * sum((71, 72, 73)) * HEADS * 16 * 4  # K of two layers


@pytest.mark.parametrize(
    ("pool", "expected"),
    [("max", lambda w: w.amax(1)), ("all", lambda w: w.sum((0, 1))[None].expand(HEADS, -1)), ("group", lambda w: w.sum(1))],
)
def test_pools(make: Make, trace: Callable[[LLM], Traced], pool: str, expected: Callable[[Tensor], Tensor]) -> None:
    llm = make()
    traced = trace(llm)
    llm.generate(prompts((70,)), greedy(2), kv=tidal(pool=pool))
    (step,) = decode_steps(traced)
    call, stop = step[1], int(step[1].rows.stop[0])
    per_head = []
    for head in range(HEADS):
        keys = gather(call.k, call.rows.tables[0], torch.arange(stop), head)
        per_head.append(torch.softmax(call.q[0, head * GROUP : (head + 1) * GROUP] @ keys.T * call.scale, dim=-1))
    ranking = expected(torch.stack(per_head))[:, SINKS : stop - RECENT]
    for head in range(HEADS):
        best = torch.sort(ranking[head], descending=True, stable=True).indices[:SELECTED] + SINKS
        assert step[2].seen[0][head].tolist()[SINKS:-RECENT] == sorted(best.tolist())


@pytest.mark.parametrize("layers", [(LAYERS - 1,), tuple(range(LAYERS)), (0,)])
def test_limits_that_are_dense(make: Make, layers: tuple[int, ...]) -> None:
    """D1: nothing after the first selection layer. D2: every layer selects. D3: the budget holds everything."""
    llm = make()
    budget = 90 if layers == (0,) else BUDGET
    texts = prompts((70, 50))
    dense = llm.generate(texts, greedy(8, logprobs=0))
    sparse = llm.generate(texts, greedy(8, logprobs=0), kv=tidal(budget, layers=layers))
    assert [result.logprobs for result in sparse] == [result.logprobs for result in dense]


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_below_budget_is_dense_bitwise(make: Make, backend: str) -> None:
    llm = make(backend=backend, reuse="off")
    texts = prompts((9, 20, 33, 40))
    dense = llm.generate(texts, greedy(6, logprobs=0))
    for output in ("dense", "sparse"):
        sparse = llm.generate(texts, greedy(6, logprobs=0), kv=tidal(46, output=output))
        assert [result.logprobs for result in sparse] == [result.logprobs for result in dense]


def kv_of(llm: LLM, text: list[int], forced: list[int], kv: KVOptions) -> list[PagedKV]:
    """K and V of all layers after forced tokens, [positions, kv heads, head_dim], read before the blocks go back."""
    request = Request(id="kv", prompt=text, kv=kv, sampling=greedy(len(forced) + 2, forced_tokens=tuple(forced)))
    llm.core.add(request)
    while len(request.tokens) <= len(text) + len(forced):
        llm.core.step()
    table = torch.tensor(llm.core._scheduler._tables[request].blocks)
    llm.core.abort("kv")
    where, count = table.to(torch.int32), len(text) + len(forced)
    return [
        PagedKV(
            *(torch.stack([gather(cache, where, torch.arange(count), head) for head in range(HEADS)], 1) for cache in layer)
        )
        for layer in llm.core.cache.storage.layers
    ]


def distance(a: PagedKV, b: PagedKV) -> float:
    return max(float((a.k - b.k).abs().max()), float((a.v - b.v).abs().max()))


def test_kv_up_to_the_first_sparse_layer_is_dense(make: Make) -> None:
    """D4: layers up to s1 + 1 depend on dense layers only."""
    llm = make(reuse="off", block_size=8)
    text, forced = prompts((60, 20))
    dense = kv_of(llm, text, forced, KVOptions())
    for kv, clean in ((tidal(), 2), (tidal(layers=(2, 4)), 3), (tidal(output="sparse"), 1)):
        sparse = kv_of(llm, text, forced, kv)
        distances = [distance(a, b) for a, b in zip(sparse, dense)]
        assert max(distances[: clean + 1]) <= 1e-5 < min(distances[clean + 1 :])


def test_selection_layers_attend_densely(make: Make, trace: Callable[[LLM], Traced]) -> None:
    """D5: whatever came in, what goes out is dense attention on it."""
    llm = make()
    traced = trace(llm)
    llm.generate(prompts((70,)), greedy(6), kv=tidal())
    for step in decode_steps(traced):
        for layer in (1, 4):
            assert len(step[layer].seen[0][0]) == int(step[layer].rows.stop[0])
            torch.testing.assert_close(step[layer].out.double(), masked_attention(step[layer]), atol=1e-5, rtol=0)


def test_more_budget_covers_more_mass(make: Make) -> None:
    """D8 and V8, with the engine's own shadow pass."""
    masses = []
    for budget in (16, 24, 32, 48, 64):
        llm = make(shadow_interval=1)
        text, forced = prompts((70, 6))
        logprobs(llm, text, forced, tidal(budget))
        stats = llm.stats().selection["tidal_decode"]
        assert stats.mass_samples == 4 * 5
        masses.append(stats.mass / stats.mass_samples)
    assert masses == sorted(masses) and 0.1 < masses[0] < masses[-1] < 1


@pytest.mark.parametrize("output", ["dense", "sparse"])
def test_mixed_batch_equals_solo(make: Make, output: str) -> None:
    """V4: with long and short rows, other options and dense requests beside it. V3: slots are used again."""
    texts = prompts((60, 15, 70, 45, 80))
    kvs = [
        tidal(output=output),
        tidal(output=output),
        KVOptions(),
        tidal(40, layers=(0, 2, 5), output=output),
        tidal(output=output),
    ]
    # the reference back end refuses logits that do not fit, where one selector emits and a longer row of another does not
    llm = make(reuse="off", max_batched_tokens=64, backend="reference" if output == "dense" else "auto")
    solo = [llm.generate([text], greedy(14, logprobs=0), kv=kv)[0].logprobs for text, kv in zip(texts, kvs)]
    for index, (text, kv) in enumerate(zip(texts, kvs)):
        llm.core.add(Request(id=str(index), prompt=text, sampling=greedy(14, logprobs=0), kv=kv))
    mixed: dict[str, list[Any]] = {str(i): [] for i in range(len(texts))}
    while llm.core.busy:
        for out in llm.core.step():
            mixed[out.id].extend(out.logprobs)
    for index, alone in enumerate(solo):  # linear layers in fp32 may round differently with other rows beside them
        assert [entry.token for entry in mixed[str(index)]] == [entry.token for entry in alone]
        assert [entry.logprob for entry in mixed[str(index)]] == pytest.approx([entry.logprob for entry in alone], abs=1e-5)


def test_head_map_leads_to_the_most_similar_head(make: Make, trace: Callable[[LLM], Traced]) -> None:
    llm = make()
    key = llm.core.runner.geometry.model_key
    heads = tuple(tuple((layer % 2, 0) for layer in range(anchor + 1, LAYERS)) for anchor in range(LAYERS))
    save_tidal(TidalCalibration(model_key=key, model="deep", default=2, head_map=heads,
                                choices=(TidalChoice(layers=(1, 4)), TidalChoice(layers=(0, 2, 5)))))  # fmt: skip
    traced = trace(llm)
    fixed = {"sinks": SINKS, "recent": RECENT, "output": "dense"}
    own = KVOptions(selection="tidal_decode", budget=BUDGET, options=fixed)
    llm.generate(prompts((70,)), greedy(2), kv=own)
    (step,) = decode_steps(traced)
    for layer in (2, 3, 5, 6):
        anchor = step[1 if layer < 4 else 4]
        assert [seen.tolist() for seen in step[layer].seen[0]] == [chosen(anchor, layer % 2), chosen(anchor, 0)]
    asked = {**fixed, "selections": 3, "head_map": False}
    traced.calls.clear()
    llm.generate(prompts((71,)), greedy(2), kv=KVOptions(selection="tidal_decode", budget=BUDGET, options=asked))
    (step,) = decode_steps(traced)
    for layer in (1, 3, 4, 6):
        anchor = step[max(s for s in (0, 2, 5) if s < layer)]
        assert [seen.tolist() for seen in step[layer].seen[0]] == [chosen(anchor, 0), chosen(anchor, 1)]


# Cache correction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [64, 4])
def test_correction_makes_kv_dense(make: Make, rows: int) -> None:
    """D6, also with a correction cut into many steps: the last one here is just over."""
    text, forced = prompts((60, 27))
    llm = make(reuse="off", block_size=8, max_batched_tokens=rows, max_num_seqs=1)
    clean = kv_of(make(reuse="off", block_size=8), text + forced, [], KVOptions())
    approximate = kv_of(llm, text, forced, tidal())
    assert max(distance(a, b) for a, b in zip(approximate, clean)) > 1e-3
    corrected = kv_of(llm, text, forced, tidal(correct_every=8))
    assert max(distance(a, b) for a, b in zip(corrected, clean)) <= 1e-5
    assert llm.stats().selection["tidal_decode"].refreshes == 3


def test_corrected_kv_is_published(make: Make) -> None:
    llm = make(block_size=8)
    text = prompts((64,))[0]
    result = llm.generate([text], greedy(40), kv=tidal(correct_every=8))[0]
    follow_up = text + result.tokens + [5]
    again = llm.generate([follow_up], greedy(4, logprobs=0))[0]
    assert again.usage is not None and again.usage.cached_tokens == 96
    clean = make(reuse="off").generate([follow_up], greedy(4, logprobs=0))[0]
    assert [entry.logprob for entry in again.logprobs] == pytest.approx([entry.logprob for entry in clean.logprobs], abs=1e-5)


def test_approximate_kv_is_not_published(make: Make) -> None:
    llm = make(block_size=8)
    text = prompts((64,))[0]
    result = llm.generate([text], greedy(40), kv=tidal())[0]
    again = llm.generate([text + result.tokens + [5]], greedy(1))[0]
    assert again.usage is not None and again.usage.cached_tokens == 64


@pytest.mark.parametrize("every", [1, 3, 7])
def test_correction_does_not_depend_on_the_batch(make: Make, every: int) -> None:
    """However the engine cuts a correction, its rows are dense."""
    text, kv = prompts((60,))[0], tidal(correct_every=every)
    results = [
        make(reuse="off", max_batched_tokens=rows, max_num_seqs=1).generate([text], greedy(20, logprobs=0), kv=kv)[0]
        for rows in (64, 2, 3)
    ]
    values = [[entry.logprob for entry in result.logprobs] for result in results]
    assert values[1] == pytest.approx(values[0], abs=1e-5)
    assert values[2] == pytest.approx(values[0], abs=1e-5)


def test_correction_survives_preemption(make: Make) -> None:
    texts = prompts((60, 50, 41, 70))
    block = 16 * 2 * HEADS * 16 * 4 * LAYERS
    tight = make(kv_memory=16 * block, max_model_len=200)
    results = tight.generate(texts, greedy(40), kv=tidal(correct_every=6))
    assert tight.stats().preemptions > 0
    assert [len(result.tokens) for result in results] == [40] * 4
    assert tight.stats().selection["tidal_decode"].refreshes > 8


def test_drafts_need_no_correction(make: Make) -> None:
    llm = make(reuse="off")
    texts = prompts((60, 50))
    dense = llm.generate(texts, greedy(24))
    kv = tidal(correct_every=2)
    drafted = llm.generate(
        texts, greedy(24), kv=KVOptions(selection="tidal_decode", budget=BUDGET, options=kv.options, draft=True)
    )
    assert [result.tokens for result in drafted] == [result.tokens for result in dense]
    assert llm.stats().selection["tidal_decode"].refreshes == 0
    assert llm.stats().drafted_tokens > 10


# Options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [16, 20, 24, 33, 47, 64])
def test_defaults_work_for_any_budget(make: Make, budget: int) -> None:
    llm = make()
    result = llm.generate(prompts((80,)), greedy(4), kv=KVOptions(selection="tidal_decode", budget=budget))[0]
    assert result.usage is not None and result.usage.attended_tokens < result.usage.held_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (3, 3)}, "layers is [3, 3]; allowed: one or more layer numbers, ascending"),
        ({"layers": ()}, "layers is []"),
        ({"layers": (1, 7)}, "layers is [1, 7]; allowed: 0 to 6"),
        ({"layers": None, "selections": 4}, "selections is 4; allowed: none: this model has no calibration"),
        ({"selections": 2}, "selections or layers, not both"),
        ({"head_map": True}, "head_map is true; allowed: false or null"),
        ({"sinks": 20, "recent": 10}, "kv.budget is 24; allowed: with 20 sinks and 10 recent tokens, at least 31"),
        ({"sinks": -1}, "sinks is -1"),
        ({"recent": 0}, "recent is 0"),
        ({"correct_every": -1}, "correct_every is -1"),
        ({"output": 3}, "output is 3"),
    ],
)
def test_bad_options_are_refused_by_name(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make().generate(prompts((30,)), greedy(2), kv=tidal(**options))
    assert message in str(caught.value)
