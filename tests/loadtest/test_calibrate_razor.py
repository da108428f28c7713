"""`kvloom calibrate razor`: what it stores, draws and prints on a tiny model, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvloom.engine.calibration import HeadClasses, RazorCalibration, find_razor, store
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.calibrations import razor as calibrate_razor
from kvloom.server import cli
from kvloom.server.exit_codes import USAGE_ERROR

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine's own calibrations are nobody else's here."""
    monkeypatch.setattr(store, "own_folder", lambda: tmp_path / "own")
    return tmp_path / "own"


def test_the_command_measures_stores_and_draws(
    tiny: Path, tmp_path: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "pictures" / "heads.png"
    words = ["calibrate", "razor", str(tiny), "--tokens", "40", "--repeats", "3", "--seeds", "2", "--seed", "5"]
    words += ["--ids", "100:200", "--dtype", "fp32", "--heatmap", str(picture), "--induction-share", "0.3"]
    assert cli.main(words) == 0
    (file,) = own.iterdir()
    found = find_razor(file.stem.removeprefix("razor-"))
    assert found is not None and (found.layers, found.kv_heads, found.model) == (3, 2, str(tiny))
    settings = {key: found.settings[key] for key in ("tokens", "repeats", "ids", "bos", "seeds", "dtype")}
    assert settings == {"tokens": 40, "repeats": 3, "ids": [100, 200], "bos": None, "seeds": [5, 6], "dtype": "fp32"}
    overlap = found.settings["overlap"]
    assert overlap["induction_share"] == 0.3 and overlap["echo_share"] == 0.04
    assert len(overlap["jaccard"]) == 1 and 0 <= overlap["jaccard"][0] <= 1
    assert all(0 < score < 1 for row in (*found.induction, *found.echo) for score in row)
    assert picture.read_bytes().startswith(PNG)
    text = capsys.readouterr().out
    classes = found.classes(0.3)
    assert f"{classes.count} of 6 KV heads" in text and "overlap (Jaccard)" in text and file.name in text.replace("\n", "")


def test_a_folder_of_ones_own(tiny: Path, tmp_path: Path, own: Path) -> None:
    assert calibrate_razor.main([str(tiny), "--tokens", "20", "--seeds", "1", "--folder", str(tmp_path / "here")]) == 0
    assert len(list((tmp_path / "here").glob("razor-*.json"))) == 1 and not own.exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--induction-share", "1.5"], "--induction-share"),
        (["--echo-share", "nan"], "--echo-share"),
        (["--seeds", "0"], "--seeds"),
        (["--ids", "50"], "--ids"),
        (["--ids", "9:9"], "--ids"),
        (["--heatmap", "heads.svg"], "--heatmap"),
    ],
)
def test_what_is_wrong_is_told_before_the_model_is_loaded(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["calibrate", "razor", "no-such-model", *flags]) == USAGE_ERROR
    error = capsys.readouterr().err
    assert named in error and "allowed" in error


@pytest.mark.parametrize("flags", [["--tokens", "128"], ["--repeats", "1"], ["--ids", "0:100000"]])
def test_patterns_that_do_not_fit_are_refused(tiny: Path, own: Path, flags: list[str]) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        calibrate_razor.main([str(tiny), *flags])
    assert not own.exists()


@pytest.mark.parametrize("shape", [(1, 1), (30, 3), (48, 8)])
def test_maps_of_any_shape_are_drawn(tmp_path: Path, shape: tuple[int, int]) -> None:
    from matplotlib import image

    layers, heads = shape
    scores = tuple(tuple((layer + head) / (layers + heads) for head in range(heads)) for layer in range(layers))
    calibration = RazorCalibration(model_key="key", model="model", induction=scores, echo=scores)
    sizes: list[Any] = []
    for classes in (calibration.classes(), HeadClasses.all(layers, heads)):
        calibrate_razor.draw(tmp_path / "map.png", calibration, classes)
        sizes.append(image.imread(tmp_path / "map.png"))
    assert sizes[0].shape == sizes[1].shape and max(sizes[0].shape) < 3000
    assert shape == (1, 1) or (sizes[0] != sizes[1]).any(), "frames are seen"
