"""`kvloom eval extrapolation` on the tiny model, whose trained length is 512."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from kvloom.engine.errors import ConfigError
from kvloom.loadtest.quality import decoding, extrapolation, methods

SPARSE = "token_select:prefill_budget=64:chunk=64"


def argv(tiny: Path, out: Path, *more: str) -> list[str]:
    text = out / "text.txt"
    text.write_text("\n".join(Path(module.__file__).read_text() for module in (methods, decoding, extrapolation)))
    return [str(tiny), "--dtype", "fp32", "--weights", "bf16", "--kv-memory", "32MiB", "--text", str(text), "--budgets", "64",
            "--json", str(out / "rows.json"), "--markdown", str(out / "rows.md"), "--batch", "8", "--threads",
            "1", *more]  # fmt: skip


def parsed(words: list[str]) -> argparse.Namespace:
    made = argparse.ArgumentParser()
    extrapolation.Extrapolation.add_flags(made)
    return made.parse_args(words)


def test_rows_within_and_beyond_the_trained_length(tiny: Path, tmp_path: Path) -> None:
    specs = f"dense,{SPARSE},{SPARSE}:positions=reindexed"
    words = argv(tiny, tmp_path, "--methods", specs, "--contexts", "400,600", "--haystacks", "1", "--texts", "2")
    assert extrapolation.main(words) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["context"], row["method"], row["positions"]) for row in rows] == [
        (context, method, positions)
        for context in (400, 600)
        for method, positions in (("dense", "true"), ("token_select", "true"), ("token_select", "reindexed"))
    ]
    assert all(row["trials"] == 8 and 0 <= row["accuracy"] <= 1 for row in rows)
    assert [row["n"] for row in rows] == [2 * 399] * 3 + [2 * 599] * 3
    assert all(row["ppl_ci"][0] < row["ppl"] < row["ppl_ci"][1] for row in rows)
    assert len({row["ppl"] for row in rows}) == 6  # every method reads prompts in its own way
    assert "| 600 | token_select | reindexed | 64 |" in (tmp_path / "rows.md").read_text()
    before = (tmp_path / "rows.json").read_text()
    assert extrapolation.main([*words, "--resume"]) == 0  # nothing is left to measure
    assert (tmp_path / "rows.json").read_text() == before


def test_dense_rows_are_those_of_the_model(tiny: Path, tmp_path: Path) -> None:
    """Lifting the limit changes no figure within it: log-probabilities are an ordinary engine's."""
    from kvloom import LLM, KVOptions, SamplingParams

    args = parsed(argv(tiny, tmp_path, "--methods", f"{SPARSE}:positions=reindexed"))
    lifted = extrapolation.engine(args, extrapolation.plan(args.methods, args.budgets, baseline=False), 900)
    text = [3 + 7 * i % 300 for i in range(200)]
    plain = LLM(str(tiny), dtype="fp32", weights="bf16", kv_memory="8MiB")
    (wanted,) = plain.generate([text], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
    assert wanted.prompt_logprobs is not None
    found = extrapolation.losses(lifted, text, KVOptions(selection="dense"))
    assert np.allclose(found, [-entry.logprob for entry in wanted.prompt_logprobs if entry is not None], atol=1e-5)
    assert len(extrapolation.losses(lifted, text * 4, KVOptions(selection="dense"))) == 799


def test_perplexity_is_taken_over_the_end_of_a_context() -> None:
    loss = np.concatenate([np.zeros(1500), np.ones(500)])
    assert extrapolation.perplexity([loss, loss], 2001)["ppl"] == pytest.approx(np.exp(500 / 1024))
    assert extrapolation.perplexity([loss], 1001)["ppl"] == 1.0


def test_something_must_go_beyond(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none with re-indexed positions"):
        extrapolation.main(argv(tiny, tmp_path, "--methods", "dense"))
    with pytest.raises(ConfigError, match="lower --texts or --contexts"):
        extrapolation.main(
            argv(tiny, tmp_path, "--methods", f"{SPARSE}:positions=reindexed", "--contexts", "900", "--texts", "99")
        )
