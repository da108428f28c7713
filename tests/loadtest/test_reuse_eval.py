"""`kvloom eval kvshare` on the tiny model: prompts, figures, comparisons, and that measuring changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.engine.reuse.kvshare.share import KVShare
from kvloom.loadtest.quality import reuse
from kvloom.loadtest.quality import reuse as reuse_charge
from kvloom.loadtest.quality.reuse_runs import (
    EXACT,
    KINDS,
    Case,
    Maker,
    Sample,
    Times,
    approximate,
    ask,
    check_length,
    compare,
    donate,
    fitting,
    race,
    reference,
)
from kvloom.loadtest.quality.reuse_scores import Setting, figures, relate, settings, spearman, trends

SHARE = '{"min_match": 32, "min_reusable": 48, "check_layer": 1}'
SETTINGS = (
    '{"verified": true, "heal": false, "shadow_share": 0, "min_gain": -1, "reject_above": 1000, '
    '"min_match": 32, "min_reusable": 48}'
)
LENGTH = 130
NAIVE = {"policy": "boundary", "ratio": 0.0, "boundary": 0}


@pytest.fixture
def llm(make_llm: Callable[..., LLM]) -> LLM:
    return make_llm(kvshare_options=SETTINGS, segment_memory="16MiB", threads=1)


@pytest.fixture
def maker(llm: LLM) -> Maker:
    return Maker(llm, 2, LENGTH, text=Path(reuse.__file__))


def holds(tokens: tuple[int, ...], part: tuple[int, ...]) -> bool:
    return any(tokens[i : i + len(part)] == part for i in range(len(tokens) - len(part) + 1))


def test_prompts_have_the_same_documents_elsewhere(llm: LLM, maker: Maker) -> None:
    case = maker.case(0, uses=3)
    assert maker.case(0, uses=3) == case != maker.case(1, uses=3)
    assert [len(document) for document in case.documents] == [LENGTH] * 2
    for use in case.uses:
        assert all(holds(tokens, document) for tokens in (case.donor, use.prompt) for document in case.documents)
        ends = len(llm.tokenizer.encode(use.answer))
        assert len(use.prompt) > 3 * LENGTH + ends, "the new document is missing"
        assert use.prompt[: 3 * LENGTH] != case.donor[: 3 * LENGTH]
        asked = [document for document in case.documents if use.answer in llm.tokenizer.decode(document)]
        assert asked, "the question is about a document that donors have"
    assert len({use.prompt for use in case.uses}) == 3


def test_prompts_that_cannot_be_made(llm: LLM, maker: Maker) -> None:
    for problem, documents, length in (("allowed: 1 to 16", 17, LENGTH), ("--document-len is 20", 2, 20)):
        with pytest.raises(ConfigError, match=problem):
            Maker(llm, documents, length)
    with pytest.raises(ConfigError, match="cannot be read"):
        Maker(llm, 2, LENGTH, text=Path("no such file"))
    with pytest.raises(ConfigError, match="uses of the same documents"):
        maker.case(0, uses=9)
    assert fitting(llm, LENGTH, 8) == 1 and fitting(llm, 20, 8) == 11
    with pytest.raises(ConfigError, match="no room for two documents"):
        fitting(llm, 300, 8)
    with pytest.raises(ConfigError, match="fewer --documents"):
        check_length(llm, maker.case(0), 400)


@pytest.mark.parametrize("kind", ["context", "isolated"])
def test_quality_lies_between_naive_and_exact(llm: LLM, maker: Maker, kind: str) -> None:
    case = maker.case(0)
    donate(llm, case, kind)
    share = llm.core.feature(KVShare)
    assert share is not None
    held = {id(segment) for segment in share.store}
    exact = reference(llm, case.uses[0], 6)
    naive = compare(llm, case.uses[0], exact, NAIVE)
    half = compare(llm, case.uses[0], exact, {"policy": "blend", "ratio": 0.5, "boundary": 4})
    everything = compare(llm, case.uses[0], exact, {"policy": "boundary", "ratio": 1.0})
    assert {id(segment) for segment in share.store} == held, "what is measured must not become a donor"
    assert len(naive.kl) == len(exact.answer) == 6
    assert naive.recomputed == 0 < half.recomputed < everything.recomputed == naive.reused and everything.reused == 0
    assert naive.reused > 1.6 * LENGTH, "both documents are found but for their ends"
    assert np.mean(naive.kl) > 1e-3 > 1e-5 > np.mean(everything.kl)
    assert all(everything.same) and len(half.deviation) > 0 == len(naive.deviation)
    again = compare(llm, case.uses[0], exact, NAIVE)
    assert again == naive, "settings do not depend on what was measured before"


def test_first_token_of_the_answer_is_compared_too(llm: LLM, maker: Maker) -> None:
    case = maker.case(0)
    exact = reference(llm, case.uses[0], 4)
    assert exact.log_p.shape == (4, llm.model.vocab_size)
    assert [int(row.argmax()) for row in exact.log_p.float()] == exact.answer
    assert ask(llm, case.uses[0].prompt, EXACT, 4).tokens == exact.answer


def test_an_answer_that_leaves_the_exact_one_is_followed_freely(llm: LLM, maker: Maker) -> None:
    case = maker.case(0)
    donate(llm, case, "isolated")
    exact = reference(llm, case.uses[0], 6)
    free = llm.tokenizer.decode(ask(llm, case.uses[0].prompt, approximate(NAIVE), 6).tokens)
    sample = compare(llm, case.uses[0], exact, NAIVE)
    assert not all(sample.same), "this prompt shows nothing"
    assert not sample.right
    assert compare(llm, case.uses[0]._replace(answer=free[-3:]), exact, NAIVE).right


def test_nothing_reused_is_an_error(llm: LLM, maker: Maker) -> None:
    case = maker.case(0)
    llm.core.purge("")
    with pytest.raises(ConfigError, match="too little to reuse"):
        compare(llm, case.uses[0], reference(llm, case.uses[0], 2), NAIVE)


def test_both_ways_are_timed_in_turns(llm: LLM, maker: Maker) -> None:
    case, times = maker.case(0), Times([], [])
    donate(llm, case, "context")
    race(llm, case.uses[0], NAIVE, 3, times)
    assert len(times.exact) == len(times.approximate) == 3 and min(*times.exact, *times.approximate) > 0


def sample(kl: list[float], right: bool = True) -> Sample:
    return Sample(kl, [value < 1 for value in kl], right, True, 1000, 700, 200, [0.1])


def test_figures() -> None:
    row = figures([sample([0.0, 2.0]), sample([0.5, 0.5], right=False)], Times([2.0, 2.2, 2.4], [1.0, 1.1, 1.2]))
    assert (row["n"], row["kl_mean"], row["top1"]) == (4, 0.75, 0.75)
    assert (row["accuracy"], row["accuracy_exact"]) == (0.5, 1.0)
    assert row["recompute_share"] == pytest.approx(200 / 900) and row["matched_share"] == 0.9
    assert row["speed_up"] == pytest.approx(2.0) and row["speed_up_ci"][0] <= 2.0 <= row["speed_up_ci"][1]
    assert row["kl_prompts"] == [1.0, 0.5] and row["kl_mean_ci"] == (0.5, 1.0)
    assert "ttft_ms" not in figures([sample([0.0])], Times([], []))


def test_settings_measure_a_ratio_of_one_once() -> None:
    found = settings(("naive", "blend", "query"), (1, 0.1, 0.3), 16)
    assert found == [
        Setting("naive", 0.0, 0),
        *(Setting(policy, ratio, 16) for policy in ("blend", "query") for ratio in (0.1, 0.3)),
        Setting("everything", 1.0, 16),
    ]
    assert found[0].options == NAIVE and found[-1].options == {"policy": "boundary", "ratio": 1.0, "boundary": 16}


def test_rows_are_compared_prompt_by_prompt() -> None:
    def row(policy: str, ratio: float, *kl: float) -> dict[str, object]:
        return {"donors": "context", "policy": policy, "ratio": ratio, "kl_mean": sum(kl) / len(kl), "kl_prompts": list(kl)}

    rows = [row("naive", 0.0, 9, 9), row("random", 0.1, 4, 6), row("blend", 0.1, 3, 5), row("blend", 0.3, 1, 5.5),
            row("everything", 1.0, 0, 0)]  # fmt: skip
    relate(rows)
    assert [one["best"] for one in rows] == [None, "higher", "lowest", None, None]
    assert rows[2]["kl_less_random"] == -1 and rows[2]["kl_less_random_ci"] == (-1, -1), "every prompt agrees"
    assert rows[1]["kl_above_best"] == 1 and "kl_less_random" not in rows[1]
    assert rows[3]["kl_less_naive"] == -5.75 and "kl_less_naive" not in rows[0]
    tied = [row("blend", 0.1, 3, 5, 4), row("dhd", 0.1, 2, 6.5, 4), row("query", 0.1, 4, 6, 5)]
    relate(tied)
    assert [one["best"] for one in tied] == ["lowest", "not told apart", "higher"]
    one_prompt = [row("blend", 0.1, 3), row("dhd", 0.1, 5)]
    relate(one_prompt)
    assert one_prompt[1]["best"] == "not told apart" and one_prompt[1]["kl_above_best_ci"] is None, "one prompt tells nothing"
    trend, other = trends(rows)
    assert (trend.policy, other.policy) == ("blend", "random")
    assert trend.of_means == pytest.approx(-1)
    assert trend.of_prompts == pytest.approx((-1.0 - 0.8) / 2)


def test_spearman() -> None:
    assert spearman([1, 2, 3], [30, 20, 10]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [1, 1, 2, 2]) == pytest.approx(0.894427, abs=1e-6)
    assert spearman([1, 2, 3], [5, 5, 5]) == 0


def test_production_is_charged() -> None:
    found = [reuse_charge.Charged(1.5, Times([1.0] * 3, [0.5] * 3)), reuse_charge.Charged(1.1, Times([1.0] * 3, [0.5] * 3))]
    rows = reuse_charge.cumulative(found)
    assert [row["paid"] for row in rows] == ["no", "no", "yes"]
    assert rows[0]["share_ms"] == pytest.approx(1800) and rows[2]["exact_ms"] == pytest.approx(3000)


def test_producing_leaves_what_donating_leaves(llm: LLM, maker: Maker) -> None:
    case: Case = maker.case(0, uses=2)
    share = llm.core.feature(KVShare)
    assert share is not None

    def held() -> list[tuple[int, bytes]]:
        return sorted((segment.position, segment.tokens.tobytes()) for segment in share.store)

    for kind in ("context", "isolated"):
        donate(llm, case, kind)
        wanted = held()
        assert reuse_charge.produce(llm, case, kind) > 0
        assert held() == wanted and not llm.core.busy
    assert len(reuse_charge.charge(llm, case, "context", NAIVE).times.exact) == 2


def test_eval_kvshare(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, page = tmp_path / "rows.json", tmp_path / "table.md"
    argv = [str(tiny), "--dtype", "fp32", "--kv-memory", "32MiB", "--threads", "1", "--kvshare-options", SHARE,
            "--documents", "2", "--document-len", str(LENGTH), "--prompts", "2", "--answer-len", "4", "--text", reuse.__file__,
            "--policies", "naive,boundary,blend,random", "--ratios", "0.2,1", "--boundary", "4", "--rounds", "1",
            "--charge", "1", "--json", str(rows), "--markdown", str(page)]  # fmt: skip
    assert reuse.main(argv) == 0
    found = json.loads(rows.read_text())
    names = ["naive", "boundary", "blend", "random", "everything"]
    assert [(row["donors"], row["policy"]) for row in found] == [(kind, name) for kind in KINDS for name in names]
    for row in found:
        assert row["n"] == 8 and len(row["kl_prompts"]) == 2 and row["speed_up"] > 0
    naive, boundary, blend, random, everything = found[:5]
    assert naive["recompute_share"] == 0 and everything["recompute_share"] == 1
    assert {round(row["recompute_share"], 2) for row in (boundary, blend, random)} == {0.2}, "all policies cost the same"
    assert everything["kl_mean"] < 1e-5 < naive["kl_mean"]
    assert [row["best"] for row in (boundary, blend, random)].count("lowest") == 1 and "kl_less_random" in blend
    assert "| context | blend | 0.2 |" in page.read_text() and "Spearman" in page.read_text()
    assert page.read_text().count("| lowest |") == 2
    paid = json.loads((tmp_path / "rows-charge.json").read_text())
    assert [(row["donors"], row["uses"]) for row in paid] == [(kind, uses) for kind in KINDS for uses in range(1, 9)]

    monkeypatch.setattr(reuse, "compare", None)  # whatever is measured again, fails
    monkeypatch.setattr(reuse_charge, "race", None)
    assert reuse.main([*argv, "--resume"]) == 0
    assert json.loads(rows.read_text()) == found and "Spearman" in page.read_text()


def test_every_policy_shares_a_prompts_donors_and_full_pass(
    llm: LLM, maker: Maker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[str] = []
    monkeypatch.setattr(reuse, "donate", lambda llm, case, kind: done.append(f"donors {kind}"))
    monkeypatch.setattr(reuse, "reference", lambda llm, use, tokens: done.append("full pass"))
    monkeypatch.setattr(reuse, "race", lambda *_: None)

    def stopped(*_: object) -> Sample:
        done.append("policy")
        if done.count("policy") == 8:  # in the third prompt
            raise KeyboardInterrupt
        return sample([1.0, 3.0])

    monkeypatch.setattr(reuse, "compare", stopped)
    args = reuse.parse(["--prompts", "4", "--kvshare-options", "{}", "--json", str(tmp_path / "rows.json")])
    study = object.__new__(reuse.Study)
    study.llm, study.args, study.maker, study._exact = llm, args, maker, {}
    results = reuse.Results(reuse.COLUMNS, reuse.IDENTITY, "", args.json)
    chosen = settings(("naive", "blend", "query"), (0.1,), 4)
    with pytest.raises(KeyboardInterrupt):
        reuse.run(study, chosen, ("context",), results)
    assert done[:10] == ["donors context", "full pass", *["policy"] * 3] * 2
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["policy"], row["prompts"], row["n"]) for row in found] == [(p, 2, 4) for p in ("naive", "blend", "query")]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--policies", "blend,best"), "allowed: naive"),
        (("--ratios", "0.1,2"), "numbers from 0 to 1"),
        (("--rounds", "-1"), "0 or more"),
        (("--kvshare-options", "0.2"), "JSON object"),
    ],
)
def test_flags_that_cannot_be(tiny: Path, flags: tuple[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        reuse.main([str(tiny), "--dtype", "fp32", *flags])
