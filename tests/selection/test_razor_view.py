"""RazorAttention, view mode: which head sees what, the compensation token, and what stands beside it (Z1, Z2, Z6)."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.calibration import HeadClasses, RazorCalibration, save_razor, store
from kvloom.engine.errors import ConfigError, InvalidRequestError
from kvloom.engine.requests.request import KVOptions
from kvloom.engine.retention.window import Window
from kvloom.engine.selection import razor_view
from kvloom.engine.step.attention import StepAttention
from tests.selection.conftest import Traced, greedy, masked_attention

Make = Callable[..., LLM]
Trace = Callable[[LLM], Traced]
SetHeads = Callable[[HeadClasses], None]
Logprobs = list[list[tuple[int, float]]]

LAYERS, HEADS = 3, 2
SOME = HeadClasses(((0, 1), (1,), ()), HEADS)
NONE = HeadClasses(((), (), ()), HEADS)
ALL = HeadClasses.all(LAYERS, HEADS)
WINDOW = Window(3, 20, 4)
CALIBRATED = razor_view.head_classes
"""What a fixture of all tests here replaces."""


def using(budget: int | None = None, draft: bool | None = None, **options: Any) -> KVOptions:
    return KVOptions(
        selection="razor_view",
        budget=budget,
        draft=draft,
        options={"sinks": 3, "min_window": 20, "window_divisor": 4, **options},
    )


def texts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 300) for _ in range(length)] for length in lengths]


def logprobs(llm: LLM, prompts: list[list[int]], kv: KVOptions, tokens: int = 24, **more: Any) -> Logprobs:
    results = llm.generate(prompts, greedy(tokens, logprobs=0, **more), kv=kv)
    return [[(entry.token, entry.logprob) for entry in result.logprobs] for result in results]


@pytest.fixture
def set_heads(monkeypatch: pytest.MonkeyPatch) -> SetHeads:
    """Chooses the retrieval heads of engines that start to use the method."""

    def choose(classes: HeadClasses) -> None:
        monkeypatch.setattr(razor_view, "head_classes", lambda options, geometry: classes)

    return choose


@pytest.fixture(autouse=True)
def some_heads(retrieval_heads: None, set_heads: SetHeads) -> None:
    set_heads(SOME)


def outputs(llm: LLM) -> list[Tensor]:
    """What every layer gives rows that selection methods decide for, in order: [rows, q_heads, head_dim]."""
    runner: Any = llm.core.runner
    found: list[Tensor] = []

    class Kept(StepAttention):
        def __call__(self, *arguments: Any) -> Tensor:
            result = super().__call__(*arguments)
            if self._groups[0].parts:
                found.append(self._out[: self._groups[0].own.start].clone())
            return result

    runner._attention.__class__ = Kept
    return found


def assert_oracle(traced: Traced, outs: list[Tensor], classes: HeadClasses = SOME, *, token: bool = True) -> int:
    """Every layer's output against dense attention under a mask. Returns how often a head saw less than everything."""
    calls = [call for call in traced.calls if not call.dense]
    assert len(calls) == len(outs) and len(calls) % LAYERS == 0
    less = 0
    for i, (call, out) in enumerate(zip(calls, outs)):
        local = classes.local(i % LAYERS)
        expected = masked_attention(call, local if token else ())
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)
        less += sum(len(seen[head]) < stop for stop, seen in zip(call.rows.stop.tolist(), call.seen) for head in local)
    return less


# What rows see -------------------------------------------------------------------------------------------------------------


def test_all_retrieval_heads_is_dense(make_llm: Make, set_heads: SetHeads) -> None:
    """Z1, to the bit."""
    set_heads(ALL)
    prompts = texts(60, 90, 33)
    llm = make_llm(reuse="off")
    assert logprobs(llm, prompts, using()) == logprobs(llm, prompts, KVOptions())
    stats = llm.stats().selection["razor_view"]
    assert stats.attended == stats.held > 0


def test_nothing_dropped_is_dense(make_llm: Make) -> None:
    """Z2, to the bit, up to the last length at which nothing is dropped; one more token and it is not."""
    llm = make_llm(reuse="off")
    last = next(n for n in range(1, 99) if WINDOW.begin(np.array([n + 1]), 16)[0] > 0)
    prompts = texts(last - 8, last - 20, 2)
    states: list[Any] = []
    llm.core.observer = lambda request, row: states.append(max(request.selector.state._to.values(), default=0))
    sparse = logprobs(llm, prompts, using(), tokens=9)
    assert max(states) == 0, "something was folded"
    llm.core.observer = None
    assert sparse == logprobs(llm, prompts, KVOptions(), tokens=9)
    assert logprobs(llm, prompts[:1], using(), tokens=10)[0][:9] == logprobs(llm, prompts[:1], KVOptions(), tokens=9)[0]
    stats = llm.stats().selection["razor_view"]
    assert stats.attended < stats.held


@pytest.mark.parametrize("block", [4, 16])
def test_heads_see_what_their_class_says(make_llm: Make, trace: Trace, block: int) -> None:
    llm = make_llm(block_size=block)
    traced = trace(llm)
    result = llm.generate(texts(60), greedy(20), kv=using())[0]
    calls = [call for call in traced.calls if call.rows.size == 1]
    assert len(calls) == 19 * LAYERS
    read = 0
    for i, call in enumerate(calls):
        n = int(call.rows.stop[0])
        begin = int(WINDOW.begin(np.array([n]), block)[0])
        assert 0 < begin <= n - 20
        for head, seen in enumerate(call.seen[0]):
            whole = head in SOME.retrieval[i % LAYERS]
            assert seen.tolist() == (list(range(n)) if whole else [0, 1, 2, *range(begin, n)])
            read += len(seen)
    stats = llm.stats().selection["razor_view"]
    held = sum(range(61, 80))
    assert (stats.decode_rows, stats.attended, stats.held) == (19, read / HEADS, LAYERS * held)
    assert result.usage is not None
    assert result.usage.held_tokens == held and result.usage.attended_tokens == pytest.approx(read / HEADS / LAYERS, abs=1)
    kv_bytes = llm.stats().kv_bytes
    assert kv_bytes["list"] == 19 * 3 * 3 * 2 * 16 * 4  # rows, local heads, sinks, K and V, dims, fp32


def test_heads_are_left_out_only_where_they_differ(make_llm: Make, trace: Trace) -> None:
    llm = make_llm()
    traced = trace(llm)
    llm.generate(texts(60), greedy(3), kv=KVOptions(selection="sink_window", budget=24))
    assert not any(call.left_out for call in traced.calls)
    traced.calls.clear()
    llm.generate(texts(60, seed=1), greedy(3), kv=using())
    differ = [bool(SOME.local(i) and SOME.retrieval[i]) for i in range(LAYERS)]
    assert [call.left_out for call in traced.calls if not call.dense] == differ * 2


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("compensation", [True, False])
def test_outputs_are_those_of_the_masked_oracle(make_llm: Make, trace: Trace, backend: str, compensation: bool) -> None:
    """A mixed batch that grows: prompts in chunks, rows within and beyond their windows, dense ones beside them."""
    llm = make_llm(backend=backend, max_batched_tokens=40, kv_memory="1MiB", max_model_len=128)
    traced, outs = trace(llm), outputs(llm)
    llm.generate(texts(50, 20, 60), greedy(10), kv=using(compensation=compensation))
    assert assert_oracle(traced, outs, token=compensation) > 50


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 5}])
def test_drafts_that_are_taken_back_are_in_no_sum(make_llm: Make, trace: Trace, sampling: dict[str, Any]) -> None:
    """Windows so short that drafted tokens would soon leave them; the output is the dense one."""
    llm = make_llm(block_size=1, reuse="off", kv_memory="256KiB", max_model_len=128)
    prompts, params = texts(40, 25), SamplingParams(**{"temperature": 0, **sampling}, max_tokens=20, ignore_eos=True)
    dense = llm.generate(prompts, params)
    traced, outs = trace(llm), outputs(llm)
    kv = KVOptions(
        selection="razor_view", draft=True, draft_tokens=6, options={"sinks": 2, "min_window": 1, "window_divisor": 100}
    )
    drafted = llm.generate(prompts, params, kv=kv)
    assert [r.tokens for r in drafted] == [r.tokens for r in dense]
    usage = [r.usage for r in drafted if r.usage is not None]
    assert sum(u.accepted_tokens for u in usage) < sum(u.drafted_tokens for u in usage)
    assert assert_oracle(traced, outs) > 100


def test_sums_are_made_anew_after_preemption(make_llm: Make, trace: Trace) -> None:
    """A preempted request's tokens are computed again, densely: other KV than what was in the sums."""
    llm = make_llm(kv_memory=12 * 16 * 2 * 2 * 16 * 4 * 3, max_model_len=160)  # blocks of 16 tokens
    traced, outs = trace(llm), outputs(llm)
    llm.generate(texts(50, 60, 40), greedy(40), kv=using())
    assert llm.stats().preemptions > 0
    assert assert_oracle(traced, outs) > 100


def test_heads_do_not_depend_on_each_other(make_llm: Make, set_heads: SetHeads) -> None:
    """Z6: with the same inputs, which are those of the first layer of the first decode step, a head's output is the same to
    the bit whatever class the other head is of."""
    found = {}
    for retrieval in ((), (0,), (1,), (0, 1)):
        set_heads(HeadClasses((retrieval, (), ()), HEADS))
        llm = make_llm()
        outs = outputs(llm)
        llm.generate(texts(70), greedy(2), kv=using())
        found[retrieval] = outs[0].unflatten(1, (HEADS, -1))[0]
    for head in range(HEADS):
        local = [out[head] for retrieval, out in found.items() if head not in retrieval]
        whole = [out[head] for retrieval, out in found.items() if head in retrieval]
        assert torch.equal(*local) and torch.equal(*whole) and not torch.equal(local[0], whole[0])


def test_evict_mode_computes_the_same(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = RazorCalibration(
        model_key="", model="", induction=((0.9, 0.8), (0.1, 0.7), (0.0, 0.0)), echo=((0.9, 0.0), (0.0, 0.0), (0.0, 0.0))
    )
    monkeypatch.setattr("kvloom.engine.retention.window.find_razor", lambda model_key: calibration)
    monkeypatch.setattr(razor_view, "head_classes", CALIBRATED)
    assert calibration.classes(0.5) == SOME
    forced = texts(40, seed=5)[0]
    sampling = SamplingParams(temperature=0, max_tokens=40, forced_tokens=tuple(forced), logprobs=0)
    options = '{"induction_share": 0.5, "sinks": 3, "min_window": 20, "window_divisor": 4}'
    evicting = make_llm(retention="razor", retention_options=options).generate(texts(80, 50), sampling)
    viewing = make_llm().generate(texts(80, 50), sampling, kv=using(induction_share=0.5))
    for one, other in zip(evicting, viewing):
        assert [e.logprob for e in one.logprobs] == pytest.approx([e.logprob for e in other.logprobs], abs=2e-5)


# Beside others -------------------------------------------------------------------------------------------------------------


def test_shadow_measuring_does_not_disturb(make_llm: Make) -> None:
    prompts = texts(60, 45)
    plain = logprobs(make_llm(), prompts, using())
    masses = []
    for compensation in (True, False):
        llm = make_llm(shadow_interval=1)
        found = logprobs(llm, prompts, using(compensation=compensation))
        assert (found == plain) == compensation
        stats = llm.stats().selection["razor_view"]
        masses.append(stats.mass / stats.mass_samples)
    assert all(0.1 < mass < 1.0 for mass in masses)
    assert masses[0] == pytest.approx(masses[1], abs=0.05)  # of what was read: the token is not counted


def test_sparse_kv_is_never_published(make_llm: Make) -> None:
    llm = make_llm(block_size=8)
    (text,) = texts(64)
    result = llm.generate([text], greedy(40), kv=using())[0]
    again = llm.generate([[*text, *result.tokens, 5]], greedy(1), kv=using())[0]
    assert again.usage is not None and again.usage.cached_tokens == 64


@pytest.mark.parametrize("retrieval", ["sink_window", "token_select", "tidal_decode", "recycled"])
def test_retrieval_heads_read_by_another_method(make_llm: Make, trace: Trace, retrieval: str) -> None:
    """Their lists in the first layer of the first step are the method's own; local heads see what they would anyway."""
    (text,), first = texts(120), {}
    for kv in (KVOptions(selection=retrieval, budget=32), using(32, retrieval=retrieval)):
        llm = make_llm(kv_memory="256KiB", max_model_len=160)
        traced, outs = trace(llm), outputs(llm)
        llm.generate([text], greedy(12), kv=kv)
        calls = [call for call in traced.calls if not call.dense]
        first[kv.selection] = [seen.tolist() for seen in calls[0].seen[0]]
    assert first["razor_view"] == first[retrieval]
    assert all(20 <= len(seen) <= 40 for seen in first["razor_view"])
    for i, call in enumerate(calls):
        n = int(call.rows.stop[0])
        window = [0, 1, 2, *range(int(WINDOW.begin(np.array([n]), 16)[0]), n)]
        for head, seen in enumerate(call.seen[0]):
            assert (seen.tolist() == window) == (head in SOME.local(i % LAYERS))
    assert assert_oracle(traced, outs) == 11 * 3  # in every step, the local heads of three
    stats = llm.stats().selection
    assert stats["razor_view"].attended == sum(len(seen) for call in calls for seen in call.seen[0]) / HEADS
    assert stats[retrieval].decode_rows == 0
    assert retrieval == "sink_window" or stats["razor_view"].selections > 0


def test_short_windows_within_long_budgets_and_the_other_way(make_llm: Make, trace: Trace) -> None:
    """Each kind of head is sparse from its own length on."""
    for budget, least in ((100, 20), (24, 100)):
        llm = make_llm()
        traced = trace(llm)
        llm.generate(texts(60), greedy(4), kv=using(budget, retrieval="token_select", min_window=least))
        for i, call in enumerate(call for call in traced.calls if call.rows.size == 1):
            n = int(call.rows.stop[0])
            for head, seen in enumerate(call.seen[0]):
                local = head in SOME.local(i % LAYERS)
                assert (len(seen) < n) == (local == (least == 20))


def test_conversations_need_their_retrieval_heads(make_llm: Make, set_heads: SetHeads) -> None:
    """A second turn about the first: its text is dense, its answer is not, and differs with the heads that see everything."""
    (first,), (question,) = texts(150), texts(20, seed=1)
    forced = tuple(texts(24, seed=2)[0])
    found = {}
    for name, classes in (("none", NONE), ("some", SOME), ("all", ALL)):
        set_heads(classes)
        llm = make_llm()
        turn = llm.generate([first], greedy(24, forced_tokens=forced), kv=using())[0]
        found[name] = logprobs(llm, [[*first, *turn.tokens, *question]], using(), forced_tokens=forced)[0]
    llm = make_llm()
    turn = llm.generate([first], greedy(24, forced_tokens=forced))[0]
    dense = logprobs(llm, [[*first, *turn.tokens, *question]], KVOptions(), forced_tokens=forced)[0]
    far = {name: max(abs(a[1] - b[1]) for a, b in zip(one, dense)) for name, one in found.items()}
    assert far["all"] < 1e-5 and far["some"] > 1e-3 and far["none"] > 1e-3
    assert found["none"] != found["some"]
    for row in found.values():  # the first token comes from the prompt's last row, which is dense
        assert row[0][1] == pytest.approx(dense[0][1], abs=1e-4)


# Options -------------------------------------------------------------------------------------------------------------------


def test_heads_come_from_the_calibration(make_llm: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(store, "own_folder", lambda: tmp_path)
    monkeypatch.setattr(razor_view, "head_classes", CALIBRATED)
    llm = make_llm()
    with pytest.raises(InvalidRequestError, match="kvloom calibrate razor"):
        llm.generate(texts(60), greedy(2), kv=using())
    key = llm.core.runner.geometry.model_key
    scores = ((0.1, 0.2), (0.9, 0.3), (0.4, 0.8))
    save_razor(RazorCalibration(model_key=key, model="tiny", induction=scores, echo=((0.0, 0.0), (0.0, 0.5), (0.0, 0.0))))

    def local(**options: Any) -> list[tuple[int, ...]]:
        selector: Any = llm.core._admission.selectors.policy(using(**options)).selector
        return [tuple(mask.nonzero()[:, 0].tolist()) for mask in selector.local]

    assert local() == [(0, 1), (), (0, 1)]  # the best by induction, the best by echo
    assert local(induction_share=0.3) == [(0, 1), (), (0,)]
    assert local(induction_share=1) == [(), (), ()]
    drawn = [local(heads="random", seed=seed, induction_share=0.3) for seed in range(5)]
    assert {sum(map(len, one)) for one in drawn} == {3} and len({tuple(one) for one in drawn}) > 2


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        (using(budget=64), "kv.budget is 64, but razor_view has no budget with these options"),
        (using(retrieval="dense"), "kv.razor_view.retrieval is 'dense'; allowed: null"),
        (using(retrieval="razor_view"), "kv.razor_view.retrieval is 'razor_view'; allowed: null"),
        (using(4, retrieval="sink_window"), "kv.sink_window.sinks is 4; allowed: less than the budget of 4"),
        (using(sinks=-1), "kv.razor_view.sinks is -1; allowed: 0 to"),
        (using(min_window=0), "kv.razor_view.min_window is 0; allowed: 1 to"),
        (using(window_divisor=0), "kv.razor_view.window_divisor is 0; allowed: 1 to"),
        (using(induction_share=1.5), "kv.razor_view.induction_share is 1.5; allowed: 0 to 1"),
        (using(echo_share=-0.1), "kv.razor_view.echo_share is -0.1; allowed: 0 to 1"),
        (using(heads="best"), "kv.razor_view.heads is 'best'; allowed: calibrated, random"),
        (using(window=5), "kv.razor_view.window is not an option; allowed: compensation"),
        (using(compensation=1), "kv.razor_view.compensation is 1"),
    ],
)
def test_bad_options_are_refused_by_name(make_llm: Make, kv: KVOptions, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        make_llm().generate(texts(20), greedy(2), kv=kv)


def test_methods_that_look_at_logits_or_prompts_are_refused(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvloom.engine.selection.recycled import Recycled
    from kvloom.engine.selection.token_select import TokenSelect

    monkeypatch.setattr(TokenSelect, "emits", True)
    monkeypatch.setattr(Recycled, "prompts", "seed", raising=False)
    monkeypatch.setattr(Recycled, "__init__", lambda self, *_: setattr(self, "emits", False))
    for name in ("token_select", "recycled"):
        with pytest.raises(InvalidRequestError, match=f"retrieval is '{name}'; allowed: methods that compute prompts densely"):
            make_llm().generate(texts(20), greedy(2), kv=using(64, retrieval=name))


def test_server_defaults(make_llm: Make) -> None:
    options = '{"sinks": 3, "min_window": 20, "window_divisor": 4}'
    llm = make_llm(selection="razor_view", selection_options=options)
    assert logprobs(llm, texts(60), KVOptions()) == logprobs(make_llm(), texts(60), using())
    with pytest.raises(ConfigError, match="--budget is 64, but razor_view has no budget"):
        make_llm(selection="razor_view", budget=64)
    both = make_llm(selection="razor_view", budget=32, selection_options='{"retrieval": "token_select"}')
    both.generate(texts(60), greedy(2))
    both.generate(texts(60), greedy(2), kv=using())  # the server's budget is not this request's
    elsewhere = make_llm(selection="token_select", budget=32)
    assert logprobs(elsewhere, texts(60), using()) == logprobs(make_llm(), texts(60), using())
