"""What counts as text that repeats itself, and what does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kvloom.engine.reuse.kvshare.periodic import LEAST, PERIODS, periodic

Ints = npt.NDArray[np.int32]
HERE = Path(__file__)


def text(seed: int, length: int) -> Ints:
    return np.random.default_rng(seed).integers(3, 40_000, length).astype(np.int32)


@pytest.mark.parametrize("period", [1, 2, 3, 5, 7, 16, 31, 32, 33, 50, 63, 64])
def test_a_period_is_seen_where_it_is(period: int) -> None:
    length = max(400, 5 * period)
    tokens = np.concatenate([text(1, 100), np.resize(text(2, period), length), text(3, 100)])
    found = periodic(tokens)
    assert found[100 : 100 + length].all()
    assert not found[:98].any() and not found[102 + length :].any(), "a window of few different tokens may hold two others"


@pytest.mark.parametrize("period", range(1, PERIODS + 1))
def test_three_periods_are_enough_and_two_are_not(period: int) -> None:
    enough = period + max(LEAST, 2 * period)
    assert periodic(np.resize(text(2, period), enough)).all()
    assert not periodic(np.resize(text(2, period), enough - 1)).any() or (period == 1 and enough - 1 >= 64)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_different_tokens_in_any_order(count: int) -> None:
    tokens = np.concatenate([text(1, 100), np.random.default_rng(1).choice(text(2, count), 300).astype(np.int32), text(3, 100)])
    found = periodic(tokens)
    assert found[100:400].all() and not found[:98].any() and not found[402:].any()


def test_one_change_now_and_then_hides_nothing() -> None:
    tokens = np.resize(text(2, 16), 900).astype(np.int32)
    tokens[[150, 380, 611, 800]] = 1
    assert periodic(tokens).mean() > 0.98


@pytest.mark.parametrize("length", [0, 1, 2, 31, 33, 63])
def test_short_texts(length: int) -> None:
    assert not periodic(text(1, length)).any() and len(periodic(text(1, length))) == length


CSV = "\n".join(f"{i},{i * 37 % 101},{i * 7919 % 1000}.{i % 10},{'yes' if i % 3 else 'no'}" for i in range(120))
TABLE = "\n".join(f"| {name} | {len(name)} | {hash(name) % 89} ms | ok |" for name in dir(np)[:120])
LOG = "\n".join(
    f"2026-11-28 14:{i // 60:02}:{i % 60:02} INFO request {i * 31 % 977} took {i * 53 % 613} ms" for i in range(120)
)
JSON = "[" + ", ".join(f'{{"id": {i}, "name": "item {i * 17 % 83}", "price": {i * 71 % 997}}}' for i in range(120)) + "]"


@pytest.mark.parametrize(
    "content",
    [HERE.read_text(), (HERE.parents[1] / "test_fairness.py").read_text(), CSV, TABLE, LOG, JSON],
    ids=["code", "more code", "csv", "table", "log", "json"],
)
def test_ordinary_text_is_none_of_it(content: str) -> None:
    """Bytes as tokens: a harder case than real tokens, of which a line has fewer, and more different ones."""
    words = {word: i for i, word in enumerate(sorted(set(content.split(" "))))}
    assert not periodic(np.array([words[word] for word in content.split(" ")], np.int32)).any()
    assert periodic(np.frombuffer(content.encode(), np.uint8).astype(np.int32)).mean() < 0.02
