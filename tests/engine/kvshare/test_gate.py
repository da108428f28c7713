"""The gate of approximate reuse: `kvloom calibrate kvshare` opens it for one model, if every figure is within bounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvloom.engine import LLM, KVOptions, SamplingParams
from kvloom.engine.calibration import store
from kvloom.engine.errors import ConfigError, InvalidRequestError
from kvloom.engine.reuse.kvshare import ranker
from kvloom.engine.reuse.kvshare.copying import copy_in
from kvloom.engine.reuse.kvshare.options import GATE, RepairOptions
from kvloom.engine.reuse.kvshare.ranking import choose
from kvloom.loadtest.calibrations import kvshare as calibrate_kvshare

MakeLLM = Callable[..., LLM]
SHARE = '{"min_match": 32, "min_reusable": 48, "boundary": 4}'
ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
APPROX = KVOptions(reuse="approx")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where calibrations are stored and looked for."""
    monkeypatch.setattr(store, "own_folder", lambda: tmp_path / "calibrations")
    return tmp_path / "calibrations"


@pytest.fixture
def calibrate(tiny: Path) -> Callable[..., int]:
    def run(*flags: str) -> int:
        fixed = ("--dtype", "fp32", "--threads", "1", "--kv-memory", "32MiB", "--kvshare-options", SHARE, "--document-len")
        sizes = ("130", "--documents", "2", "--prompts", "2", "--answer-len", "4", "--text", calibrate_kvshare.__file__)
        return calibrate_kvshare.main([str(tiny), *fixed, *sizes, *flags])

    return run


def only(folder: Path) -> dict[str, Any]:
    (path,) = folder.iterdir()
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_model_that_passes_is_served(calibrate: Callable[..., int], make_llm: MakeLLM, folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match="calibrate kvshare"):
        make_llm(threads=1).generate([[5, 6, 7]], ONE, kv=APPROX)
    with pytest.raises(ConfigError, match="calibrate kvshare"):
        make_llm(reuse="approx", threads=1)
    assert calibrate("--kl", "100", "--top1", "0") == 0
    found = only(folder)
    assert found["model_key"] == make_llm(threads=1).core.runner.geometry.model_key
    assert found["identity_offsets"][:4] == [0, 1, 17, -5] and found["identity_offsets"][4] > 100
    for kind in ("context", "isolated"):
        assert found[kind]["everything_kl"] < 1e-4 < found[kind]["kl_mean"]
        assert found[kind]["matched_share"] > 0.5 and found[kind]["recompute_share"] == pytest.approx(0.15, abs=0.02)
    assert 0 < found["reject_above"] < 3 and found["machine"] and found["policy"] == RepairOptions().policy
    assert make_llm(threads=1).generate([[5, 6, 7]], ONE, kv=APPROX)[0].tokens
    assert make_llm(reuse="approx", threads=1).generate([[5, 6, 7]], ONE)[0].tokens


def test_a_calibration_of_another_model_opens_nothing(make_llm: MakeLLM) -> None:
    store.write(GATE, "another", {"policy": "blend"})
    with pytest.raises(InvalidRequestError, match="calibrate kvshare"):
        make_llm(threads=1).generate([[5, 6, 7]], ONE, kv=APPROX)


def test_a_model_that_fails_is_not(
    calibrate: Callable[..., int], make_llm: MakeLLM, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate("--kl", "0") == 1
    said = capsys.readouterr().out
    assert "context donors, the default policy: mean KL is" in said and "allowed: up to 0" in said
    assert "everything computed:" not in said, "that one passes"
    assert not folder.exists()
    with pytest.raises(InvalidRequestError, match="calibrate kvshare"):
        make_llm(threads=1).generate([[5, 6, 7]], ONE, kv=APPROX)


def test_a_failure_leaves_what_an_earlier_check_stored(calibrate: Callable[..., int], folder: Path, make_llm: MakeLLM) -> None:
    store.write(GATE, make_llm(threads=1).core.runner.geometry.model_key, {"policy": "earlier"})
    assert calibrate("--kl", "0") == 1
    assert only(folder)["policy"] == "earlier"


def test_wrongly_turned_keys_fail_at_layer_0(
    calibrate: Callable[..., int], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bent(runs: Any, to: Any, kv: Any, kernels: Any, frequencies: Any) -> None:
        copy_in(runs, to, kv, kernels, frequencies * 1.01)

    monkeypatch.setattr(ranker, "copy_in", bent)
    assert calibrate("--kl", "100", "--top1", "0") == 1
    assert "layer 0 of copied KV is not the model's own after moving it by 1 positions" in capsys.readouterr().out
    assert not folder.exists()


def test_everything_computed_must_be_a_full_pass(
    calibrate: Callable[..., int], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forgetful(options: Any, *args: Any, **kwargs: Any) -> Any:
        repair = choose(options, *args, **kwargs)
        if options.ratio == 1:  # the rows of one run stay as they were copied
            first = repair.runs[0]
            repair.rows = repair.rows[(repair.rows < first.start) | (repair.rows >= first.stop)]
        return repair

    monkeypatch.setattr(ranker, "choose", forgetful)
    assert calibrate("--kl", "100", "--top1", "0") == 1
    said = capsys.readouterr().out
    assert "everything computed: mean KL is" in said and "allowed: up to 0.0001" in said and "the default policy:" not in said
    assert not folder.exists()


@pytest.mark.parametrize(("flag", "value"), [("--kl", "-1"), ("--top1", "1.5")])
def test_bounds_that_cannot_be(calibrate: Callable[..., int], flag: str, value: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        calibrate(flag, value)
