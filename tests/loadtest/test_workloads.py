"""Workloads: the same seed makes the same jobs, lengths are what was asked for, and sharing figures are true."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvloom.engine.errors import ConfigError
from kvloom.engine.settings.options import option_fields
from kvloom.engine.text import Tokenizer
from kvloom.loadtest.client.record import Job
from kvloom.loadtest.workloads import WORKLOADS
from kvloom.loadtest.workloads.checked import facts, plant
from kvloom.loadtest.workloads.corpus import TextSource
from kvloom.loadtest.workloads.sharing import RUN, shared
from kvloom.loadtest.workloads.trace import SHAPES, read_rows, synthetic_rows

SMALL: dict[str, dict[str, Any]] = {
    "random": {"input_len": 40, "output_len": 5, "range_ratio": 0.5},
    "shared_prefix": {"groups": 3, "prefix_len": 48, "question_len": 16},
    "multi_turn": {"conversations": 3, "turns": 3, "first_len": 60, "turn_len": 30, "output_len": 7},
    "rag": {"documents": 8, "docs_per_prompt": 4, "docs_len": 120},
    "edited": {"bases": 2, "input_len": 400, "edit_rate": 0.01},
    "needle": {"lengths": "400,600", "depths": 3},
    "tenants": {"input_len": 100, "prefix_len": 40},
    "cancel_storm": {"input_len": 40},
    "trace": {"length_scale": 0.02, "max_input": 600},
}


LINES = [json.dumps({"prompt": f"What is {i} and {i}?", "output_len": 3 + i}) for i in range(30)]


@pytest.fixture(scope="module", autouse=True)
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 30 prompts for the workload of that name."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(LINES))
    SMALL["file"] = {"file": str(path)}
    return path


@pytest.fixture(scope="module")
def text(tiny: Path) -> TextSource:
    return TextSource(Tokenizer.from_folder(tiny))


def make(text: TextSource, name: str, seed: int = 0, count: int = 24, **options: Any) -> list[Job]:
    work = WORKLOADS[name]
    return work.build(work.options(**{**SMALL[name], **options}), text, seed, count)


def ids(text: TextSource, job: Job) -> list[int]:
    return text.encode(job.prompt) if isinstance(job.prompt, str) else list(job.prompt)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def slow_sharing(prompts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """`shared` by its definition."""
    found = []
    for k, prompt in enumerate(prompts):
        prefix = max((common_prefix(prompt, earlier) for earlier in prompts[:k]), default=0)
        runs = {tuple(p[i : i + RUN]) for p in prompts[:k] for i in range(len(p) - RUN + 1)}
        covered = set(range(prefix))
        for i in range(len(prompt) - RUN + 1):
            covered |= set(range(i, i + RUN)) if tuple(prompt[i : i + RUN]) in runs else set()
        most = max(len(prompt) - 1, 0)
        found.append((min(prefix, most), min(len(covered), most)))
    return found


# All workloads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_jobs_depend_on_the_seed_and_on_nothing_else(text: TextSource, name: str) -> None:
    jobs = make(text, name)
    assert jobs == make(text, name)
    assert [j.prompt for j in jobs] != [j.prompt for j in make(text, name, seed=1)]
    assert make(text, name, count=7) == jobs[:7]


@pytest.mark.parametrize("name", WORKLOADS)
def test_sharing_figures_are_what_the_prompts_share(text: TextSource, name: str) -> None:
    jobs = make(text, name, count=12)
    for job, (prefix, anywhere) in zip(jobs, slow_sharing([ids(text, job) for job in jobs])):
        if job.follows is None:
            assert (job.reusable_tokens, job.reusable_anywhere) == (prefix, anywhere)


@pytest.mark.parametrize("name", WORKLOADS)
def test_prompts_are_servable(text: TextSource, name: str) -> None:
    for job in make(text, name):
        assert job.output_tokens >= 1
        tokens = ids(text, job)
        assert tokens and all(0 <= token < text.vocab_size for token in tokens)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_option_has_help_and_a_default_that_works(name: str) -> None:
    work = WORKLOADS[name]
    assert work.help and "\n" not in work.help
    for option in option_fields(work.options):
        assert option.help and option.default is not dataclasses.MISSING
    work.options()


BAD = [
    ("random", {"input_len": 0}, "input_len is 0; allowed: 1 to"),
    ("random", {"range_ratio": 1.0}, "range_ratio is 1; allowed: 0 to 0.99"),
    ("random", {"prefix_len": -1}, "prefix_len is -1; allowed: 0"),
    ("shared_prefix", {"groups": 0}, "groups is 0; allowed: 1"),
    ("shared_prefix", {"popularity": "often"}, "popularity is 'often'; allowed: uniform, zipf"),
    ("multi_turn", {"turns": 0}, "turns is 0; allowed: 1"),
    ("rag", {"common_share": 1.5}, "common_share is 1.5; allowed: 0 to 1"),
    ("rag", {"documents": 3, "docs_per_prompt": 4}, "documents is 3; allowed: 4"),
    ("edited", {"edit_rate": 0.5}, "edit_rate is 0.5; allowed: 0 to 0.1"),
    ("needle", {"lengths": "1k"}, "lengths is '1k'; allowed: whole numbers"),
    ("needle", {"lengths": "1024,12"}, "lengths is '1024,12'; allowed: each from 128"),
    ("tenants", {"tenants": 1}, "tenants is 1; allowed: 2"),
    ("tenants", {"input_len": 10, "prefix_len": 10}, "prefix_len is 10; allowed: 0 to 9"),
    ("cancel_storm", {"cancel_min": 2.0, "cancel_max": 1.0}, "cancel_max is 1; allowed: cancel_min .2. or more"),
    ("trace", {"trace": "synthetic:holiday"}, "allowed: a file, synthetic:conversation, synthetic:toolagent"),
    ("trace", {"length_scale": 0.01}, "length_scale is 0.01; allowed: 0.015625 or more"),
    ("trace", {"block_tokens": 16, "length_scale": 1.0}, "block_tokens is 16; a made-up trace has 512"),
    ("trace", {"time_scale": 0.0}, "time_scale is 0; allowed"),
    ("trace", {"max_input": 0}, "max_input is 0; allowed: 1"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_options_out_of_bounds_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WORKLOADS[name].options(**options)


def test_requests_and_options_are_checked(text: TextSource) -> None:
    with pytest.raises(ConfigError, match="0 requests were asked for; allowed: 1 or more"):
        make(text, "random", count=0)
    with pytest.raises(ConfigError, match="random takes RandomOptions, not RagOptions"):
        WORKLOADS["random"].build(WORKLOADS["rag"].options(), text, 0, 1)


# Sharing -------------------------------------------------------------------------------------------------------------


def test_shared_agrees_with_its_definition() -> None:
    rng = random.Random(1)
    for _ in range(10):
        base = [rng.randrange(50) for _ in range(300)]
        prompts = []
        for _ in range(8):
            start = rng.randrange(100)
            prompt = base[start : start + rng.randrange(200)] + [rng.randrange(50) for _ in range(rng.randrange(60))]
            prompts.append(
                (base[: rng.randrange(300)] + prompt if rng.random() < 0.4 else prompt)[: rng.choice((0, 1, 20, 400))]
            )
        assert shared(prompts) == slow_sharing(prompts)
    assert shared([]) == []


def test_a_repeated_prompt_leaves_one_token_to_compute_and_own_repetition_does_not_count() -> None:
    prompt = list(range(100))
    assert shared([prompt, prompt]) == [(0, 0), (99, 99)]
    assert shared([prompt + prompt]) == [(0, 0)]
    assert shared([prompt, [7, 7, *prompt]]) == [(0, 0), (0, 100)]


# One by one ----------------------------------------------------------------------------------------------------------


def test_random_lengths(text: TextSource) -> None:
    jobs = make(text, "random", input_len=40, output_len=10, range_ratio=0.25, prefix_len=6, count=200)
    assert {len(job.prompt) for job in jobs} == set(range(36, 57))
    assert {job.output_tokens for job in jobs} == set(range(7, 14))
    assert len({tuple(job.prompt[:6]) for job in jobs}) == 1
    assert all(job.reusable_tokens < 6 + 8 for job in jobs)
    assert {len(job.prompt) for job in make(text, "random", input_len=33, range_ratio=0.0)} == {33}


def test_shared_prefix_groups(text: TextSource) -> None:
    jobs = make(text, "shared_prefix", groups=4, prefix_len=50, question_len=20, count=40)
    assert {len(job.prompt) for job in jobs} == {70}
    assert set(Counter(tuple(job.prompt[:50]) for job in jobs).values()) == {10}
    assert sum(job.label == "first of its group" for job in jobs) == 4
    assert all((job.reusable_tokens >= 50) == (job.label == "prefix seen before") for job in jobs)


def test_zipf_prefers_the_first_groups(text: TextSource) -> None:
    jobs = make(text, "shared_prefix", groups=4, popularity="zipf", zipf_exponent=1.5, count=200)
    counts = Counter(tuple(job.prompt[:48]) for job in jobs).most_common()
    assert counts[0][1] > 4 * counts[-1][1]


def test_multi_turn_follows_its_own_conversation(text: TextSource) -> None:
    jobs = make(text, "multi_turn", count=18)  # two waves of 3 conversations, 3 turns each
    assert [job.follows for job in jobs] == [None, None, None, 0, 1, 2, 3, 4, 5, None, None, None, 9, 10, 11, 12, 13, 14]
    assert [job.label for job in jobs[:7]] == ["turn 1"] * 3 + ["turn 2"] * 3 + ["turn 3"]
    first, second, third = (len(ids(text, jobs[i])) for i in (0, 3, 6))
    assert jobs[3].reusable_tokens == first + 7 - 1
    assert jobs[6].reusable_tokens == first + 7 + second + 7 - 1
    assert third < first
    talk = "".join(str(jobs[i].prompt) + " Yes." for i in (0, 3))
    assert talk.count("User:") == talk.count("Assistant:") == 2 and "Yes.\n\nUser:" in talk


def rag_documents(job: Job) -> list[str]:
    """The facts that a prompt states, in order."""
    return re.findall(r"The [a-z ]+ of the \w+ \w+ is \d{5}\.", str(job.prompt))


def test_rag_shuffled_repeats_documents_but_no_prefix(text: TextSource) -> None:
    jobs = make(text, "rag", count=16)  # 2 tenants x 2 sets, 4 rounds
    again = [job for job in jobs if job.label == "documents seen before"]
    assert len(again) == 12
    for job in again:
        documents = len(text.encode(str(job.prompt).split("\n\nQuestion: ")[0]))
        assert job.reusable_tokens < 0.6 * documents  # the first document may be the same by chance
        assert job.reusable_anywhere > 0.8 * documents
    whole = sum(len(ids(text, job)) for job in again)
    assert sum(job.reusable_tokens for job in again) < 0.2 * whole


def test_rag_unshuffled_is_a_prefix_hit(text: TextSource) -> None:
    for job in make(text, "rag", count=16, shuffle=False):
        if job.label == "documents seen before":
            question = len(text.encode(str(job.prompt).split("\n\nQuestion: ")[1]))
            assert job.reusable_tokens > len(ids(text, job)) - question - 20


def test_rag_orders_questions_and_tenants(text: TextSource) -> None:
    jobs = make(text, "rag", count=16)
    by_set: dict[tuple[str, frozenset[str]], list[Job]] = {}
    for job in jobs:
        by_set.setdefault((job.tenant, frozenset(rag_documents(job))), []).append(job)
    assert len(by_set) == 4
    for visits in by_set.values():
        assert len({rag_documents(job)[0] for job in visits}) == 4  # another document first in each round
        assert len({job.expect for job in visits}) == 4
    told = {tenant: {d for (t, documents) in by_set for d in documents if t == tenant} for tenant in ("tenant1", "tenant2")}
    assert len(told["tenant1"]) == 8 and len(told["tenant1"] & told["tenant2"]) == 4


@pytest.mark.parametrize("name", ["rag", "needle"])
def test_the_expected_answer_is_in_the_prompt_once(text: TextSource, name: str) -> None:
    for job in make(text, name):
        prompt = str(job.prompt)
        assert job.expect and prompt.count(job.expect) == 1
        opening = prompt.rsplit("\nAnswer: ", 1)[1]
        assert opening.endswith(" is") and f"{opening} {job.expect}." in prompt


def test_needle_grid(text: TextSource) -> None:
    jobs = make(text, "needle", count=6)
    assert len({job.label for job in jobs}) == 6
    for job, length, depth in zip(jobs, [400, 600] * 3, [0, 0, 0.5, 0.5, 1, 1]):
        assert 0.85 * length <= len(ids(text, job)) <= length + 4
        context = str(job.prompt).rsplit("\n\nQuestion: ", 1)[0]
        assert abs(context.index(f"{job.expect}.") / len(context) - depth) < 0.35
    assert WORKLOADS["needle"].options(depths=1).grid_depths == (0.5,)


def test_facts_are_all_different() -> None:
    known = facts(500, random.Random(0))
    assert len({fact.name for fact in known}) == len({fact.value for fact in known}) == 500
    with pytest.raises(ConfigError, match="use fewer documents or tenants"):
        facts(10_000, random.Random(0))


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_a_fact_is_planted_between_sentences(depth: float) -> None:
    fact = facts(1, random.Random(0))[0]
    planted = plant(fact, "One is here. Two is there. Three is nowhere.", depth)
    assert fact.sentence in planted.split("\n\n")
    assert all(part.endswith(".") for part in planted.split("\n\n"))


def test_edited_prompts_are_near_their_base(text: TextSource) -> None:
    jobs = make(text, "edited", count=20)
    assert {len(job.prompt) for job in jobs} == {400}
    assert [job.label for job in jobs] == ["base"] * 2 + ["edited"] * 18
    edited = jobs[2:]
    assert len({tuple(job.prompt) for job in edited}) == 18
    for job in edited:  # 4 edits of at most 4 tokens; around each one a run of RUN tokens may be lost on either side
        assert job.reusable_anywhere > job.reusable_tokens
        assert job.reusable_anywhere >= 400 - 4 * (4 + 2 * RUN)


def test_tenants_share_of_load(text: TextSource) -> None:
    jobs = make(text, "tenants", count=300, tenants=3, noise=8.0)
    counts = Counter(job.tenant for job in jobs)
    assert set(counts) == {"noisy", "quiet1", "quiet2"}
    assert 200 < counts["noisy"] < 275
    assert {len(job.prompt) for job in jobs} == {100}
    assert all((job.label == "noisy") == (job.tenant == "noisy") for job in jobs)
    assert len({(job.tenant, tuple(job.prompt[:40])) for job in jobs}) == 3


def test_cancel_storm(text: TextSource) -> None:
    jobs = make(text, "cancel_storm", count=200, cancel_share=0.25, cancel_min=0.5, cancel_max=1.5)
    left = [job for job in jobs if job.cancel_after is not None]
    assert 30 < len(left) < 70
    assert all(0.5 <= (job.cancel_after or 0) <= 1.5 for job in left)
    assert all((job.label == "cancelled") == (job.cancel_after is not None) for job in jobs)
    assert all(job.cancel_after is None for job in make(text, "cancel_storm", cancel_share=0.0))


# Traces --------------------------------------------------------------------------------------------------------------


def write(folder: Path, *rows: object) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def row(timestamp: float, length: int, output: int, hash_ids: list[int]) -> dict[str, object]:
    return {"timestamp": timestamp, "input_length": length, "output_length": output, "hash_ids": hash_ids}


def test_trace_shares_exactly_what_hash_ids_share(text: TextSource, tmp_path: Path) -> None:
    path = write(tmp_path, row(1000, 1500, 64, [0, 1, 2]), row(3000, 1536, 32, [0, 1, 3]), "", row(2500, 600, 8, [0, 4]),
                 row(9000, 100, 1, [5]), row(9000, 2000, 1, [0, 1, 2, 6]))  # fmt: skip
    jobs = make(text, "trace", trace=str(path), length_scale=0.0625, time_scale=2.0, max_input=None)
    block = 32
    assert [job.at for job in jobs] == [0.0, 3.0, 4.0, 16.0, 16.0]
    assert [len(job.prompt) for job in jobs] == [2 * block + 30, block + 6, 3 * block, 6, 3 * block + 29]
    assert [job.output_tokens for job in jobs] == [4, 1, 2, 1, 1]
    shares = [common_prefix(a.prompt, b.prompt) for i, a in enumerate(jobs) for b in jobs[:i]]  # type: ignore[arg-type]
    blocks = [n // block for n in shares]
    assert blocks == [1, 2, 1, 0, 0, 0, 2, 1, 2, 0]
    assert common_prefix(jobs[4].prompt, jobs[0].prompt) == 2 * block + 30  # type: ignore[arg-type]


def test_trace_cut_to_max_input_keeps_the_front(text: TextSource, tmp_path: Path) -> None:
    path = write(tmp_path, row(0, 1536, 1, [0, 1, 2]), row(1, 1536, 1, [0, 1, 3]))
    whole = make(text, "trace", trace=str(path), length_scale=0.0625, max_input=None)
    cut = make(text, "trace", trace=str(path), length_scale=0.0625, max_input=50)
    assert [list(job.prompt) for job in cut] == [list(job.prompt[:50]) for job in whole]


def test_trace_with_other_blocks_at_full_length(text: TextSource, tmp_path: Path) -> None:
    path = write(tmp_path, row(0, 40, 3, [7, 8, 9]), row(0, 17, 3, [7, 8]))
    jobs = make(text, "trace", trace=str(path), block_tokens=16, length_scale=1.0, max_input=None)
    assert [len(job.prompt) for job in jobs] == [40, 17]
    assert common_prefix(jobs[0].prompt, jobs[1].prompt) == 17  # type: ignore[arg-type]


GOOD = row(0, 700, 5, [0, 1])
MALFORMED = [
    ("{", "no JSON"),
    ("[1, 2]", "a JSON list, not an object"),
    ({k: v for k, v in GOOD.items() if k != "output_length"}, "output_length is missing"),
    ({**GOOD, "input_length": "700"}, 'input_length is "700", not a whole number of 1 or more'),
    ({**GOOD, "input_length": 0, "hash_ids": []}, "input_length is 0, not a whole number of 1 or more"),
    ({**GOOD, "output_length": True}, "output_length is true, not a whole number"),
    ({**GOOD, "timestamp": -1}, "timestamp is -1, not a number of 0 or more"),
    ({**GOOD, "timestamp": float("nan")}, "timestamp is NaN, not a number"),
    ({**GOOD, "hash_ids": "0,1"}, 'hash_ids is "0,1", not a list of whole numbers'),
    ({**GOOD, "hash_ids": [0, None]}, "hash_ids is .0, null., not a list"),
    ({**GOOD, "hash_ids": [0]}, "1 hash_ids, but 700 tokens are 2 blocks of 512"),
]


@pytest.mark.parametrize(("bad", "message"), MALFORMED)
def test_a_malformed_line_is_named(text: TextSource, tmp_path: Path, bad: object, message: str) -> None:
    path = write(tmp_path, GOOD, bad, GOOD)
    with pytest.raises(ConfigError, match=rf"trace.jsonl, line 2: {message}.*; expected a line such as .*hash_ids"):
        make(text, "trace", trace=str(path))


def test_a_trace_that_is_absent_or_empty_or_binary(text: TextSource, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read .*synthetic:NAME"):
        make(text, "trace", trace=str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match="holds no requests"):
        make(text, "trace", trace=str(write(tmp_path, "", "  ")))
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        make(text, "trace", trace=str(binary))


@pytest.mark.parametrize(("name", "mean_in", "mean_out", "reuse"),
                         [("conversation", 12035, 343, 0.37), ("toolagent", 8596, 182, 0.59)])  # fmt: skip
def test_made_up_traces_look_like_the_published_ones(
    tmp_path: Path, name: str, mean_in: int, mean_out: int, reuse: float
) -> None:
    rows = [made for made, _ in zip(synthetic_rows(SHAPES[name], random.Random(0)), range(6000))]
    assert sum(r.input_length for r in rows) / len(rows) == pytest.approx(mean_in, rel=0.15)
    assert sum(r.output_length for r in rows) / len(rows) == pytest.approx(mean_out, rel=0.15)
    seen: set[int] = set()
    hits = 0
    for made in rows:
        hits += sum(i in seen for i in made.hash_ids)
        seen.update(made.hash_ids)
    assert hits / sum(len(r.hash_ids) for r in rows) == pytest.approx(reuse, abs=0.08)
    assert read_rows(write(tmp_path, *(r._asdict() for r in rows)), 512) == rows


# file ----------------------------------------------------------------------------------------------------------------


def test_own_prompts_in_their_order_or_the_seeds(text: TextSource) -> None:
    jobs = make(text, "file", count=40, shuffle=False)
    assert [job.prompt for job in jobs[:30]] == [f"What is {i} and {i}?" for i in range(30)]
    assert [job.prompt for job in jobs[30:]] == [job.prompt for job in jobs[:10]], "from the start again"
    assert [job.output_tokens for job in jobs[:3]] == [3, 4, 5]
    assert sorted(str(job.prompt) for job in make(text, "file", count=30)) == sorted(str(job.prompt) for job in jobs[:30])
    assert {job.output_tokens for job in make(text, "file", output_len=7)} == {7}


def test_the_shapes_of_own_prompts(text: TextSource, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    path.write_text(json.dumps({"prompt": [5, 6, 7]}) + "\n\n" + json.dumps({"messages": talk, "max_tokens": 9}))
    ids_, messages = make(text, "file", count=2, file=str(path), shuffle=False)
    assert (ids_.prompt, ids_.output_tokens) == ((5, 6, 7), 64)
    assert (list(messages.messages), messages.output_tokens, messages.prompt) == (talk, 9, "Be brief.")
    path.write_text(json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "Why?"},
                                                             {"from": "gpt", "value": "Because it is so."}]}]))  # fmt: skip
    (shared_,) = make(text, "file", count=1, file=str(path))
    assert (shared_.prompt, shared_.output_tokens) == ("Why?", len(text.encode("Because it is so.")))


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("", "holds no prompts"),
        ("{", "line 1: no JSON"),
        ('\n{"prompt": ""}', "line 2: there is neither"),
        ('{"prompt": [1, -2]}', "line 1"),
        ('{"prompt": "a", "output_len": 0}', "from 1 to"),
        ('{"prompt": "a", "output_len": true}', "from 1 to"),
        ('{"messages": ["a"]}', "with a role"),
        ("[1", "array and is none"),
        ('[{"conversations": []}]', "entry 1: conversations holds no question"),
        ('[{"conversations": [{"from": "human"}]}]', "with a value"),
        ("[" * 100_000, "array and is none"),
        ("7", "a JSON int"),
    ],
)
def test_own_prompts_that_are_none(text: TextSource, tmp_path: Path, content: str, hint: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(hint)):
        make(text, "file", file=str(path))


def test_own_prompts_need_a_file(text: TextSource, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--file"):
        make(text, "file", file="")
    with pytest.raises(ConfigError, match="cannot be read"):
        make(text, "file", file=str(tmp_path / "absent.jsonl"))
