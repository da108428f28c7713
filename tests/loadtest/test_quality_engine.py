"""Quality measurements on the tiny model: what is exact gives zero, what differs shows, every command writes its rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom import LLM, KVOptions, SamplingParams
from kvloom.engine.errors import ConfigError, InvalidRequestError
from kvloom.loadtest.bench.engine import Ceilings, decode_case, prefill_case
from kvloom.loadtest.quality import agreement, facts, long, methods, task_eval
from kvloom.loadtest.quality import text as setup
from kvloom.loadtest.quality.decoding import Cost, Passage, _Clock, follow, prefill
from kvloom.loadtest.quality.divergence import Agreement
from kvloom.loadtest.quality.spec import MethodSpec, check
from kvloom.loadtest.quality.tasks import NEEDLES, TASKS, Answer, Answers, Trial, ask, haystacks, trials
from kvloom.loadtest.quality.weights import log_probabilities

MakeLLM = Callable[..., LLM]
DENSE = KVOptions(selection="dense")
WINDOW = KVOptions(selection="sink_window", budget=24)


def passages(llm: LLM, count: int = 3, context: int = 90, forced: int = 20) -> list[Passage]:
    random = Random(5)
    draw = lambda length: tuple(random.randrange(3, llm.model.vocab_size) for _ in range(length))  # noqa: E731
    return [Passage(draw(context), draw(forced)) for _ in range(count)]


def test_forced_decoding_is_prefill_of_the_same_tokens(make_llm: MakeLLM) -> None:
    llm = make_llm()
    (passage,) = passages(llm, 1)
    found: dict[int, Tensor] = {}
    follow(llm, [passage], DENSE, observe=lambda number, index, logits: found.update({index: logits.clone()}))
    wanted = torch.cat(list(log_probabilities(llm, [*passage.prompt, *passage.forced])))
    assert sorted(found) == list(range(1, len(passage.forced)))
    for index, logits in found.items():
        ours, theirs = torch.log_softmax(logits, -1), wanted[len(passage.prompt) + index - 1]
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_forced_tokens_come_first_and_the_model_goes_on(make_llm: MakeLLM) -> None:
    llm = make_llm()
    texts = passages(llm)
    found = follow(llm, texts, DENSE, free=5)
    for text, output in zip(texts, found.outputs):
        assert tuple(output[:20]) == text.forced and len(output) == 25
        sampling = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
        assert llm.generate([*text.prompt, *text.forced], sampling)[0].tokens == output[20:]


def test_costs_of_dense_and_sparse_steps(make_llm: MakeLLM) -> None:
    llm = make_llm(shadow_interval=0)
    texts = passages(llm)
    dense, sparse = (follow(llm, texts, kv).cost for kv in (DENSE, WINDOW))
    assert len(dense.seconds) == len(dense.attention) == len(sparse.bytes_read) == 17  # 19 decode steps, 2 of them warm-up
    per_token = llm.core.cache.storage.block_bytes // llm.core.cache.block_size
    assert dense.bytes_read == [3 * (90 + step) * per_token for step in range(3, 20)]
    assert sparse.bytes_read == [3 * 24 * per_token] * 17
    assert dense.kv_bytes == sparse.kv_bytes == 3 * 7 * llm.core.cache.storage.block_bytes
    assert dense.figures()["attended_share"] == 1.0
    assert sparse.attended == 3 * 19 * 24
    assert all(0 < a < s for a, s in zip(dense.attention, dense.seconds))
    assert Cost().figures()["step_ms"] is None


@pytest.mark.parametrize("kv", [DENSE, WINDOW])
def test_attention_is_timed_where_steps_are_captured(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch, kv: KVOptions) -> None:
    """Attention that is replayed with the rest of a step is not called, and would seem to take no time."""
    llm = make_llm(backend="native", weights="int8", dtype="bf16", shadow_interval=0)
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True))
    decoder = llm.core.runner.decoder
    assert [key.mode for key in decoder._graphs] == ["full"]
    calls: list[int] = []
    timed = _Clock.__call__
    monkeypatch.setattr(_Clock, "__call__", lambda clock, layer, *rest: (calls.append(layer), timed(clock, layer, *rest))[1])
    before = llm.stats().steps
    follow(llm, passages(llm), kv)
    assert len(calls) == 3 * (llm.stats().steps - before), "every layer of every step"
    assert all(key.attention is llm.core.runner._attention for key in decoder._graphs), "nothing stays of the clock"


def test_the_engine_bench_times_kernels_where_steps_are_captured(make_llm: MakeLLM) -> None:
    llm = make_llm(backend="native", weights="int8", dtype="bf16", kv_memory="8MiB")
    ceilings = Ceilings(read_gbs=10.0, bf16_gflops=100.0, fp32_gflops=100.0)
    prompt = prefill_case(llm, 96, repeats=2)
    assert prompt["linear_gflops"] > 0 and prompt["attention_gflops"] > 0
    row = decode_case(llm, 2, 64, ceilings, steps=4)
    assert 0 < row["outside_share"] < 1 and row["attention_ms"] > 0 and row["linear_ms"] > 0
    assert llm.core.runner.decoder._most == "full" and not llm.core.busy


def test_the_engine_is_left_as_it_was(make_llm: MakeLLM) -> None:
    llm = make_llm()
    attention: Any = llm.core.runner._attention

    def interrupt(number: int, index: int, logits: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(llm, passages(llm), DENSE, observe=interrupt)
    assert llm.core.runner._attention is attention and llm.core.observer is None and not llm.core.busy


def test_a_cache_that_is_too_small_is_said(make_llm: MakeLLM) -> None:
    llm = make_llm(kv_memory="192KiB")
    with pytest.raises(ConfigError, match="kv-memory"):
        follow(llm, passages(llm, 3, 60, 60), DENSE)


def test_dense_agrees_with_itself_exactly(make_llm: MakeLLM) -> None:
    llm = make_llm()
    texts = passages(llm, 5)
    prefill(llm, [text.prompt for text in texts])
    study = Agreement(llm, texts, batch=2)
    study.remember_dense()
    scores = study.measure(DENSE)
    figures = scores.figures(study.dense)
    assert figures["n"] == 5 * 19
    assert figures["kl_mean"] == figures["kl_p99"] == 0.0 and figures["top1"] == 1.0
    assert figures["ppl"] == figures["ppl_dense"] > 1.0
    low, high = figures["ppl_ci"]
    assert low < figures["ppl"] < high


def test_less_budget_is_further_from_dense(make_llm: MakeLLM) -> None:
    llm = make_llm()
    texts = passages(llm, 4)
    study = Agreement(llm, texts, batch=4)
    study.remember_dense()
    whole, half, little = (
        study.measure(KVOptions(selection="sink_window", budget=budget)).figures(study.dense) for budget in (200, 60, 8)
    )
    assert whole["kl_mean"] == pytest.approx(0.0, abs=1e-6)
    assert 1e-4 < half["kl_mean"] < little["kl_mean"]
    assert little["top1"] < 1.0 and little["kl_p99"] > little["kl_mean"]


def test_another_engine_is_seen_to_differ(make_llm: MakeLLM) -> None:
    exact, coarse = make_llm(), make_llm(dtype="bf16")
    texts = passages(exact, 2)
    study = Agreement(exact, texts, batch=2)
    study.remember_dense()
    study._llm = coarse
    assert study.measure(DENSE).figures(study.dense)["kl_mean"] > 1e-7


def test_unknown_methods_and_budgets_are_refused_before_anything_runs(make_llm: MakeLLM) -> None:
    llm = make_llm()
    check(llm, [MethodSpec("dense"), MethodSpec("sink_window", 64)])
    for spec, said in (
        (MethodSpec("nonsense", 64), "nonsense"),
        (MethodSpec("sink_window", 100_000), "budget"),
        (MethodSpec("sink_window", 64, {"sniks": 3}), "sniks"),
    ):
        with pytest.raises(InvalidRequestError, match=said):
            check(llm, [spec])
    assert not llm.core.busy


@pytest.mark.parametrize("task", TASKS)
def test_trials_hide_their_answers_where_they_say(make_llm: MakeLLM, task: str) -> None:
    tokenizer = make_llm().tokenizer
    text = tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 400)
    found = trials(task, tokenizer, text, 1600, 2, seed=0)
    assert len(haystacks(found)) == 2 and {trial.haystack for trial in found} == {0, 1}
    for trial in found:
        assert len(trial.prompt) <= 1600
        prompt = tokenizer.decode(trial.prompt)
        for answer in trial.answers:
            assert prompt.count(answer) >= 1
        if len(trial.answers) == 1:
            before = tokenizer.decode(trial.prompt[: int(trial.depth * 1600)])
            assert trial.answers[0] not in before.splitlines()[-1]
        assert 0 <= trial.depth < 1 and not any(answer in tokenizer.decode(trial.question) for answer in trial.answers)
    assert found == trials(task, tokenizer, text, 1600, 2, seed=0) != trials(task, tokenizer, text, 1600, 2, seed=1)


def test_needles_cover_every_depth(make_llm: MakeLLM) -> None:
    tokenizer = make_llm().tokenizer
    found = trials("needle", tokenizer, tokenizer.encode("word " * 3000), 1500, 1, seed=0)
    assert len(found) == NEEDLES
    assert all(i / NEEDLES - 0.1 < trial.depth < (i + 1) / NEEDLES + 0.1 for i, trial in enumerate(found))


def test_bad_tasks_are_refused(make_llm: MakeLLM) -> None:
    tokenizer = make_llm().tokenizer
    for task, length, said in (
        ("nonsense", 100, "nonsense"),
        ("needle", 60, "no room"),
        ("documents", 300, "no room"),
        ("needle", 9000, "text"),
    ):
        with pytest.raises(ConfigError, match=said):
            trials(task, tokenizer, tokenizer.encode("word " * 400), length, 1, seed=0)


def test_scores() -> None:
    trial = Trial("multi_value", 0, (1,), (2,), ("Falcon", "marble"), 0.5, 8)
    assert trial.score(" It is the falcon.") == 0.5
    assert trial.score("Marble and FALCON") == 1.0
    assert trial.score("granite") == 0.0
    single = Trial("needle", 0, (1,), (2,), ("falcon",), 0.5, 8)
    whole = Answers([Answer(single, "", 1.0), Answer(single, "", 0.0)], Cost()).figures()
    assert whole["accuracy"] == 0.5 and whole["trials"] == 2 and whole["accuracy_ci"][0] < 0.5 < whole["accuracy_ci"][1]


def test_facts_of_a_text_cannot_be_confused() -> None:
    for make in (facts.words, facts.numbers):
        planted = make(Random(0), 8)
        assert len({fact.question for fact in planted}) == 8
        for fact in planted:
            assert fact.sentence == f"{fact.question} {fact.answer}."


def test_asking_gives_an_answer_per_question(make_llm: MakeLLM) -> None:
    llm = make_llm()
    text = llm.tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 400)
    questions = trials("needle", llm.tokenizer, text, 400, 1, seed=0)
    ended = []
    found = ask(llm, questions, DENSE, 3, lambda: ended.append(1))
    assert len(found.answers) == 8 and len(ended) == 3 and 0.0 <= found.accuracy <= 1.0
    prompt = [*questions[4].prompt, *questions[4].question]
    plain = llm.generate(prompt, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))[0]
    assert found.answers[4].text == llm.tokenizer.decode(plain.tokens)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short text, which the tiny tokenizer reads at once."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(Path(methods.__file__).read_text() + Path(long.__file__).read_text())
    return file


def common(tiny: Path, text: Path, out: Path) -> list[str]:
    return [str(tiny), "--dtype", "fp32", "--weights", "bf16", "--kv-memory", "8MiB", "--methods", "dense", "--text", str(text),
            "--json", str(out / "rows.json"), "--markdown", str(out / "rows.md")]  # fmt: skip


KEYS = {"method", "options", "context", "batch", "n", "kl_mean", "kl_p99", "top1", "ppl", "ppl_dense", "needle", "needle_dense",
        "step_ms", "step_ms_dense", "bytes_read", "bytes_read_dense", "kv_bytes", "kv_bytes_dense", "attention_ms",
        "attended_share", "kl_mean_ci", "needle_ci"}  # fmt: skip


def test_eval_methods(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    argv = [*common(tiny, text_file, tmp_path), "--context", "400", "--windows", "2", "--scored", "8", "--batch", "2",
            "--haystacks", "1", "--rounds", "1", "--steps", "3", "--budgets", "32"]  # fmt: skip
    assert methods.main([*argv[:8], "sink_window", *argv[9:]]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["method"], row["budget"]) for row in rows] == [("dense", None), ("sink_window", 32)]
    for row in rows:
        assert {key for key, value in row.items() if value is not None} >= KEYS
    dense, window = rows
    assert dense["kl_mean"] == 0.0 < window["kl_mean"]
    assert window["bytes_read"] < 0.2 * window["bytes_read_dense"] == pytest.approx(0.2 * dense["bytes_read"])
    assert window["context"] == 400 and window["batch"] == 2 and window["n"] == 16 and window["needle_trials"] == 8
    markdown = (tmp_path / "rows.md").read_text()
    assert "| sink_window | 32 |" in markdown
    before = (tmp_path / "rows.json").read_text()
    with pytest.raises(ConfigError, match="--windows is 1"):
        methods.main([*argv, "--windows", "1"])
    assert methods.main([*argv[:8], "sink_window", *argv[9:], "--resume"]) == 0  # nothing is left to measure
    assert (tmp_path / "rows.json").read_text() == before


def test_eval_agreement(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    argv = [*common(tiny, text_file, tmp_path), "--contexts", "60,100", "--windows", "2", "--scored", "6", "--batch", "2"]
    assert agreement.main(argv) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["context"], row["n"], row["kl_mean"]) for row in rows] == [(60, 12, 0.0), (100, 12, 0.0)]


def test_eval_tasks(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    argv = [*common(tiny, text_file, tmp_path), "--tasks", "needle,multi_value", "--lengths", "400", "--haystacks", "1"]
    assert task_eval.main([*argv, "--out", str(tmp_path / "maps")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["task"], row["trials"], len(row["scores"])) for row in rows] == [("needle", 8, 8), ("multi_value", 1, 1)]
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["multi_value.png", "needle.png"]
    with pytest.raises(ConfigError, match="nonsense"):
        task_eval.main([str(tiny), "--tasks", "nonsense"])


def test_eval_long(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    argv = [*common(tiny, text_file, tmp_path), "--context", "64", "--generate", "6", "--prompts", "2", "--budgets", "16"]
    assert long.main([*argv[:8], "dense,sink_window", *argv[9:]]) == 0
    dense, window = json.loads((tmp_path / "rows.json").read_text())
    assert dense["divergence"] == 6 and dense["identical"] == 1.0
    assert window["divergence"] < 6 and window["facts"] == 2 * long.FACTS
    assert window["attended_share"] < dense["attended_share"] == 1.0


def test_texts_that_cannot_be_had(make_llm: MakeLLM, tmp_path: Path) -> None:
    llm = make_llm()
    with pytest.raises(ConfigError, match="cannot be read"):
        setup.real_text(llm, tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="--windows"):
        setup.passages(llm, [1] * 100, 60, 10, 3)
    with pytest.raises(ConfigError, match="exceed"):
        setup.passages(llm, [1] * 1000, 500, 100, 1)


def test_recall_asks_for_what_was_generated(make_llm: MakeLLM) -> None:
    llm = make_llm()
    filler = llm.tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 10)
    text = long.generated_text(llm, [5, 6, 7], filler, Random(0))
    forced = text.passage.forced
    assert len(text.answers) == long.FACTS
    for answer in text.answers:
        said = llm.tokenizer.decode(forced[answer.start : answer.stop])
        question = llm.tokenizer.decode(forced[: answer.start]).split("\n")[-1]
        planted = llm.tokenizer.decode(forced[: text.answers[0].start])
        assert f"\n{question}{said}." in planted
