"""Structured output in the engine: whatever a request asks for beside, its text is of its grammar; others' are as ever."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvloom.engine import LLM, KVOptions, SamplingParams
from kvloom.engine.constraint import progress
from kvloom.engine.constraint.options import StructuredOutput
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.llm import Completion
from kvloom.engine.requests.isolation import Blamed
from kvloom.engine.requests.request import Request
from tests.simulated import simulated_gpu

MakeLLM = Callable[..., LLM]
DENSE = KVOptions()
PROMPT = list(range(40, 81))
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FLAT = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 3}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
AS_PERSON = StructuredOutput(json_schema=PERSON)


def one(llm: LLM, structured: StructuredOutput, kv: KVOptions = DENSE, **params: Any) -> Completion:
    given = {"max_tokens": 120, "seed": 1, **params}
    return llm.generate([PROMPT], SamplingParams(structured=structured, **given), kv=kv)[0]


def check_person(result: Completion) -> None:
    found = json.loads(result.text)
    assert result.finish_reason == "stop" and found.keys() == PERSON["properties"].keys()
    assert len(found["name"]) <= 6 and 0 <= found["age"] <= 99 and set(found["tags"]) <= {"a", "bc"} and len(found["tags"]) <= 3


@pytest.mark.parametrize(
    "asked, wanted",
    [
        (StructuredOutput(regex=r"^[a-c]{3}-\d/\w$"), r"[a-c]{3}-\d/\w"),
        (StructuredOutput(choice=("red", "green|", "<|im_end|>", 'é\n"')), r'red|green\||<\|im_end\|>|é\n"'),
        (StructuredOutput(grammar='start: "x" Y{2}\nY: /[0-9]/'), r"x\d\d"),
        (StructuredOutput(grammar='root ::= "x" num num\nnum ::= [0-9]'), r"x\d\d"),
        (
            StructuredOutput(json_schema='{"type": "array", "items": {"type": "null"}, "maxItems": 3}'),
            r"\[(null,? ?)*\]",
        ),
        (StructuredOutput(json_schema=True), None),
        (StructuredOutput(json_object=True), r"\{(.|\n)*"),
        (StructuredOutput(json_schema=FLAT, disable_any_whitespace=True), r'\{"a":(true|false),"b":\[null(,null)*\]\}'),
    ],
)
def test_a_text_is_of_its_grammar(make_llm: MakeLLM, asked: StructuredOutput, wanted: str | None) -> None:
    llm = make_llm()
    for seed in range(2):
        result = one(llm, asked, temperature=1.5, seed=seed, skip_special_tokens=False, max_tokens=40)
        if asked.kind in ("json_schema", "json_object") and result.finish_reason == "stop":
            json.loads(result.text)
        if wanted is not None and result.finish_reason == "stop":
            assert re.fullmatch(wanted, result.text), result.text
        assert asked.kind in ("json_schema", "json_object") or result.finish_reason == "stop"


def test_a_text_that_is_complete_ends_without_another_step(make_llm: MakeLLM) -> None:
    result = one(make_llm(), StructuredOutput(regex="[0-9]"))
    assert (len(result.tokens), result.finish_reason, result.stop_reason) == (1, "stop", None)


def test_a_text_that_is_cut_says_so(make_llm: MakeLLM) -> None:
    result = one(make_llm(), AS_PERSON, max_tokens=5)
    assert result.finish_reason == "length" and result.text.startswith('{"')


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 2.0, "top_k": 3},
        {"logprobs": 3},
        {"repetition_penalty": 1.5, "presence_penalty": 2.0, "frequency_penalty": 1.0},
        {"logit_bias": dict.fromkeys(range(60, 120), -100.0)},
        {"min_tokens": 100},
        {"ignore_eos": True},
        {"stop_token_ids": (5,), "min_tokens": 2},
    ],
    ids=lambda params: next(iter(params)),
)
def test_other_parameters_leave_it_so(make_llm: MakeLLM, params: dict[str, Any]) -> None:
    check_person(one(make_llm(), AS_PERSON, **params))


def test_min_tokens_and_ignore_eos_go_on_while_the_grammar_does(make_llm: MakeLLM) -> None:
    llm, letters = make_llm(), StructuredOutput(regex="[a-z]+")
    assert len(one(llm, letters, min_tokens=50, max_tokens=60).tokens) >= 50
    assert one(llm, letters, ignore_eos=True, max_tokens=60).finish_reason == "length"


def test_a_stop_string_ends_it(make_llm: MakeLLM) -> None:
    result = one(make_llm(), StructuredOutput(regex="ab(cd)+"), stop=("cd",))
    assert (result.text, result.finish_reason, result.stop_reason) == ("ab", "stop", "cd")


def test_settings_that_leave_nothing_are_the_requests_own_fault(make_llm: MakeLLM) -> None:
    llm = make_llm()
    letter = llm.tokenizer.encode("q")[0]
    result = one(llm, StructuredOutput(regex="q", param="guided_regex"), min_tokens=3, stop_token_ids=(letter,))
    assert result.finish_reason == "error" and "guided_regex: the request's other settings leave no token" in str(result.error)


def test_several_completions_share_a_grammar(make_llm: MakeLLM) -> None:
    llm = make_llm()
    results = llm.generate([PROMPT], SamplingParams(structured=AS_PERSON, n=3, max_tokens=120, seed=3))
    assert len({result.text for result in results}) > 1
    for result in results:
        check_person(result)
    assert llm.core.decoding.constraints.compiler.kept[0] == 1


SPARSE = {
    "sink_window": KVOptions(selection="sink_window", budget=24),
    "tidal_decode": KVOptions(selection="tidal_decode", budget=24, options={"layers": (1,)}),
    "recycled": KVOptions(selection="recycled", budget=24),
    "token_select": KVOptions(selection="token_select", budget=24),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", SPARSE)
def test_with_every_method(make_llm: MakeLLM, name: str) -> None:
    llm = make_llm()
    check_person(one(llm, AS_PERSON, kv=SPARSE[name]))
    dense, drafted = one(llm, AS_PERSON), one(llm, AS_PERSON, kv=drafting(SPARSE[name]))
    assert drafted.tokens == dense.tokens
    assert drafted.usage is not None and drafted.usage.drafted_tokens > drafted.usage.accepted_tokens > 0


def drafting(kv: KVOptions) -> KVOptions:
    return KVOptions(selection=kv.selection, budget=kv.budget, options=kv.options, draft=True, draft_tokens=4)


def test_forced_tokens_and_what_follows_are_one_text(make_llm: MakeLLM) -> None:
    llm = make_llm()
    whole = one(llm, AS_PERSON)
    for given in (1, 5, len(whole.tokens)):
        again = one(llm, AS_PERSON, forced_tokens=tuple(whole.tokens[:given]))
        assert (again.tokens, again.finish_reason) == (whole.tokens, "stop")
    with pytest.raises(InvalidRequestError, match="do not fit it behind the first 2"):
        one(llm, AS_PERSON, forced_tokens=(*whole.tokens[:2], whole.tokens[0]))


@pytest.mark.parametrize("kv", [KVOptions(), drafting(SPARSE["tidal_decode"])], ids=["dense", "drafts"])
def test_preemption_does_not_show(make_llm: MakeLLM, kv: KVOptions) -> None:
    letters = StructuredOutput(regex="([a-z]{2}[0-9]){26}")
    batch = [SamplingParams(structured=letters, seed=seed, max_tokens=100) for seed in range(4)]
    prompts = [[seed + 50, *PROMPT] for seed in range(4)]
    wide, tight = make_llm(), make_llm(kv_memory="192KiB", max_model_len=160)
    wanted = [wide.generate([prompt], params, kv=kv)[0].tokens for prompt, params in zip(prompts, batch)]
    found = tight.generate(prompts, batch, kv=kv)
    assert tight.stats().preemptions > 0
    assert [result.tokens for result in found] == wanted


def test_others_of_a_batch_do_not_notice(make_llm: MakeLLM) -> None:
    llm = make_llm()
    free = SamplingParams(seed=5, max_tokens=20, ignore_eos=True)
    alone = llm.generate([PROMPT], free)[0].tokens
    both = llm.generate([PROMPT, PROMPT, PROMPT], [SamplingParams(structured=AS_PERSON, seed=1, max_tokens=90), free, free])
    assert both[1].tokens == both[2].tokens == alone
    check_person(both[0])


def test_on_a_device(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks get there: tokens are a CPU's, drafts among them."""
    settings = {"backend": "torch", "kv_memory": "1MiB"}
    wanted = [one(make_llm(**settings), AS_PERSON, kv=kv).tokens for kv in (KVOptions(), drafting(SPARSE["tidal_decode"]))]
    with simulated_gpu(monkeypatch):
        llm = make_llm(device="cuda", **settings)
        found = [one(llm, AS_PERSON, kv=kv).tokens for kv in (KVOptions(), drafting(SPARSE["tidal_decode"]))]
    assert found == wanted


def test_a_grammar_that_takes_too_long_ends_its_own_request_only(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm()
    free = SamplingParams(seed=5, max_tokens=20, ignore_eos=True)
    alone = llm.generate([PROMPT], free)[0].tokens
    llm.core.decoding.constraints.compiler.compile(AS_PERSON)
    monkeypatch.setattr(progress, "TOKEN_SECONDS", -1.0)
    ended, other = llm.generate([PROMPT, PROMPT], [SamplingParams(structured=AS_PERSON), free])
    assert ended.finish_reason == "error" and "structured: a token of it takes" in str(ended.error)
    assert other.tokens == alone


def test_masks_together_are_those_of_each_alone(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, size = make_llm().core.decoding.constraints.compiler, make_llm().core.decoding.constraints._words
    asked = [AS_PERSON, StructuredOutput(regex="[0-9]"), StructuredOutput(choice=("red", "green"))]
    answers = [compiler.compile(one).begin(one) for one in asked]
    each, all_, together = np.zeros((4, size), np.int32), np.zeros((4, size), np.int32), progress.Together()
    for row, answer in enumerate(answers):
        answer.masks((), each[row : row + 1])
    rows = [(answer, row) for row, answer in enumerate(answers)]
    assert together.compute(rows, all_) and np.array_equal(each, all_) and each[:3].any(axis=1).all()
    assert not any(answer.masked() for answer in answers)
    monkeypatch.setattr(progress, "TOKEN_SECONDS", -1.0)
    assert together.compute(rows, all_), "how long that took shows behind it"
    assert [together.compute(rows, all_) for _ in range(progress.ALONE_STEPS + 1)] == [False] * progress.ALONE_STEPS + [True]
    with pytest.raises(InvalidRequestError, match="a token of it takes"):
        answers[0].masks((), each[:1])


def test_masks_of_a_step_that_failed_are_waited_for(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grammars belong to one thread at a time, also where a step failed for somebody else while they were followed."""
    llm = make_llm()
    wanted, other, runner = one(llm, AS_PERSON).tokens, "other", llm.core.runner
    run, masks, steps, busy = runner.run, progress.Together.compute, iter(range(1000)), threading.Lock()

    def slow(self: Any, *args: Any) -> Any:
        assert busy.acquire(blocking=False), "two threads follow one grammar"
        try:
            time.sleep(0.02)
            return masks(self, *args)
        finally:
            busy.release()

    def fails(plan: Any, fed: Any) -> Any:
        if next(steps) == 3:
            raise Blamed(next(chunk.request for chunk in plan.chunks if chunk.request.id == other))
        return run(plan, fed)

    monkeypatch.setattr(progress.Together, "compute", slow)
    monkeypatch.setattr(runner, "run", fails)
    sampling = SamplingParams(structured=AS_PERSON, seed=1, max_tokens=90)
    llm.core.add(Request(id="kept", prompt=PROMPT, sampling=sampling))
    llm.core.add(Request(id=other, prompt=PROMPT, sampling=SamplingParams(seed=5, max_tokens=20, ignore_eos=True)))
    found: dict[str, list[Any]] = {"kept": [], other: []}
    while llm.core.busy:
        for output in llm.core.step():
            found[output.id] += [*output.tokens, *filter(None, [output.finish_reason])]
    assert found["kept"] == [*wanted, "stop"] and found[other][-1] == "error"
