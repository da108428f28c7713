"""What every registered method must keep, whatever it selects: checks V1 to V6 of the specification, over `METHODS`.

V1 off: dense requests are bit-identical and pay nothing      V4 a request alone, in a mixed batch, after a prefix hit: equal
V2 below the budget: bit-identical to dense                   V5 other physical pages: bit-identical
V3 a slot used before: bit-identical to a new one             V6 any length, GQA ratio and head size: the masked oracle

and, since it is how methods are lossless: drafting with any of them gives the dense tokens, through preemption too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from kvloom.engine import LLM
from kvloom.engine.requests.request import KVOptions, Request
from kvloom.engine.selection import METHODS
from kvloom.kernels.cpu.native.graph import NativeGraph
from tests.conftest import write_tokenizer
from tests.selection.conftest import Traced, greedy, masked_attention

Make = Callable[..., LLM]
Trace = Callable[[LLM], Traced]
BUDGET = 24
DENSE = KVOptions()

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
VARIANTS = [*METHODS, "razor_view+recycled"]
"""Methods, and two that work together: the one with lists per head that outlive steps is the hardest to go with."""
each_method = pytest.mark.parametrize("name", VARIANTS)


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(300) for _ in range(length)] for length in lengths]


def using(name: str, budget: int = BUDGET, **more: Any) -> KVOptions:
    """A variant that reads everything up to `budget` tokens, and about as many beyond."""
    method, _, retrieval = name.partition("+")
    if method != "razor_view":
        return KVOptions(selection=method, budget=budget, **more)
    options = {"sinks": 4, "min_window": budget - 4, "window_divisor": 100, "retrieval": retrieval or None}
    return KVOptions(selection=method, budget=budget if retrieval else None, options=options, **more)


Job = tuple[list[int], KVOptions]


def run(llm: LLM, jobs: Sequence[Job], tokens: int = 8) -> list[list[Any]]:
    """Jobs in one batch: what every greedy token was, and its log-probability."""
    requests = [
        Request(id=f"job {i}", prompt=text, sampling=greedy(tokens, logprobs=0), kv=kv) for i, (text, kv) in enumerate(jobs)
    ]
    found: dict[str, list[Any]] = {request.id: [] for request in requests}
    for request in requests:
        llm.core.add(request)
    while llm.core.busy:
        for output in llm.core.step():
            assert output.finish_reason != "error"
            found[output.id].extend(output.logprobs)
    return list(found.values())


def assert_same(found: list[list[Any]], expected: list[list[Any]]) -> None:
    """Where the rows of a step differ, so does the rounding of matrix products, in the last bits: dense or not."""
    assert [[entry.token for entry in row] for row in found] == [[entry.token for entry in row] for row in expected]
    for row, other in zip(found, expected):
        assert [entry.logprob for entry in row] == pytest.approx([entry.logprob for entry in other], abs=2e-5)


# V1 -----------------------------------------------------------------------------------------------------------------------


def test_dense_requests_pay_nothing(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """V1: after every method has run, steps without one take the dense path, and give the same bits."""
    jobs: list[Job] = [(text, DENSE) for text in prompts((60, 41, 7))]
    expected = run(make_llm(reuse="off"), jobs)
    llm = make_llm(reuse="off")
    run(llm, [(text, using(name)) for name, text in zip(VARIANTS, prompts([50] * len(VARIANTS), 1))])
    before = llm.stats()

    def refuse(*_: Any) -> None:
        raise AssertionError("a dense step went through selection")

    monkeypatch.setattr("kvloom.engine.step.runner.StepParts", refuse)
    assert run(llm, jobs) == expected
    after = llm.stats()
    assert after.selection == before.selection
    assert after.kv_bytes["list"] == before.kv_bytes["list"] and after.kv_bytes["score"] == before.kv_bytes["score"]


@each_method
def test_dense_neighbours_are_untouched(make_llm: Make, name: str) -> None:
    """V1: dense requests in a batch with others."""
    llm = make_llm(reuse="off", max_batched_tokens=64)
    texts = prompts((60, 33, 50, 70))
    expected = run(make_llm(reuse="off", max_batched_tokens=64), [(texts[0], DENSE), (texts[1], DENSE)])
    found = run(llm, [(texts[0], DENSE), (texts[2], using(name)), (texts[1], DENSE), (texts[3], using(name))])
    assert_same([found[0], found[2]], expected)


# V2 -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "torch"])
@each_method
def test_below_the_budget_is_dense(make_llm: Make, name: str, backend: str) -> None:
    """V2: very short prompts, and growth up to the budget exactly."""
    llm = make_llm(backend=backend, reuse="off")
    texts = prompts((1, 2, 3, 5, 8, 15, 16, 17, 31, 40))
    dense = run(llm, [(text, DENSE) for text in texts], tokens=9)
    assert run(llm, [(text, using(name, 48)) for text in texts], tokens=9) == dense
    assert llm.stats().selection[name.partition("+")[0]].attended == llm.stats().selection[name.partition("+")[0]].held > 0


@each_method
def test_beyond_the_budget_reads_less(make_llm: Make, name: str) -> None:
    """The other side of V2: a method that does nothing would pass everything else here."""
    llm = make_llm()
    text = prompts((120,))
    dense = run(llm, [(text[0], DENSE)], tokens=20)
    assert run(llm, [(text[0], using(name, 32))], tokens=20) != dense
    stats = llm.stats().selection[name.partition("+")[0]]
    assert stats.decode_rows == 19 and 0 < stats.attended < stats.held


# V3 -----------------------------------------------------------------------------------------------------------------------


@each_method
def test_a_slot_used_before_is_as_new(make_llm: Make, name: str) -> None:
    """V3: after requests of the same method, of others, and after one that was aborted half-way."""
    job = (prompts((64,), 5)[0], using(name))
    expected = run(make_llm(reuse="off"), [job], tokens=12)
    llm = make_llm(reuse="off", max_num_seqs=1)
    for other in VARIANTS:
        run(llm, [(prompts((90,), 6)[0], using(other)), (prompts((30,), 7)[0], using(name))], tokens=20)
        assert run(llm, [job], tokens=12) == expected
    llm.core.add(Request(id="aborted", prompt=prompts((100,), 8)[0], sampling=greedy(30), kv=using(name)))
    for _ in range(7):
        llm.core.step()
    assert llm.core.abort("aborted") is not None
    assert run(llm, [job], tokens=12) == expected


# V4 -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [512, 64, 37])
def test_alone_and_in_a_mixed_batch(make_llm: Make, room: int) -> None:
    """V4: all methods, two budgets, dense and drafting requests together; the less room, the more prompts are cut."""
    jobs: list[Job] = [(prompts((75,), 1)[0], DENSE)]
    for i, name in enumerate(VARIANTS):
        texts = prompts((60 + 3 * i, 90 - i, 47 + 5 * i), seed=i)
        jobs += [(texts[0], using(name)), (texts[1], using(name, 40))]
        jobs.append((texts[2], using(name, draft=True, draft_tokens=3)))
    alone = make_llm(reuse="off", max_batched_tokens=512)
    solo = [run(alone, [job])[0] for job in jobs]
    together = run(make_llm(reuse="off", max_batched_tokens=room, max_num_seqs=32), jobs)
    assert_same(together, solo)


@each_method
def test_a_prefix_hit_changes_nothing(make_llm: Make, name: str) -> None:
    """V4, with what others have left in the cache."""
    text = prompts((70,))[0]
    expected = run(make_llm(reuse="off", block_size=8), [(text, using(name))])  # razor_view drops whole blocks
    llm = make_llm(block_size=8)
    for _ in range(2):
        assert_same(run(llm, [(text, using(name))]), expected)
    assert_same(run(llm, [([*text[:64], 9, 8, 7], using(name)), (text, using(name))])[1:], expected)


# V5 -----------------------------------------------------------------------------------------------------------------------


@each_method
def test_physical_pages_do_not_matter(make_llm: Make, trace: Trace, name: str) -> None:
    """V5: the same request where its blocks come from a well-used pool, in another order."""
    job = (prompts((70,), 3)[0], using(name))
    fresh, used = make_llm(reuse="off", block_size=8), make_llm(reuse="off", block_size=8)
    run(used, [(text, DENSE) for text in prompts((33, 90, 17, 60), 4)], tokens=3)
    traces = [trace(llm) for llm in (fresh, used)]
    assert run(used, [job], tokens=12) == run(fresh, [job], tokens=12)
    tables = [traced.calls[-1].rows.tables[0, :9].tolist() for traced in traces]
    assert tables[0] != tables[1] and tables[1] != sorted(tables[1])


# V6 -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(g, d) for g in (1, 2, 4) for d in (16, 64, 80)], ids=lambda p: f"g{p[0]}d{p[1]}")
def shaped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with 4 query heads, g of them to a KV head, of head_dim d."""
    from transformers import LlamaConfig, LlamaForCausalLM

    group, head_dim = request.param
    folder = tmp_path_factory.mktemp(f"g{group}d{head_dim}")
    torch.manual_seed(group * head_dim)
    config = LlamaConfig(vocab_size=write_tokenizer(folder), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=4 // group, head_dim=head_dim, eos_token_id=2,
                         max_position_embeddings=256, bos_token_id=None, pad_token_id=None,
                         initializer_range=0.3)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@each_method
def test_any_shape_gives_the_masked_oracle(shaped: Path, trace: Trace, name: str) -> None:
    """V6, T9: lengths around the budget and block boundaries; the output is a dense softmax with -inf outside what is seen."""
    rng = random.Random(f"{name} {shaped.name[:5]}")
    block = rng.choice((4, 16))
    llm = LLM(str(shaped), dtype="fp32", kv_memory="4MiB", block_size=block, max_num_seqs=8,
              max_batched_tokens=rng.choice((40, 256)))  # fmt: skip
    traced = trace(llm)
    budget = rng.choice((16, 17, 24, 31, 32))
    edges = [budget - 1, budget, budget + 1, 2 * budget, 4 * block - 1, 4 * block, 4 * block + 1]
    lengths = [1, *rng.sample(edges, 4), rng.randrange(40, 90)]
    run(llm, [(text, using(name, budget)) for text in prompts(lengths, rng.randrange(1000))], tokens=5)
    decodes = [call for call in traced.calls if call.rows.size <= len(lengths)]
    for call in [*decodes[-4:], *rng.sample(traced.calls, 4)]:
        torch.testing.assert_close(call.out.double(), masked_attention(call), atol=2e-5, rtol=1e-4)
        for stop, heads in zip(call.rows.stop.tolist(), call.seen):
            for seen in heads:
                found = seen.tolist()
                assert found == sorted(set(found)) and (not found or (found[0] >= 0 and found[-1] < stop))
    llm.core.check()
    assert llm.core.cache.pool.in_use == 0


# Drafting and preemption --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft_tokens", [1, 4])
@each_method
def test_drafting_gives_the_dense_tokens(make_llm: Make, name: str, draft_tokens: int) -> None:
    """Greedily and sampled, above and around the budget."""
    llm = make_llm(reuse="off")
    texts = prompts((60, 23, 24, 25, 90, 3))
    for sampling in (greedy(24), greedy(24, seed=5, repetition_penalty=1.2)):
        dense = llm.generate(texts, sampling)
        drafted = llm.generate(texts, sampling, kv=using(name, draft=True, draft_tokens=draft_tokens))
        assert [r.tokens for r in drafted] == [r.tokens for r in dense]
    assert llm.stats().drafted_tokens > llm.stats().accepted_tokens > 0


@each_method
def test_preemption_and_resume(make_llm: Make, name: str) -> None:
    """Requests that lose their blocks finish as if nothing had happened."""
    texts = prompts((60, 50, 41, 70))
    plain = make_llm(reuse="off").generate(texts, greedy(60))
    blocks = 20 * 16 * 2 * 2 * 16 * 4 * 3  # tokens, K and V, heads, dims, fp32, layers
    for draft in (False, True):
        tight = make_llm(kv_memory=blocks, max_model_len=200)
        kv = using(name, draft=draft)
        results = tight.generate(texts, greedy(60), kv=kv)
        assert tight.stats().preemptions > 0
        expected = plain if draft else make_llm(reuse="off").generate(texts, greedy(60), kv=kv)
        assert [r.tokens for r in results] == [r.tokens for r in expected]


# Captured steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*VARIANTS, "dense"])
def test_captured_steps_give_the_bits_of_calls_made_one_by_one(make_llm: Make, name: str) -> None:
    """Decode steps of growing and shrinking batches, prompts between them, alone and beside dense rows."""
    found = []
    for captures in (True, False):
        llm = make_llm(backend="native", weights="int8", dtype="bf16", max_batched_tokens=48)
        decoder = llm.core.runner.decoder
        assert decoder._most == "full"
        decoder._most = "full" if captures else "none"
        kv = DENSE if name == "dense" else using(name)
        jobs = [(text, kv if i % 2 == 0 else DENSE) for i, text in enumerate(prompts((60, 7, 90, 41)))]
        found.append([run(llm, jobs[:1]), run(llm, jobs, tokens=20), run(llm, jobs[2:])])
        modes = {key.mode for key in decoder._graphs}
        assert modes == (set() if not captures else {"full"} if name == "dense" else {"full", "piecewise"})
        counters = llm.stats().kv_bytes
        found[-1].append(counters)
    assert found[0] == found[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_captured_batches_of_one_method_may_grow_and_shrink(make_llm: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Steps in which one method alone decodes are replayed whole: many short rows, then few long ones, then more of them; rows
    that come and go between. Nothing that a replay uses may depend on how many rows there were when it was captured."""
    found: list[Any] = []
    replay = NativeGraph.replay

    def within_its_work_space(graph: NativeGraph, piece: int, rows: int) -> None:
        runner: Any = llm.core.runner
        (program,) = [key.program for key, known in runner.decoder._graphs.items() if known is graph]
        if program is not None and program[1]:  # the columns of every row's logits
            room = runner._scratch._buffers["logits"].numel()
            assert rows * runner.geometry.q_heads * program[1] <= room, "a replay writes past its logits"
        replay(graph, piece, rows)

    monkeypatch.setattr(NativeGraph, "replay", within_its_work_space)
    for captures in (True, False):
        llm = make_llm(
            backend="native", weights="int8", dtype="bf16", max_num_seqs=32, kv_memory="64MiB", shadow_interval=0,
            max_batched_tokens=8192,
        )  # fmt: skip
        llm.core.runner.decoder._most = "full" if captures else "none"
        many, few = prompts([300 + i for i in range(20)]), prompts([310, 320], seed=1)
        llm.generate(many, greedy(1))  # from now on these are found, and all decode at once when they come
        outputs: dict[str, list[Any]] = {}
        arrivals = {0: (prompts([60 + i for i in range(24)]), 8), 36: (few, 40), 44: (many, 12), 54: (prompts([120] * 5), 20)}
        for step in range(120):
            texts, most = arrivals.get(step, ([], 0))
            for i, text in enumerate(texts):
                sampling = greedy(most + i, logprobs=0)
                llm.core.add(Request(id=f"{step} {i}", prompt=text, sampling=sampling, kv=using(name)))
            for output in llm.core.step():
                outputs.setdefault(output.id, []).extend((entry.token, entry.logprob) for entry in output.logprobs)
            llm.core.check()
        assert not llm.core.busy and len(outputs) == 51
        whole = [key for key in llm.core.runner.decoder._graphs if key.mode == "full" and key.program is not None]
        assert bool(whole) == captures
        found.append((outputs, asdict(llm.stats().selection[using(name).selection or ""]), llm.stats().kv_bytes))
    assert found[0] == found[1]
