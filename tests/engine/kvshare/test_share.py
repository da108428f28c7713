"""KVShare against an eager fp64 Llama that holds KV in plain tensors: naive reuse, repair by every policy, exactness, taint."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from kvloom.engine import LLM, KVOptions, SamplingParams
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.llm import Completion
from kvloom.engine.requests.request import Request
from kvloom.engine.reuse.kvshare.share import KVShare

MakeLLM = Callable[..., LLM]
OPTIONS = (
    '{"verified": true, "min_match": 32, "min_reusable": 48, "min_gain": -1, "reject_above": 10, "shadow_share": 0, '
    '"heal": false%s}'
)
ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
EIGHT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
THETA = 10_000.0


def text(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 300) for _ in range(length)]


def approx(**options: Any) -> KVOptions:
    return KVOptions(reuse="approx", reuse_options=options, explain=True)


@pytest.fixture
def make(make_llm: MakeLLM) -> MakeLLM:
    """Engines that share KV freely."""

    def build(extra: str = "", **config: Any) -> LLM:
        return make_llm(**{"kvshare_options": OPTIONS % extra, "segment_memory": "64MiB", **config})

    return build


class Watch:
    """Repairs and logits of requests, kept as they come."""

    def __init__(self, llm: LLM) -> None:
        self.repairs: list[Any] = []
        self.requests: list[Request] = []
        self.logits: list[Tensor] = []
        llm.core.observer = self._see

    def _see(self, request: Request, logits: Tensor) -> None:
        self.logits.append(logits[0].clone())
        if request not in self.requests:
            self.requests.append(request)
            self.repairs.append(request.repair)


# The oracle ------------------------------------------------------------------------------------------------------------------


class KV(NamedTuple):
    """Per layer keys, rotated, and values: [n, kv_heads, dim] fp64."""

    k: list[Tensor]
    v: list[Tensor]

    def part(self, first: int, last: int, shift: int) -> KV:
        """Rows moved by `shift` positions."""
        return KV([rotated(k[first:last], torch.full((last - first,), float(shift))) for k in self.k],
                  [v[first:last] for v in self.v])  # fmt: skip


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """x: [n, heads, dim], as complex pairs (i, i + dim / 2)."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() * THETA ** (-torch.arange(half).double() / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


class Eager:
    """Runs chosen rows through chosen layers over KV that is already there."""

    def __init__(self, oracle: Any) -> None:
        self.model = oracle.double()
        self.config = oracle.config

    def blank(self, length: int) -> KV:
        shape = (length, self.config.num_key_value_heads, self.config.head_dim)
        zeros = [torch.zeros(shape, dtype=torch.float64) for _ in range(2 * self.config.num_hidden_layers)]
        return KV(zeros[::2], zeros[1::2])

    @torch.inference_mode()
    def run(
        self, tokens: Sequence[int], kv: KV, rows: Sequence[int], layers: int | None = None, hidden: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute rows in layers [0, layers), writing kv. Returns logits of the last row, and each layer's attention
        weights [rows, heads, n]."""
        model, config = self.model.model, self.config
        at = torch.tensor(rows)
        x = model.embed_tokens(torch.tensor(tokens)[at])
        weights = []
        group = config.num_attention_heads // config.num_key_value_heads
        for index, layer in enumerate(model.layers[: layers or len(model.layers)]):
            h, attention = layer.input_layernorm(x), layer.self_attn
            q, k, v = (
                f(h).view(len(rows), -1, config.head_dim) for f in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, kv.k[index][at], kv.v[index][at] = rotated(q, at), rotated(k, at), v
            keys, values = (t[index].repeat_interleave(group, dim=1) for t in (kv.k, kv.v))
            scores = torch.einsum("rhd,nhd->rhn", q, keys) * config.head_dim**-0.5
            scores = scores.masked_fill(torch.arange(len(tokens))[None, None] > at[:, None, None], float("-inf"))
            scores[..., list(hidden)] = float("-inf")
            weights.append(scores.softmax(-1))
            x = x + attention.o_proj(torch.einsum("rhn,nhd->rhd", weights[-1], values).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.lm_head(model.norm(x[-1:]))[0], weights

    def full(self, tokens: Sequence[int]) -> tuple[Tensor, KV]:
        kv = self.blank(len(tokens))
        return self.run(tokens, kv, range(len(tokens)))[0], kv


@pytest.fixture
def eager(oracle: Any) -> Eager:
    import copy

    return Eager(copy.deepcopy(oracle))


class Case(NamedTuple):
    """A donor prompt, a prompt that holds parts of it elsewhere, and where: (first, last) of the donor -> position."""

    donor: list[int]
    prompt: list[int]
    moves: tuple[tuple[int, int, int], ...]


def shuffled() -> Case:
    a, b, c = text(1, 100), text(2, 90), text(3, 110)
    new, question = text(4, 21), text(5, 25)
    donor = [*text(6, 7), *a, *b, *c, *text(7, 20)]
    prompt = [*text(8, 11), *c, *new, *a, *question]
    return Case(donor, prompt, ((197, 307, 11), (7, 107, 11 + 110 + 21)))


def moved(eager: Eager, case: Case) -> KV:
    """Naive reuse: the donor's KV where the runs stand, nothing elsewhere."""
    _, donor = eager.full(case.donor)
    kv = eager.blank(len(case.prompt))
    for first, last, to in case.moves:
        part = donor.part(first, last, to - first)
        for index in range(len(kv.k)):
            kv.k[index][to : to + last - first], kv.v[index][to : to + last - first] = part.k[index], part.v[index]
    return kv


def reuse(llm: LLM, case: Case, sampling: SamplingParams = ONE, **options: Any) -> tuple[Completion, Any, Watch]:
    """Run the donor, then the prompt."""
    llm.generate([case.donor], ONE, kv=approx())
    watch = Watch(llm)
    result = llm.generate([case.prompt], sampling, kv=approx(tail=16, **options))[0]
    return result, watch.repairs[0], watch


# Reuse and repair ------------------------------------------------------------------------------------------------------------


def test_runs_are_found_where_they_are(make: MakeLLM) -> None:
    case = shuffled()
    _, repair, _ = reuse(make(), case, policy="boundary", ratio=0.0)
    found = [(run.start, run.stop, run.shift) for run in repair.runs]
    assert len(found) == len(case.moves)
    for (start, stop, shift), (first, last, to) in zip(found, case.moves):
        assert shift == to - first
        assert to <= start <= to + 31 and to + last - first - 31 <= stop <= to + last - first
        assert not repair.left  # all of its rows are done


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("policy", ["boundary", "random", "blend", "dhd", "query", "focus"])
@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_repaired_logits_equal_the_oracle(make: MakeLLM, eager: Eager, policy: str, ratio: float, backend: str) -> None:
    case = shuffled()
    _, repair, watch = reuse(make(backend=backend), case, policy=policy, ratio=ratio, boundary=4)
    assert len(repair.initial_stale) > 100
    kv = moved(eager, case)
    if policy in ("blend", "dhd", "query", "focus"):
        eager.run(case.prompt, kv, range(len(case.prompt)), layers=2)  # the scan leaves layers 0 and 1 as they should be
    wanted, _ = eager.run(case.prompt, kv, repair.rows.tolist())
    assert float((watch.logits[0] - wanted).abs().max()) < 2e-3
    exact, _ = eager.full(case.prompt)
    assert float((watch.logits[0] - exact).abs().max()) > 1e-2  # it really is something else than a full pass


@pytest.mark.parametrize("policy", ["blend", "dhd", "query", "focus"])
def test_ranking_is_the_formula(make: MakeLLM, eager: Eager, policy: str) -> None:
    case = shuffled()
    _, repair, _ = reuse(make(), case, policy=policy, ratio=0.25, boundary=0)
    reused = np.concatenate([np.arange(run.start, run.stop) for run in repair.runs])
    kv = moved(eager, case)
    copied = kv.v[1].clone()
    eager.run(case.prompt, kv, range(len(case.prompt)), layers=2)
    deviation = (kv.v[1] - copied).abs().sum(dim=(1, 2))
    fresh = sorted({*range(len(case.prompt))} - {*reused.tolist()})
    probe = fresh[-16:]
    deep = policy in ("query", "focus")
    layers = 3 if deep else 2
    _, weights = eager.run(
        case.prompt,
        KV([k.clone() for k in kv.k], [v.clone() for v in kv.v]),
        probe,
        layers=layers,
        hidden=fresh[:-16] if deep else (),
    )
    attention = torch.stack(weights if deep else weights[1:]).mean(dim=(0, 1, 2))
    score = {"blend": deviation, "query": attention, "dhd": deviation * attention, "focus": deviation * attention.sqrt()}[
        policy
    ]
    order = sorted(reused.tolist(), key=lambda p: -float(score[p]))
    wanted = set(order[: round(0.25 * len(reused))])
    chosen = set(reused.tolist()) - set(repair.initial_stale.tolist())
    assert len(chosen) == len(wanted)
    worst, best_left = min(float(score[p]) for p in chosen), max(float(score[p]) for p in repair.initial_stale)
    assert worst >= best_left * (1 - 1e-3)


@pytest.mark.parametrize("policy", ["boundary", "random", "blend", "dhd", "query", "focus"])
def test_ratio_one_is_exact(make: MakeLLM, oracle: Any, policy: str) -> None:
    case = shuffled()
    _, repair, watch = reuse(make(), case, policy=policy, ratio=1.0)
    assert not len(repair.stale) and repair.kinds["ranked"] + repair.kinds["boundary"] > 150
    with torch.inference_mode():
        wanted = oracle(torch.tensor([case.prompt])).logits[0, -1]
    assert float((watch.logits[0] - wanted).abs().max()) < 1e-3


@pytest.mark.parametrize("policy", ["boundary", "random", "blend", "dhd", "query", "focus"])
def test_sets_are_nested_and_cost_what_they_say(make: MakeLLM, policy: str) -> None:
    case, chosen = shuffled(), []
    llm = make()
    llm.generate([case.donor], ONE, kv=approx())
    for ratio in (0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0):
        llm.core.cache.evict()
        watch = Watch(llm)
        llm.generate([case.prompt], replace_seed(ONE), kv=approx(policy=policy, ratio=ratio))
        repair = watch.repairs[0]
        reused = sum(run.length for run in repair.runs)
        assert repair.kinds["boundary"] + repair.kinds["ranked"] == round(ratio * reused)
        chosen.append(set(repair.rows.tolist()))
    assert all(small <= large for small, large in itertools.pairwise(chosen))


def replace_seed(sampling: SamplingParams) -> SamplingParams:
    """The control ranks by the request's seed."""
    return SamplingParams(temperature=0, max_tokens=sampling.max_tokens, ignore_eos=True, seed=7)


def test_same_place_same_context_deviates_nowhere(make: MakeLLM) -> None:
    """A donor with the same beginning, when the prefix cache has lost it: reuse is exact."""
    llm = make()
    beginning = text(1, 200)
    llm.generate([beginning + text(2, 30)], ONE, kv=approx())
    llm.core.cache.evict()
    watch = Watch(llm)
    llm.generate([beginning + text(3, 30)], ONE, kv=approx(policy="blend", ratio=0.0))
    assert watch.repairs[0].deviation == pytest.approx([0.0] * len(watch.repairs[0].runs), abs=1e-5)
    off = llm.generate([beginning + text(3, 30)], ONE, kv=KVOptions(reuse="off"))[0]
    assert off.tokens == [int(watch.logits[0].argmax())]


# Together with the rest of the engine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 16, 17, 64])
def test_behind_an_exact_prefix(make: MakeLLM, eager: Eager, prefix: int) -> None:
    case = shuffled()
    front = text(50, prefix)
    prompt = front + case.prompt
    llm = make()
    if front:
        llm.generate([front + text(51, 20)], ONE, kv=KVOptions(reuse="exact"))
    llm.generate([case.donor], ONE, kv=approx())
    watch = Watch(llm)
    result = llm.generate([prompt], ONE, kv=approx(policy="boundary", ratio=0.0, boundary=0))[0]
    assert result.usage is not None and result.usage.cached_tokens == prefix // 16 * 16
    moves = tuple((first, last, to + prefix) for first, last, to in case.moves)
    kv = moved(eager, Case(case.donor, prompt, moves))
    _, kv = kv, kv
    rows = sorted({*range(prefix // 16 * 16), *watch.repairs[0].rows.tolist()})
    wanted, _ = eager.run(prompt, kv, rows)
    assert float((watch.logits[0] - wanted).abs().max()) < 2e-3


@pytest.mark.parametrize("budget", [16, 33, 90])
def test_chunks_do_not_matter(make: MakeLLM, budget: int) -> None:
    case = shuffled()
    _, _, whole = reuse(make(), case, policy="dhd", ratio=0.2)
    _, repair, cut = reuse(make(max_batched_tokens=budget, max_num_seqs=8), case, policy="dhd", ratio=0.2)
    assert len(repair.rows) > budget
    assert float((whole.logits[0] - cut.logits[0]).abs().max()) < 1e-3


@pytest.mark.parametrize("config", [{}, {"max_batched_tokens": 48}], ids=str)
def test_mixed_batch_equals_solo(make: MakeLLM, config: dict[str, Any]) -> None:
    """Several requests that reuse, others that do not, all at once: each as if alone."""
    docs = [text(i, 80) for i in range(1, 6)]
    orders = [(2, 0, 3), (4, 1, 0), (1, 3, 2), (0, 4, 1)]
    prompts = [[*text(20 + i, 9), *(t for d in order for t in docs[d]), *text(30 + i, 25)] for i, order in enumerate(orders)]
    donors = [[*docs[0], *docs[1], *docs[2]], [*docs[3], *docs[4]]]
    plain = [text(40, 150), text(41, 30)]

    def fresh() -> LLM:
        llm = make(**config)
        for donor in donors:
            llm.generate([donor], ONE, kv=approx())
        llm.core.cache.evict()
        return llm

    kv = approx(policy="blend", ratio=0.2)
    alone = []
    for prompt in prompts:
        alone.append(fresh().generate([prompt], EIGHT, kv=kv)[0].tokens)
    exact = [fresh().generate([prompt], EIGHT, kv=KVOptions(reuse="exact"))[0].tokens for prompt in plain]
    llm = fresh()
    requests = [llm._request(p, EIGHT, kv) for p in prompts] + [llm._request(p, EIGHT, KVOptions(reuse="exact")) for p in plain]
    results = llm._run(requests)
    assert [result.tokens for result in results] == alone + exact
    assert all(result.usage is not None and result.usage.reused_tokens > 100 for result in results[:4])


def test_preempted_requests_come_back(make: MakeLLM) -> None:
    block = 3 * 2 * 2 * 16 * 4 * 16
    docs = [text(i, 80) for i in range(1, 5)]
    llm = make(kv_memory=32 * block, max_model_len=480)
    llm.generate([[t for d in docs for t in d]], ONE, kv=approx())
    prompts = [[*text(60 + i, 5), *docs[i], *docs[i - 1], *text(70 + i, 20)] for i in range(4)]
    long = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    results = llm.generate(prompts, long, kv=approx(policy="blend", ratio=0.1, refresh=2))
    assert all(len(result.tokens) == 100 for result in results)
    assert llm.stats().preemptions > 0
    llm.core.check()
    llm.core.feature(KVShare).store.check()


# Taint -----------------------------------------------------------------------------------------------------------------------


def test_nothing_approximate_is_published(make: MakeLLM) -> None:
    case = shuffled()
    llm = make()
    _, repair, _ = reuse(llm, case, sampling=EIGHT, policy="blend", ratio=0.2)
    stored = len(llm.core.feature(KVShare).store)
    exact = llm.generate([case.prompt], ONE, kv=KVOptions(reuse="exact"))[0]
    assert exact.usage is not None
    assert exact.usage.cached_tokens <= repair.initial_stale[0]  # no block at or behind the first stale position is found
    again = llm.generate([case.prompt + text(9, 30)], ONE, kv=KVOptions(reuse="exact"))[0]
    off = llm.generate([case.prompt + text(9, 30)], ONE, kv=KVOptions(reuse="off"))[0]
    assert again.tokens == off.tokens
    assert (
        len(llm.core.feature(KVShare).store) == stored or repair.initial_stale[0] >= 32
    )  # a tainted prompt leaves no donor behind its taint


def test_tainted_part_is_never_a_donor(make: MakeLLM) -> None:
    case = shuffled()
    llm = make()
    reuse(llm, case, policy="blend", ratio=0.2)
    for segment in segments(llm):
        assert any(is_part(segment.tokens.tolist(), known) for known in (case.donor, case.prompt[:11]))


def segments(llm: LLM) -> list[Any]:
    return list(llm.core.feature(KVShare).store)


def is_part(needle: list[int], hay: list[int]) -> bool:
    return any(hay[i : i + len(needle)] == needle for i in range(len(hay) - len(needle) + 1))


# Refreshing ------------------------------------------------------------------------------------------------------------------


def test_sweep_makes_a_request_exact(make: MakeLLM, oracle: Any) -> None:
    case = shuffled()
    llm = make()
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    result, _, watch = reuse(llm, case, sampling=long, policy="boundary", ratio=0.0, refresh=16, refresh_order="sweep")
    request = watch.requests[0]
    assert request.taint > len(request.tokens) and request.exact >= len(request.tokens) - 1
    tokens = torch.tensor([case.prompt + result.tokens[:-1]])
    with torch.inference_mode():
        wanted = oracle(tokens).logits[0, -1]
    assert float((watch.logits[-1] - wanted).abs().max()) < 1e-3
    with torch.inference_mode():
        exact = oracle(torch.tensor([case.prompt])).logits[0, -1]
    assert float((watch.logits[0] - exact).abs().max()) > 1e-2  # it was not exact at first
    again = llm.generate([case.prompt + result.tokens], ONE, kv=KVOptions(reuse="exact"))[0]
    assert again.usage is not None and again.usage.cached_tokens > len(case.prompt)  # healed: published


@pytest.mark.parametrize("order", ["importance", "position", "runs"])
def test_refreshing_brings_logits_closer(make: MakeLLM, oracle: Any, order: str) -> None:
    case = shuffled()
    forced = tuple(text(80, 40))
    long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, forced_tokens=forced)
    tokens = torch.tensor([case.prompt + list(forced[:39])])
    with torch.inference_mode():
        wanted = oracle(tokens).logits[0, -1]
    error = {}
    for refresh in (0, 8):
        result, repair, watch = reuse(
            make(', "stop_mass": 0'), case, sampling=long, policy="blend", ratio=0.0, refresh=refresh, refresh_order=order
        )
        error[refresh] = float((watch.logits[39] - wanted).abs().mean())
        assert repair.refreshed == (0 if not refresh else pytest.approx(len(repair.initial_stale), abs=80))
        assert result.usage is not None
    assert error[8] < 0.5 * error[0]


# What cannot be --------------------------------------------------------------------------------------------------------------


def test_off_means_off(make_llm: MakeLLM) -> None:
    llm = make_llm()
    case = shuffled()
    llm.generate([case.donor], ONE)
    result = llm.generate([case.prompt], ONE)[0]
    assert result.usage is not None and result.usage.reused_tokens == 0
    assert len(llm.core.feature(KVShare).store) == 0 and not llm.core.background.waiting


@pytest.mark.parametrize(
    ("kv", "param"),
    [
        (KVOptions(reuse="approx", reuse_options={"policy": "best"}), "kv.kvshare.policy"),
        (KVOptions(reuse="approx", reuse_options={"ratio": 1.5}), "kv.kvshare.ratio"),
        (KVOptions(reuse="approx", reuse_options={"rato": 0.5}), "kv.kvshare.rato"),
        (KVOptions(reuse="approx", share="everyone"), "kv.share"),
        (KVOptions(reuse="approx", share="group"), "kv.share"),
        (KVOptions(reuse="approx", share="public"), "kv.share"),
        (KVOptions(reuse="exact", reuse_options={"ratio": 0.5}), "kv.kvshare"),
        (KVOptions(share="tenant"), "kv.share"),
    ],
    ids=str,
)
def test_bad_options_are_refused(make: MakeLLM, kv: KVOptions, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make().generate([text(1, 40)], ONE, kv=kv)
    assert caught.value.param == param


def test_unverified_models_refuse(make_llm: MakeLLM) -> None:
    with pytest.raises(InvalidRequestError, match="calibrate kvshare"):
        make_llm().generate([text(1, 40)], ONE, kv=KVOptions(reuse="approx"))


@pytest.mark.parametrize("policy", ["focus", "query", "dhd", "blend"])
def test_what_blocks_held_before_does_not_matter(make: MakeLLM, policy: str) -> None:
    """Rows that are not computed yet lie in blocks that others used: nothing may look at them."""
    case, chosen = shuffled(), []
    for dirt in (0.0, 3.0):
        llm = make()
        llm.generate([case.donor], ONE, kv=approx())
        llm.core.cache.evict()
        for layer in llm.core.cache.storage.layers:
            layer.k.fill_(dirt)
            layer.v.fill_(dirt)
        watch = Watch(llm)
        llm.generate([case.prompt], ONE, kv=approx(policy=policy, ratio=0.2))
        chosen.append((watch.repairs[0].rows.tolist(), watch.logits[0]))
    assert chosen[0][0] == chosen[1][0]
    assert float((chosen[0][1] - chosen[1][1]).abs().max()) < 1e-4
