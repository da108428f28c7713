"""RazorAttention's calibration: head classes, storing and finding, scores against full maps, a known induction head."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.calibration import HeadClasses, RazorCalibration, find_razor, save_razor, store
from kvloom.engine.calibration.razor import best_heads, retrieval_heads
from kvloom.engine.errors import ConfigError, ModelError
from kvloom.loadtest.calibrations.razor_scores import HeadScores, Pattern, mean_scores, measure, overlaps

Make = Callable[..., LLM]


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine's own calibrations are nobody else's here."""
    monkeypatch.setattr(store, "own_folder", lambda: tmp_path / "own")
    return tmp_path / "own"


def example(key: str = "abc", model: str = "example") -> RazorCalibration:
    return RazorCalibration(
        model_key=key,
        model=model,
        induction=((0.1, 0.9), (0.9, 0.0), (0.2, 0.3)),
        echo=((0.0, 0.0), (0.5, 0.1), (0.0, 0.8)),
        settings={"seeds": 3},
    )


# Classes -------------------------------------------------------------------------------------------------------------


def test_shares_take_at_least_one_head_and_round_up() -> None:
    few, many = [[0.5, 0.1]] * 3, [[float(i)] for i in range(50)]
    assert best_heads(few, 0.0) == best_heads(few, 0.01) == [(0, 0)]
    assert len(best_heads(few, 0.17)) == 2 and len(best_heads(few, 1.0)) == 6
    assert best_heads(many, 0.14) == [(layer, 0) for layer in range(49, 42, -1)]  # 7, though 0.14 * 50 > 7 in floats
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="0 to 1"):
            best_heads(few, share)


def test_ties_go_to_the_lower_head_and_never_take_more() -> None:
    scores = [[0.5, 0.5], [0.7, 0.5], [0.5, 0.5]]
    assert best_heads(scores, 0.5) == [(1, 0), (0, 0), (0, 1)]


def test_classes_are_the_union_of_both_rankings() -> None:
    found = example().classes()
    assert found == HeadClasses(((1,), (), (1,)), 2)  # one of each: (0, 1) wins the tie by induction, (2, 1) by echo
    assert (found.layers, found.count, found.share) == (3, 2, pytest.approx(1 / 3))
    assert [found.local(layer) for layer in range(3)] == [(0,), (0, 1), (0,)]
    assert found.heads == ((0, 1), (2, 1))
    both = example().classes(induction_share=0.5, echo_share=0.3)  # echo of all layers: (1, 0) and (2, 1) are in both
    assert both == HeadClasses(((1,), (0,), (1,)), 2)
    assert example().classes(1.0) == HeadClasses.all(3, 2)
    with pytest.raises(ValueError, match="0 to 1"):
        example().classes(echo_share=2.0)


def test_random_classes_have_the_count_and_the_seed_decides() -> None:
    drawn = [HeadClasses.random(6, 3, 5, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {found.count for found in drawn} == {5}
    assert HeadClasses.random(6, 3, 0, 0).count == 0 and HeadClasses.random(6, 3, 18, 0) == HeadClasses.all(6, 3)
    with pytest.raises(ValueError, match="allowed: 0 to 18"):
        HeadClasses.random(6, 3, 19, 0)


@pytest.mark.parametrize("heads", [(1, 0), (0, 0), (2,), (-1,)])
def test_impossible_classes_are_refused(heads: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="layer 1"):
        HeadClasses(((0,), heads), 2)
    with pytest.raises(ValueError, match="layers"):
        HeadClasses.of([(2, 0)], 2, 2)


# Storage -------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_found() -> None:
    assert find_razor("abc") is None
    save_razor(example())
    assert find_razor("abc") == example() and find_razor("abd") is None


def test_own_calibrations_win_over_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    save_razor(example(model="shipped"), tmp_path / "shipped")
    found = find_razor("abc")
    assert found is not None and found.model == "shipped"
    save_razor(example(model="mine"))
    found = find_razor("abc")
    assert found is not None and found.model == "mine"


_UNEVEN = json.dumps({"model_key": "abc", "model": "m", "induction": [[1, 2]], "echo": [[1]], "settings": {}})
_EMPTY = json.dumps({"model_key": "abc", "model": "m", "induction": [], "echo": [], "settings": {}})


@pytest.mark.parametrize("content", ["{", "[1]", '{"model_key": "other"}', '{"model_key": "abc"}', _UNEVEN, _EMPTY])
def test_damaged_files_are_named(own: Path, content: str) -> None:
    own.mkdir()
    (own / store.file_name("razor", "abc")).write_text(content)
    with pytest.raises(ModelError, match="calibrat"):
        find_razor("abc")


def test_shipped_files_are_whole() -> None:
    files = list(store.SHIPPED.glob("razor-*.json"))
    assert files
    for file in files:
        key = json.loads(file.read_text())["model_key"]
        assert file.name == store.file_name("razor", key)
        found = find_razor(key)
        assert found is not None and found.settings["seeds"] and found.settings["overlap"]["jaccard"]
        scores = [score for row in (*found.induction, *found.echo) for score in row]
        assert min(scores) >= 0 and max(scores) <= 1 and max(map(max, found.induction)) > 0.5
        assert found.classes(0.14, 0.01).share == pytest.approx(0.15, abs=0.02)
    assert found.classes(0.14, 0.01).share < found.classes().share < 0.25


# Patterns ------------------------------------------------------------------------------------------------------------


def test_the_pattern_fits_the_context_and_the_vocabulary() -> None:
    paper = Pattern.fitting(32768, 128_000, 1)
    assert (paper.tokens, paper.repeats, paper.ids, paper.length) == (2500, 4, range(10_000, 12_500), 10_001)
    shorter = Pattern.fitting(8192, 49152, 1)
    assert (shorter.tokens, shorter.length, shorter.scored) == (600, 2401, 1800)
    assert Pattern.fitting(8192, 49152, 1, tokens=2000).length == 8001
    small = Pattern.fitting(512, 320, None)
    assert (small.tokens, small.ids, small.length) == (42, range(160, 320), 168)
    assert Pattern.fitting(64, 320, None).tokens == 5
    for asked in (
        {"tokens": 1},
        {"tokens": 128},
        {"repeats": 1},
        {"repeats": 256},
        {"ids": range(300, 321)},
        {"ids": range(5, 5)},
    ):
        with pytest.raises(ConfigError, match="allowed"):
            Pattern.fitting(512, 320, None, **asked)


def test_prompts_repeat_distinct_tokens() -> None:
    pattern = Pattern(50, 3, range(100, 160), bos=7)
    prompt = pattern.prompt(3)
    assert prompt[0] == 7 and prompt[1:] == prompt[1:51] * 3 and len(prompt) == pattern.length
    assert len(set(prompt[1:51])) == 50 and set(prompt[1:]) <= set(pattern.ids)
    assert prompt == pattern.prompt(3) != pattern.prompt(4)
    assert len(Pattern(50, 2, range(10), None).prompt(0)) == 100  # fewer ids than tokens: drawn again and again


# Scores --------------------------------------------------------------------------------------------------------------


def from_maps(maps: Tensor, pattern: Pattern) -> HeadScores:
    """Scores by their definition. maps: [layers, q_heads, n, n] attention weights."""
    induction, echo = (torch.zeros(maps.shape[:2], dtype=torch.float64) for _ in range(2))
    for i in range(pattern.tokens, pattern.tokens * pattern.repeats):
        for j in range(i % pattern.tokens, i, pattern.tokens):
            row = maps[:, :, pattern.offset + i].double()
            echo += row[..., pattern.offset + j]
            induction += row[..., pattern.offset + j + 1]
    return HeadScores(induction / pattern.scored, echo / pattern.scored)


@pytest.mark.parametrize("bos", [None, 5])
def test_scores_are_those_of_full_attention_maps(make_llm: Make, tiny: Path, bos: int | None) -> None:
    from transformers import AutoModelForCausalLM

    eager = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="eager").eval()
    pattern, told = Pattern(91, 4, range(100, 300), bos), []  # chunks end inside copies
    with torch.inference_mode():
        maps = eager(torch.tensor([pattern.prompt(1)]), output_attentions=True).attentions
        found = measure(make_llm(), pattern, 1, lambda done, total: told.append((done, total)))
    wanted = from_maps(torch.cat(maps), pattern)
    for mine, theirs in zip(found, wanted):
        assert mine.shape == (3, 4) and mine.min() > 0
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-6)
    assert told == [(256, pattern.length), (pattern.length, pattern.length)]


def test_the_probe_does_not_change_what_is_computed(make_llm: Make) -> None:
    """Its own attention takes the place of the step's: later layers must see what dense layers give them."""
    llm, pattern = make_llm(), Pattern(40, 3, range(100, 300), None)
    whole = measure(llm, pattern, 0)
    small = measure(make_llm(max_batched_tokens=1024, block_size=16), pattern, 0)
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(whole, small))
    assert llm.core.cache.pool.in_use == 0


def test_the_cache_must_hold_the_prompt(make_llm: Make) -> None:
    llm = make_llm(kv_memory="64KiB")
    with pytest.raises(ConfigError, match="raise kv_memory"):
        measure(llm, Pattern(100, 4, range(100, 300), None), 0)


def test_a_group_scores_as_its_best_query_head() -> None:
    first = HeadScores(torch.tensor([[0.1, 0.5, 0.2, 0.0]]), torch.tensor([[0.0, 0.2, 0.9, 0.1]]))
    second = HeadScores(torch.tensor([[0.3, 0.1, 0.2, 0.4]]), torch.zeros(1, 4))
    induction, echo = mean_scores([first, second]).of_kv_heads(2)
    assert induction[0] == pytest.approx((0.3, 0.2)) and echo[0] == pytest.approx((0.1, 0.45))


def test_overlap_of_head_sets() -> None:
    a, b, c = HeadClasses(((0, 1), (0,)), 2), HeadClasses(((0,), (0, 1)), 2), HeadClasses(((), (1,)), 2)
    assert overlaps([a, b, c]) == [0.5, 0.0, pytest.approx(1 / 3)]
    assert overlaps([a]) == [] and overlaps([a, a]) == [1.0]


# A model whose induction head is known -------------------------------------------------------------------------------

CODE, HEAD, HIDDEN, THETA = 32, 64, 128, 1e8
SHARP = 60.0
"""Attention logit of a match, after the scale."""


def induction_weights(weights: dict[str, Tensor], vocab: int) -> None:
    """Write two attention layers without MLPs that continue what they have seen before.

        hidden    [0, 32) code of the token   [32, 64) of the one before   [64, 96) of the one to come   96: always 1
        layer 0   query head 0 (KV head 0) looks one position back, whatever is there, and copies its code
        layer 1   query head 3 (KV head 1) looks where the token before has its own code, and copies that code: induction
                  query head 1 (KV head 0) looks where its own code is: echo

    Rotary pair i turns by 10^(-i/4) per position. Looking back uses pairs 0 to 9, constants whose phases agree one position
    apart; codes lie in pairs 16 to 31, which hardly turn within this context.
    """
    code = torch.nn.functional.normalize(torch.randn(vocab, CODE, generator=torch.Generator().manual_seed(0)), dim=1)
    own, before, coming, one = slice(0, 32), slice(32, 64), slice(64, 96), 96
    slow = [*range(16, 32), *range(48, 64)]
    for name, weight in weights.items():
        weight.fill_(1.0 if "norm" in name else 0.0)
    weights["model.embed_tokens.weight"][:, own] = code
    weights["model.embed_tokens.weight"][:, one] = 1.0
    weights["lm_head.weight"][:, coming] = code

    def rows(layer: int, kind: str, head: int) -> Tensor:
        return weights[f"model.layers.{layer}.self_attn.{kind}_proj.weight"][head * HEAD : (head + 1) * HEAD]

    def copy(layer: int, kv_head: int, q_head: int, target: slice, norm: float) -> None:
        rows(layer, "v", kv_head)[:CODE, own] = torch.eye(CODE) / norm
        weights[f"model.layers.{layer}.self_attn.o_proj.weight"][target, q_head * HEAD : q_head * HEAD + CODE] = torch.eye(CODE)

    def match(layer: int, kv_head: int, q_head: int, keys: slice, norm: float) -> None:
        rows(layer, "q", q_head)[slow, own] = torch.eye(CODE) * SHARP * HEAD**0.5 / norm
        rows(layer, "k", kv_head)[slow, keys] = torch.eye(CODE) / norm

    first, second = (HIDDEN / 2) ** 0.5, (HIDDEN / 3) ** 0.5  # what RMS norm multiplies by: two, then three parts of length 1
    turns = THETA ** (-torch.arange(10) / (HEAD / 2))
    rows(0, "q", 0)[:10, one] = turns.cos() * SHARP * HEAD**0.5 / first
    rows(0, "q", 0)[32:42, one] = -turns.sin() * SHARP * HEAD**0.5 / first
    rows(0, "k", 0)[:10, one] = 1 / first
    copy(0, 0, 0, before, first)
    match(1, 1, 3, before, second)
    copy(1, 1, 3, coming, second)
    match(1, 0, 1, own, second)


@pytest.fixture(scope="module")
def inducing(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with that model: 2 layers of 4 query heads and 2 KV heads, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("inducing")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    vocab = json.loads((tiny / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(vocab_size=vocab, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=HEAD, max_position_embeddings=512, rope_theta=THETA, bos_token_id=0,
                         eos_token_id=None, pad_token_id=None, tie_word_embeddings=False)  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        induction_weights(dict(model.named_parameters()), vocab)
    model.save_pretrained(folder)
    return folder


def test_the_known_induction_head_is_ranked_first(inducing: Path) -> None:
    llm = LLM(str(inducing), dtype="fp32", kv_memory="8MiB")
    pattern = Pattern.fitting(512, llm.model.vocab_size, llm.core.runner.decoder.config.bos_token_id, tokens=60)
    assert pattern.bos == 0
    prompt = pattern.prompt(9)
    continued = llm.generate([prompt[:100]], SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
    assert continued[0].tokens == prompt[100:140], "it does continue what it has seen"

    seeds = [measure(llm, pattern, seed) for seed in range(3)]
    for scores in seeds:
        assert all(float(score.min()) >= 0 and float(score.max()) <= 1 + 1e-3 for score in scores)
        induction, echo = scores.of_kv_heads(2)
        assert best_heads(induction, 0.25) == [(1, 1)] and induction[1][1] > 0.99
        assert best_heads(echo, 0.25) == [(1, 0)]
        assert echo[1][0] == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3, abs=1e-3)  # a token looks at itself as well
        assert max(score for i, row in enumerate(induction) for j, score in enumerate(row) if (i, j) != (1, 1)) < 0.1
    classes = [retrieval_heads(*scores.of_kv_heads(2)) for scores in seeds]
    assert classes[0] == HeadClasses(((), (0, 1)), 2)
    assert overlaps(classes) == [1.0, 1.0, 1.0]
    assert llm.core.cache.pool.in_use == 0
