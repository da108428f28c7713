"""Every number that a request can bring has a range, declared beside its field; what lies outside is refused by name."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from kvloom.engine import LLM, KVOptions, SamplingParams
from kvloom.engine.bounds import Range, range_of, shown, told, wrong
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.requests.request import Request
from kvloom.engine.retention.razor import RazorOptions
from kvloom.engine.reuse.kvshare.options import RepairOptions, ShareOptions
from kvloom.engine.selection import METHODS

MakeLLM = Callable[..., LLM]
OPTIONS: tuple[Any, ...] = (
    SamplingParams, RepairOptions, ShareOptions, RazorOptions, *(method.options for method in METHODS.values()))  # fmt: skip
HOSTILE = (True, -1, 0, 1, 2, 3, 2**31, 2**63 - 1, 10**30, 10**5000, -(2**63), 0.5, math.nan, math.inf, -math.inf, 1e-40, 1e300,
           "x" * 10_000, "", [], [1], [1, 1], [-1], [10**20], [True], {}, None)  # fmt: skip
SHARE = '{"verified": true, "min_match": 32, "min_reusable": 48, "min_gain": -1, "reject_above": 10}'


def text(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 300) for _ in range(length)]


def numbers(cls: Any) -> list[dataclasses.Field[Any]]:
    kinds = get_type_hints(cls)
    wanted = {int, float, tuple[int, ...], Mapping[int, float]}
    return [field for field in dataclasses.fields(cls) if {kinds[field.name], *get_args(kinds[field.name])} & wanted]


@pytest.mark.parametrize("cls", OPTIONS)
def test_every_number_has_a_range_and_its_default_lies_in_it(cls: Any) -> None:
    for field in numbers(cls):
        bounds = range_of(field)
        assert bounds is not None, f"{cls.__name__}.{field.name} has no range"
        assert field.default in (None, (), dataclasses.MISSING) or bounds.holds(field.default)
    assert wrong(cls()) is None


def test_ranges_are_told_as_they_are_checked() -> None:
    ranges = (Range(0, 16), Range(0, 1, above=True), Range(1, 7, odd=True, note="1 for none"), Range(0.01, 2))
    told = ("0 to 16", "above 0, at most 1", "an odd number, 1 to 7 (1 for none)", "0.01 to 2")
    assert tuple(map(str, ranges)) == told
    assert [Range(1, 7, odd=True).holds(v) for v in (0, 1, 2, 7, 8, math.nan)] == [False, True, False, True, False, False]
    assert [Range(0, 1, above=True).holds(v) for v in (0, 1e-9, 1)] == [False, True, True]


def test_what_an_error_quotes_is_short() -> None:
    assert len(shown("x" * 10**6)) <= 80 and len(shown([1] * 10**6)) <= 80 and len(shown(10**4000)) <= 80
    assert shown(10**5000) == "a number of thousands of digits" and shown((1, 2)) == "[1, 2]" and shown("a") == "'a'"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"repetition_penalty": 1e-40}, "repetition_penalty is 1e-40; allowed: 0.01 to 100"),
        ({"temperature": math.nan}, "temperature is NaN; allowed: 0 to 100"),
        ({"n": True}, "n is true; allowed: a whole number, 1 to 128"),
        ({"seed": 2**64}, "seed is 18446744073709551616; allowed: -9223372036854775808 to 18446744073709551615, or null"),
        ({"top_k": -2}, "top_k is -2; allowed: -1 to 2147483647 (0 or -1 for all)"),
        ({"top_p": -0.1}, "top_p is -0.1; allowed: 0 to 1 (0 is greedy)"),
        ({"allowed_token_ids": ()}, "allowed_token_ids is []; allowed: 1 to 65536 token ids"),
        ({"allowed_token_ids": (1, -1)}, "is [1, -1]; allowed: a list of numbers, each 0 to 2147483647, or null"),
        ({"allowed_token_ids": (1, True)}, "allowed: a list of numbers"),
        ({"bad_words": ("a", " ")}, "none of them blank"),
        ({"bad_words": ("a" * 257,)}, "at most 256 characters"),
        ({"bad_words": ("a",) * 129}, "at most 128 strings"),
        ({"logprob_token_ids": tuple(range(129)), "logprobs": 1}, "at most 128 token ids"),
        ({"logprob_token_ids": (1,)}, "only with logprobs"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5; allowed: a whole number, 1 to 2147483647, or null"),
        ({"stop_token_ids": (1, -1)}, "stop_token_ids is [1, -1]; allowed: a list of numbers, each 0 to 2147483647"),
        ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, "allowed: at most 1024 token ids"),
    ],
)  # fmt: skip
def test_sampling_parameters_out_of_range_are_refused_by_name(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        SamplingParams(**wrong)
    assert said in str(error.value) and error.value.param == next(iter(wrong))


def test_a_seed_of_minus_one_is_none() -> None:
    assert SamplingParams(seed=-1).seed is None
    assert [choice.seed for choice in SamplingParams(seed=-1, n=2).choices()] == [None, None]
    assert [choice.seed for choice in SamplingParams(seed=-2, n=2).choices()] == [2**64 - 2, 2**64 - 1]


def run(llm: LLM, kv: KVOptions, prompt: list[int], **sampling: Any) -> str | None:
    """How a request ended, or None if it was refused, as it must be: by name, in one line that holds no exception."""
    params = SamplingParams(**{"max_tokens": 3, "ignore_eos": True, "temperature": 0.0, **sampling})
    try:
        llm.core.add(Request(id="r", prompt=prompt, sampling=params, kv=kv))
    except InvalidRequestError as error:
        assert error.param is not None and error.param.startswith("kv.") and len(str(error)) < 600
        assert "Error" not in str(error) and "array" not in str(error)
        return None
    ends = [output.finish_reason for _ in range(200) if llm.core.busy for output in llm.core.step() if output.finish_reason]
    llm.core.check()
    return ends[-1]


@pytest.mark.parametrize("name", [*METHODS, "kvshare"])
def test_hostile_options_are_refused_or_served(make_llm: MakeLLM, name: str) -> None:
    """Each option takes each of these values, alone; and every answer is whole or a refusal."""
    llm = make_llm(kvshare_options=SHARE, segment_memory="8MiB", max_batched_tokens=128, max_num_seqs=16)
    shared = text(0, 64)
    run(llm, KVOptions(reuse="approx") if name == "kvshare" else KVOptions(), [*text(1, 20), *shared])
    cls: Any = RepairOptions if name == "kvshare" else METHODS[name].options
    outcomes = []
    for number, (field, value) in enumerate(itertools.product(dataclasses.fields(cls), HOSTILE)):
        options = {field.name: value}
        kv = KVOptions(reuse="approx", reuse_options=options) if name == "kvshare" else KVOptions(
            selection=name, budget=32, options=options)  # fmt: skip
        if name == "razor_view":
            kv = dataclasses.replace(kv, budget=None)
        outcomes.append(run(llm, kv, [*text(number + 2, 9), *shared], seed=-number))
    assert llm.stats().internal_errors == 0
    assert set(outcomes) <= {None, "length"} and (name == "razor_view" or {None, "length"} == set(outcomes))


@pytest.mark.parametrize(
    ("kv", "param"),
    [
        (KVOptions(selection="recycled", options={"stride": 2**63}), "kv.recycled.stride"),
        (KVOptions(selection="recycled", options={"pool": 5_000_001}), "kv.recycled.pool"),
        (KVOptions(selection="token_select", options={"prefill_budget": 10**30}), "kv.token_select.prefill_budget"),
        (KVOptions(selection="token_select", options={"prefill_budget": 513}), "kv.token_select.prefill_budget"),
        (KVOptions(selection="razor_view", options={"sinks": 3_000_000_000}), "kv.razor_view.sinks"),
        (KVOptions(selection="razor_view", options={"seed": -1, "heads": "random"}), "kv.razor_view.seed"),
        (KVOptions(selection="razor_view", options={"retrieval": {}}), "kv.razor_view.retrieval"),
        (KVOptions(selection="tidal_decode", options={"layers": [1, 10**30]}), "kv.tidal_decode.layers"),
        (KVOptions(selection="sink_window", budget=True), "kv.budget"),
        (KVOptions(selection="sink_window", draft=True, draft_tokens=True), "kv.draft_tokens"),
        (KVOptions(reuse="approx", reuse_options={"ratio": math.nan}), "kv.kvshare.ratio"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(make_llm: MakeLLM, kv: KVOptions, param: str) -> None:
    llm = make_llm(kvshare_options=SHARE)
    with pytest.raises(InvalidRequestError) as error:
        llm.core.add(Request(id="r", prompt=[5] * 40, sampling=SamplingParams(), kv=kv))
    assert error.value.param == param and not llm.core.busy


def test_priorities_have_a_range(make_llm: MakeLLM) -> None:
    llm = make_llm(scheduler="cache_aware")
    for priority in (2**31, -(2**31), 10**400, 10**5000):
        with pytest.raises(InvalidRequestError, match=r"priority is .*; allowed: -2147483647 to 2147483647"):
            llm.core.add(Request(id="r", prompt=[5] * 9, sampling=SamplingParams(), priority=priority))


def test_a_negative_seed_ranks_at_random(make_llm: MakeLLM) -> None:
    llm = make_llm(kvshare_options=SHARE, segment_memory="8MiB")
    shared = text(0, 120)
    kv = KVOptions(reuse="approx", reuse_options={"policy": "random"})
    ends = [run(llm, kv, [*text(i, 30), *shared, *text(i + 9, 20)], seed=-5) for i in range(2)]
    assert ends == ["length", "length"] and llm.stats().share.tokens["stale"] > 0 and llm.stats().internal_errors == 0


def test_the_documentation_holds_the_ranges() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "server.md").read_text()
    options = {"": SamplingParams, "kv.kvshare.": RepairOptions} | {f"kv.{name}.": m.options for name, m in METHODS.items()}
    missing = [
        line for prefix, cls in options.items() for name, allowed in told(cls)
        if name != "default_tokens"  # no field of a request: routes set it
        and (line := f"| `{prefix}{name}` | {allowed} |") not in text
    ]  # fmt: skip
    assert not missing
