"""Where sampling defaults come from, and what a start says of values that cannot be."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvloom.engine.config import EngineConfig
from kvloom.engine.errors import ConfigError, ModelError
from kvloom.engine.requests.sampling import OPENAI_SAMPLING, SamplingDefaults
from kvloom.engine.startup.catalog import ModelFiles
from kvloom.engine.startup.recommended import sampling_defaults

QWEN = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "eos_token_id": [1, 2],
        "max_new_tokens": 2048, "pad_token_id": None}  # fmt: skip
READ = SamplingDefaults(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05, max_tokens=2048)


def found(folder: Path, gguf: Any = None, **settings: Any) -> tuple[SamplingDefaults, str]:
    options = EngineConfig.from_flat({"model": str(folder), **settings}).model
    files = ModelFiles(folder, "folder" if gguf is None else "gguf", "m")
    return sampling_defaults(options, files, gguf)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "generation_config.json").write_text(json.dumps(QWEN))
    return tmp_path


def test_the_models_file_is_applied_unless_it_is_not_wanted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert found(folder) == (READ, "generation_config.json")
    for name in ("none", "vllm"):
        assert found(folder, generation_config=name) == (OPENAI_SAMPLING, "OpenAI's defaults")
    empty = tmp_path_factory.mktemp("empty")
    assert found(empty) == (OPENAI_SAMPLING, "OpenAI's defaults")
    (empty / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": null, "top_k": 0}')
    assert found(empty) == (OPENAI_SAMPLING, "OpenAI's defaults")


def test_another_file_or_its_folder_is_a_limit_too(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    for given in (str(folder), str(folder / "generation_config.json")):
        assert found(other, generation_config=given)[0] == READ._replace(most_tokens=2048)


def test_an_override_goes_on_top(folder: Path) -> None:
    over = {"temperature": 0, "presence_penalty": 0.5, "top_k": None}
    made, source = found(folder, override_generation_config=json.dumps(over))
    assert made == READ._replace(temperature=0, presence_penalty=0.5)
    assert source == "generation_config.json, --override-generation-config"
    made, source = found(folder, generation_config="none", override_generation_config='{"max_new_tokens": 7}')
    assert made == OPENAI_SAMPLING._replace(max_tokens=7, most_tokens=7) and source == "--override-generation-config"


def test_a_gguf_says_it_in_its_metadata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metadata = {"general.sampling.temp": 0.6000000238418579, "general.sampling.top_k": 40, "general.sampling.min_p": 0.0,
                "general.sampling.penalty_repeat": 1.100000023841858, "general.sampling.penalty_last_n": 64,
                "general.sampling.mirostat": 2, "general.sampling.xtc_probability": 0.0, "general.name": "x"}  # fmt: skip
    gguf = SimpleNamespace(metadata=metadata, path=tmp_path / "m.gguf")
    with caplog.at_level(logging.WARNING, "kvloom.model"):
        made, source = found(tmp_path, gguf)
    assert made == SamplingDefaults(temperature=0.6, top_k=40, repetition_penalty=1.1) and "general.sampling" in source
    assert "m.gguf recommends mirostat, which is not served" in caplog.text
    assert found(tmp_path, SimpleNamespace(metadata={"general.name": "x"}, path=gguf.path))[1] == "OpenAI's defaults"


def test_the_built_in_models_card_comes_first(tmp_path: Path) -> None:
    card = SamplingDefaults(temperature=0.2, top_p=0.9)
    options = EngineConfig.from_flat({"model": "smollm2"}).model
    assert sampling_defaults(options, ModelFiles(tmp_path, "gguf", "smollm2", card), None) == (card, "the model's card")


@pytest.mark.parametrize(("values", "said"), [
    ({"temperature": "hot"}, "temperature is 'hot'; allowed: 0 to 100"), ({"top_p": 1.5}, "top_p is 1.5"),
    ({"top_k": 2.5}, "top_k is 2.5; allowed: a whole number"), ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0"), ({"min_p": True}, "min_p is true"),
])  # fmt: skip
def test_values_out_of_range_are_told_with_the_way_out(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError) as error:
        found(tmp_path)
    assert said in str(error.value) and "--generation-config none" in str(error.value)
    assert str(tmp_path / "generation_config.json") in str(error.value)
    for given in ({"generation_config": str(tmp_path)}, {"override_generation_config": json.dumps(values)}):
        with pytest.raises(ConfigError) as wrong:
            found(tmp_path, **{"generation_config": "none", **given})
        assert said in str(wrong.value)


def test_whole_numbers_may_be_written_with_a_point(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"top_k": 50.0, "max_new_tokens": 9.0}')
    assert found(tmp_path)[0] == SamplingDefaults(top_k=50, max_tokens=9)


@pytest.mark.parametrize(("settings", "said"), [
    ({"generation_config": "/not/there"}, "there is no file"), ({"override_generation_config": "[1]"}, "a JSON object"),
    ({"override_generation_config": '{"temprature": 1}'}, "holds 'temprature'; allowed: temperature, top_p"),
    ({"override_generation_config": '{"do_sample": false}'}, "holds 'do_sample'"),
])  # fmt: skip
def test_settings_that_do_nothing_are_errors(tmp_path: Path, settings: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        found(tmp_path, **settings)
    assert said in str(error.value)


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match="generation_config"):
        found(tmp_path, generation_config=str(tmp_path))
