"""Calibrations: storing and finding them, choosing layers, decode rows in one step, and the whole of it on a tiny model."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.calibration import TidalCalibration, TidalChoice, find_tidal, save_tidal, store
from kvloom.engine.errors import ConfigError, ModelError
from kvloom.engine.requests.request import KVOptions, Request
from kvloom.engine.selection.tidal_decode import TidalDecode, TidalDecodeOptions
from kvloom.loadtest.calibrations import tidal as calibrate_tidal
from kvloom.loadtest.calibrations.choose import best_chain, improve
from kvloom.loadtest.calibrations.rows import DecodeRows
from kvloom.loadtest.calibrations.similarity import read_by, similarity
from kvloom.loadtest.calibrations.tidal_search import Judge, TidalSearch

Make = Callable[..., LLM]


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine's own calibrations are nobody else's here."""
    monkeypatch.setattr(store, "own_folder", lambda: tmp_path / "own")
    return tmp_path / "own"


def example(key: str = "abc", default: int = 2) -> TidalCalibration:
    choices = (TidalChoice(layers=(1, 4), figures={"kl": 0.5}), TidalChoice(layers=(1, 2, 4)))
    head_map = tuple(tuple((layer % 2, 0) for layer in range(anchor + 1, 6)) for anchor in range(6))
    return TidalCalibration(
        model_key=key, model="example", choices=choices, default=default, head_map=head_map, settings={"budget": 64}
    )


def texts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(300) for _ in range(length)] for _ in range(count)]


def test_what_is_saved_is_found() -> None:
    assert find_tidal("abc") is None
    path = save_tidal(example())
    found = find_tidal("abc")
    assert found == example() and find_tidal("abd") is None
    assert found.sizes == (2, 3) and found.choice(None).layers == (1, 4) and found.choice(3).layers == (1, 2, 4)
    assert found.heads(1, 4) == (0, 0) and found.heads(2, 3) == (1, 0)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with pytest.raises(KeyError):
        found.choice(4)


def test_own_calibrations_win_over_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    save_tidal(example(), tmp_path / "shipped")
    shipped = find_tidal("abc")
    assert shipped is not None and shipped.default == 2
    save_tidal(example(default=3))
    mine = find_tidal("abc")
    assert mine is not None and mine.default == 3


@pytest.mark.parametrize("content", ["{", "[1]", '{"model_key": "other"}', '{"model_key": "abc"}'])
def test_damaged_files_are_named(own: Path, content: str) -> None:
    own.mkdir()
    (own / store.file_name("tidal_decode", "abc")).write_text(content)
    with pytest.raises(ModelError, match="calibrat"):
        find_tidal("abc")


def test_shipped_files_are_whole() -> None:
    files = list(store.SHIPPED.glob("tidal_decode-*.json"))
    assert files
    for file in files:
        key = json.loads(file.read_text())["model_key"]
        assert file.name == store.file_name("tidal_decode", key)
        found = find_tidal(key)
        assert found is not None
        layers = len(found.head_map)
        for choice in found.choices:
            assert list(choice.layers) == sorted(set(choice.layers)) and choice.layers[-1] < layers
            assert 0 < choice.figures["kl_held_out"] < found.settings["reference"]["sinks and window"]["kl_held_out"]
        assert found.default in found.sizes
        assert [len(anchor) for anchor in found.head_map] == list(range(layers - 1, -1, -1))


# Choosing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_best_chain_is_the_best_of_all(seed: int) -> None:
    layers, value = 7, torch.rand(7, 7, generator=torch.Generator().manual_seed(seed)).triu()

    def lost(chain: tuple[int, ...]) -> float:
        return sum(1 - float(value[max(a for a in chain if a < l), l]) for l in range(chain[0], layers) if l not in chain)  # noqa: E741

    for count, firsts in itertools.product((1, 2, 3, 4), ((0,), (0, 1, 2))):
        found = best_chain(value, count, firsts)
        every = [chain for chain in itertools.combinations(range(layers), count) if chain[0] in firsts]
        assert found in every
        assert lost(found) == pytest.approx(min(map(lost, every)), abs=1e-5)
    with pytest.raises(ValueError, match="no chain of 6"):
        best_chain(value, 6, (2,))


def test_improve_walks_downhill_and_asks_once() -> None:
    asked: list[tuple[int, ...]] = []

    def score(chain: tuple[int, ...]) -> float:
        asked.append(chain)
        return sum(abs(a - b) for a, b in zip(chain, (1, 5, 9)))

    assert improve((1, 2, 3), 12, (1,), score) == (1, 5, 9)
    assert len(asked) == len(set(asked))
    assert all(chain[0] == 1 and list(chain) == sorted(set(chain)) and chain[-1] < 12 for chain in asked)
    assert improve((1, 2, 3), 12, (1,), lambda chain: 0.0) == (1, 2, 3)


def test_similarity_is_mass_covered() -> None:
    generator = torch.Generator().manual_seed(0)
    stops = torch.tensor([30, 24], dtype=torch.int32)
    weights = []
    for _ in range(3):
        logits = torch.randn(2, 2, 30, generator=generator) * 3
        logits.masked_fill_(torch.arange(30) >= stops[:, None, None], -torch.inf)
        weights.append(logits.softmax(-1))
    seen = read_by(weights[0], stops, sinks=2, selected=5, recent=4)
    assert (seen.sum(-1) == 11).all() and (seen[..., :2] == 1).all()
    assert (seen[0, :, 26:30] == 1).all() and (seen[1, :, 20:24] == 1).all() and (seen[1, :, 24:] == 0).all()
    found = similarity(weights, stops, 2, 5, 4)
    for anchor, layer in ((0, 0), (0, 2), (1, 2)):
        picked = read_by(weights[anchor], stops, 2, 5, 4)
        for theirs, mine in itertools.product(range(2), range(2)):
            mass = (picked[:, theirs] * weights[layer][:, mine]).sum(-1).mean()
            assert found[anchor, layer, theirs, mine] == pytest.approx(float(mass), abs=1e-6)
    assert (found[1, 0] == 0).all()


# On a model ----------------------------------------------------------------------------------------------------------


def decoded(llm: LLM, text: list[int], rows: int, kv: KVOptions) -> torch.Tensor:
    """[rows - 1, vocab]: log-probabilities of all but the first of the last rows, decoded one by one."""
    found: list[torch.Tensor] = []
    llm.core.observer = lambda request, logits: found.append(torch.log_softmax(logits[0], -1).clone())
    forced = tuple(text[-rows:])
    llm.core.add(Request(id="one", prompt=text[:-rows], kv=kv, sampling=SamplingParams(max_tokens=rows, forced_tokens=forced)))
    while llm.core.busy:
        llm.core.step()
    llm.core.observer = None
    return torch.stack(found[1:])


@pytest.mark.parametrize("options", [{"layers": [0]}, {"layers": [0, 1], "output": "dense"}])
def test_rows_of_one_step_are_decoding(make_llm: Make, options: dict[str, Any]) -> None:
    llm = make_llm(reuse="off", max_num_seqs=32)
    passages = texts(2, 80)
    kv = KVOptions(selection="tidal_decode", budget=24, options=options)
    geometry, kernels = llm.core.runner.geometry, llm.core.runner.decoder.kernels
    selector = TidalDecode(TidalDecodeOptions(**{**options, "layers": tuple(options["layers"])}), 24, geometry, kernels)
    with torch.inference_mode(), DecodeRows(llm, passages, 12) as rows:
        dense, sparse = rows.log_probs(None), rows.log_probs(selector)
        again = rows.log_probs(None)
    assert torch.equal(dense, again)
    for i, passage in enumerate(passages):
        torch.testing.assert_close(sparse[i * 12 : i * 12 + 11], decoded(llm, passage, 12, kv), atol=1e-5, rtol=0)
        torch.testing.assert_close(dense[i * 12 : i * 12 + 11], decoded(llm, passage, 12, KVOptions()), atol=1e-5, rtol=0)
    assert float((sparse - dense).abs().max()) > 1e-3


def test_rows_need_room(make_llm: Make) -> None:
    with pytest.raises(ConfigError, match="tokens of KV cache"):
        DecodeRows(make_llm(kv_memory=64 * 1024), texts(4, 200), 4)


def test_search_judges_with_the_engines_own_selector(make_llm: Make) -> None:
    llm = make_llm(max_num_seqs=32)
    with torch.inference_mode(), DecodeRows(llm, texts(2, 80), 12) as rows:
        search = TidalSearch(llm, rows, 24, "sparse")
        tried: dict[tuple[int, ...], float] = {}
        found = search.choose(2, (0, 1), lambda layers, kl: tried.update({layers: kl}))
        assert {(0, 2), (1, 2)} <= set(tried)
        assert tried[found] == min(tried.values()) == search.figures(found).kl
        everything = search.selector(TidalDecodeOptions(layers=(2,), output="dense"))
        assert search.judge(everything).kl == pytest.approx(0, abs=1e-6) and search.judge(everything).top1 == 1
        wide = search.judge(search.selector(TidalDecodeOptions(layers=(0,)), 60))
        assert 0 < wide.kl < search.figures((0,)).kl
        assert 0.2 < search.mass((0,)) < 1 and search.mass((0, 1, 2)) == 1
        assert Judge(rows)(everything).kl == pytest.approx(0, abs=1e-6)


def test_the_command_stores_what_the_engine_then_uses(tiny: Path, make_llm: Make) -> None:
    arguments = ["--selections", "1,2", "--default", "1", "--dense", "0", "--budget", "32", "--tokens", "120", "--windows", "2",
                 "--rows", "6", "--dtype", "fp32"]  # fmt: skip
    assert calibrate_tidal.main([str(tiny), *arguments]) == 0
    llm = make_llm()
    found = find_tidal(llm.core.runner.geometry.model_key)
    assert found is not None and found.sizes == (1, 2) and found.default == 1
    assert found.settings["budget"] == 32 and found.choices[0].figures["kl"] > 0
    two = KVOptions(selection="tidal_decode", budget=32, options={"selections": 2})
    llm.generate(texts(1, 90), SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), kv=two)
    stats = llm.stats().selection["tidal_decode"]
    assert stats.selections == 5 * 2 and stats.reused == 5 * sum(layer not in found.choice(2).layers for layer in range(
        found.choice(2).layers[0], 3))  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [["--selections", "0"], ["--selections", "3", "--dense", "1"], ["--dense", "3"], ["--tokens", "4000"], ["--rows", "0"],
     ["--budget", "15"]],
)  # fmt: skip
def test_bad_arguments_are_refused(tiny: Path, arguments: list[str]) -> None:
    small = ["--selections", "1", "--budget", "32", "--tokens", "120", "--windows", "1", "--rows", "4", "--dtype", "fp32"]
    with pytest.raises(ConfigError):
        calibrate_tidal.main([str(tiny), *small, *arguments])
