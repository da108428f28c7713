"""Intervals, divergences, method specs and result files: what needs no engine."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from kvloom.engine.errors import ConfigError
from kvloom.loadtest.quality.divergence import divergence
from kvloom.loadtest.quality.long import first_difference
from kvloom.loadtest.quality.spec import MethodSpec, parse_methods, plan
from kvloom.loadtest.quality.task_eval import Grid, draw
from kvloom.loadtest.study import runner as setup
from kvloom.loadtest.study.flags import numbers as parse_numbers
from kvloom.loadtest.study.intervals import Interval, bootstrap, exponential, ratio, wilson
from kvloom.loadtest.study.results import Column, Results, cell, table


def test_bootstrap_holds_the_mean_and_shrinks_with_n() -> None:
    random = np.random.default_rng(1)
    widths = []
    for count in (20, 200, 2000):
        values = random.exponential(size=count)
        low, high = bootstrap(values)
        assert low < values.mean() < high
        widths.append(high - low)
    assert widths[0] > 2 * widths[1] > 4 * widths[2]


def test_bootstrap_of_blocks_knows_that_a_repeated_value_says_nothing_new() -> None:
    values = np.random.default_rng(2).normal(size=50)
    alone = bootstrap(values)
    repeated = bootstrap(np.repeat(values, 20), np.repeat(np.arange(50), 20))
    naive = bootstrap(np.repeat(values, 20))
    assert repeated == pytest.approx(alone, abs=0.05)
    assert naive.high - naive.low < 0.4 * (repeated.high - repeated.low)


def test_bootstrap_covers_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        low, high = bootstrap(random.normal(size=40), resamples=300, seed=trial)
        hits += low < 0.0 < high
    assert 0.88 < hits / 200 <= 1.0


def test_bootstrap_takes_other_statistics_and_refuses_nonsense() -> None:
    values = np.arange(101.0)
    low, high = bootstrap(values, statistic=lambda v: float(np.median(v)))
    assert low < 50 < high
    for wrong in (([], None), ([1.0, 2.0], [0])):
        with pytest.raises(ValueError, match="at least one value"):
            bootstrap(*wrong)


def test_a_sample_of_one_has_no_interval() -> None:
    for of_one in (
        bootstrap([0.3]),
        bootstrap([0.3, 0.5], [7, 7]),  # one block
        bootstrap([0.3, 0.5], [7, 7], lambda values: float(np.median(values))),
        exponential(bootstrap([0.3])),
        wilson(1, 1),
        ratio([2.0], [1.0, 1.1]),
        ratio([2.0, 2.1], [1.0]),
    ):
        assert of_one is None
    row = {"share": 0.5, "share_ci": bootstrap([0.5])}
    assert cell(Column("share", "share", ".1%"), json.loads(json.dumps(row))) == "50.0%"
    assert exponential(Interval(0.0, 1.0)) == (1.0, pytest.approx(np.e))


def test_wilson() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)  # as in Newcombe (1998)
    assert wilson(0, 10).low == 0.0 and wilson(10, 10).high == 1.0
    assert wilson(10, 10).low == pytest.approx(0.7225, abs=1e-3)
    with pytest.raises(ValueError, match="at least one trial"):
        wilson(0, 0)


def test_ratio_of_medians() -> None:
    random = np.random.default_rng(4)
    low, high = ratio(random.normal(30, 1, 50), random.normal(10, 0.3, 50))
    assert 2.8 < low < 3.0 < high < 3.2


def test_divergence_is_kl_and_exactly_zero_for_equal_rows() -> None:
    a, b = torch.log_softmax(torch.randn(2, 5, 1000, generator=torch.Generator().manual_seed(0)), dim=-1)
    exact = (a.exp() * (a - b)).sum(-1)
    assert torch.allclose(divergence(a, b), exact, rtol=1e-4)
    assert torch.allclose(divergence(a.half(), b.half()), exact, rtol=2e-2)
    assert (divergence(a.half(), a.half()) == 0).all()
    near = torch.log_softmax(a + 0.001 * b, dim=-1)
    assert (divergence(a.half(), near.half()) >= 0).all()


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2], [1, 2, 4]) == 2
    assert first_difference([5], [1]) == 0


def test_methods_as_written() -> None:
    found = parse_methods("dense, recycled:stride=8:score_only=true,tidal_decode:layers=[2,16],token_select:vote=scaled")
    assert found == [
        ("dense", {}),
        ("recycled", {"stride": 8, "score_only": True}),
        ("tidal_decode", {"layers": [2, 16]}),
        ("token_select", {"vote": "scaled"}),
    ]
    for wrong in ("", "recycled:stride", "a,,b"):
        with pytest.raises(ConfigError, match="--methods"):
            parse_methods(wrong)


def test_plan_sets_the_baseline_beside_every_method() -> None:
    specs = plan("dense,recycled:stride=8", "64,128")
    assert [spec.label for spec in specs] == [
        "dense",
        "sink_window @ 64",
        "recycled stride=8 @ 64",
        "sink_window @ 128",
        "recycled stride=8 @ 128",
    ]
    assert specs[2].kv.options == {"stride": 8} and specs[2].kv.budget == 64
    assert plan("dense", "64") == [MethodSpec("dense")]
    without = plan("sink_window,razor_view,razor_view:retrieval=recycled", "64,128")
    assert [spec.label for spec in without if spec.method == "razor_view"] == [
        'razor_view retrieval="recycled" @ 64',
        'razor_view retrieval="recycled" @ 128',
        "razor_view",
    ]
    for wrong in ("0", "x", ""):
        with pytest.raises(ConfigError, match="--budgets"):
            parse_numbers(wrong, "--budgets")


COLUMNS = (Column("method", "method"), Column("KL", "kl", ".2f"), Column("MB", "bytes", ".1f", 1e-6), Column("never", "none"))


def test_table_shows_intervals_and_leaves_out_empty_columns() -> None:
    text = table(COLUMNS, [{"method": "a", "kl": 0.125, "kl_ci": [0.1, 0.2], "bytes": 2_500_000}, {"method": "b"}])
    assert text.splitlines() == [
        "| method | KL | MB |",
        "|---|---|---|",
        "| a | 0.12 (0.10 to 0.20) | 2.5 |",
        "| b | - | - |",
    ]


def test_results_are_written_row_by_row_and_resumed(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.json"
    results = Results(COLUMNS, ("method",), "Title", file, tmp_path / "rows.md", note="note")
    results.add({"method": "a", "kl": 1.0})
    results.add({"method": "b", "kl": 2.0})
    results.add({"method": "a", "kl": 3.0})
    assert json.loads(file.read_text()) == [{"method": "a", "kl": 3.0}, {"method": "b", "kl": 2.0}]
    assert (tmp_path / "rows.md").read_text().startswith("# Title\n\n| method | KL |")
    again = Results(COLUMNS, ("method",), "Title", file)
    again.resume()
    assert again.find({"method": "b"}) == {"method": "b", "kl": 2.0}
    assert again.find({"method": "c"}) is None
    file.write_text("{}")
    again.resume()
    assert again.rows == []
    file.write_text("no")
    with pytest.raises(ConfigError, match="no list of rows"):
        again.resume()
    with pytest.raises(ConfigError, match="--json"):
        Results(COLUMNS, ("method",), "Title").resume()


def test_an_interrupted_measurement_keeps_its_rows(tmp_path: Path) -> None:
    results = Results(COLUMNS, ("method",), "Title", tmp_path / "rows.json")

    def measure() -> None:
        results.add({"method": "a", "kl": 1.0})
        raise KeyboardInterrupt

    assert setup.finish(results, measure) == setup.INTERRUPTED
    assert json.loads((tmp_path / "rows.json").read_text()) == [{"method": "a", "kl": 1.0}]


def test_heat_map(tmp_path: Path) -> None:
    grid = Grid([100, 200], 4)
    for depth, score in ((0.0, 1.0), (0.1, 0.0), (1.0, 1.0)):
        grid.add(200, depth, score)
    assert grid.means[0, 1] == 0.5 and grid.means[3, 1] == 1.0
    assert math.isnan(grid.means[0, 0])
    draw(tmp_path / "map.png", "title", {"dense": grid, "other": grid})
    assert (tmp_path / "map.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="no grid"):
        draw(tmp_path / "none.png", "title", {})
