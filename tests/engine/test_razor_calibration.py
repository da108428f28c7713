"""RazorAttention's calibration: head classes, storing and finding, scores against full maps, a known induction head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvloom.engine.calibration import HeadClasses, RazorCalibration, find_razor, save_razor, store
from kvloom.engine.calibration.razor import best_heads
from kvloom.engine.errors import ModelError


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
