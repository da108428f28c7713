"""Settings: docstrings become help, values are read or refused by name."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from kvloom.engine.config import EngineConfig, all_options
from kvloom.engine.errors import ConfigError, InvalidRequestError
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.engine.retention import RETENTIONS
from kvloom.engine.reuse import REUSE
from kvloom.engine.scheduling import ORDERS
from kvloom.engine.selection import SELECTIONS
from kvloom.engine.settings.options import parse_bytes
from kvloom.engine.startup import available


def test_every_setting_is_described() -> None:
    options = [option for _, option in all_options()]
    assert {"model", "kv_memory", "block_size", "scheduler"} <= {option.name for option in options}
    assert all(len(option.help) > 20 and option.help.endswith(".") for option in options)


@pytest.mark.parametrize(
    ("text", "size"), [("4GiB", 4 << 30), ("512 MiB", 512 << 20), ("1.5G", 3 << 29), ("64kb", 65536), ("100", 100), (7, 7)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


def test_help_names_all_that_may_be_chosen() -> None:
    help = {option.name: option.help for _, option in all_options()}
    for name, choices in (("selection", SELECTIONS), ("reuse", REUSE), ("scheduler", ORDERS), ("retention", RETENTIONS)):
        assert set(choices) <= set(re.findall(r"\w+", help[name])), name


def test_flat_settings_find_their_place() -> None:
    config = EngineConfig.from_flat({"model": "m", "kv_memory": "1GiB", "max_num_seqs": "8", "threads": None})
    assert (config.model.model, config.cache.kv_memory, config.scheduler.max_num_seqs) == ("m", 1 << 30, 8)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"max_num_seqs": "many"}, "max_num_seqs"),
        ({"max_num_seqs": 0}, "1 or more"),
        ({"max_num_seqs": True}, "max_num_seqs"),
        ({"dtype": "int3"}, "bf16, fp16, fp32"),
        ({"kv_memory": "0"}, "more than 0"),
        ({"kv_memory": "-1GiB"}, "size"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        EngineConfig.from_flat(settings)


@pytest.mark.parametrize(
    "field",
    [
        {"n": 0}, {"max_tokens": 0}, {"min_tokens": -1}, {"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": -0.1},
        {"top_p": 1.1}, {"top_k": -2}, {"min_p": 2.0}, {"presence_penalty": 3.0}, {"frequency_penalty": -3.0},
        {"repetition_penalty": 0.0}, {"logit_bias": {1: 101.0}}, {"logit_bias": {-1: 1.0}}, {"seed": 2**64}, {"stop": ("",)},
        {"stop": ("a",) * 17}, {"stop_token_ids": (-1,)}, {"logprobs": 21}, {"prompt_logprobs": -1}, {"n": 129},
    ],
    ids=str,
)  # fmt: skip
def test_sampling_parameters_know_their_bounds(field: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(field))) as caught:
        SamplingParams(**field)
    assert caught.value.param == next(iter(field))


def test_what_was_changed_is_told_by_flat_names() -> None:
    assert EngineConfig.from_flat({"model": "m", "served_model_name": "n", "block_size": 16}).changed() == {}
    config = EngineConfig.from_flat({"model": "m", "selection": "recycled", "budget": 64, "kv_memory": "1GiB", "draft": True})
    assert config.changed() == {"selection": "recycled", "budget": 64, "kv_memory": 1 << 30, "draft": True}


@pytest.mark.parametrize(("system", "group", "cache"), [(8000, math.inf, 2000), (8000, 2000.0, 500), (8000, 0.0, 0)])
def test_memory_respects_the_control_group(monkeypatch: pytest.MonkeyPatch, system: int, group: float, cache: int) -> None:
    monkeypatch.setattr(available, "_system", lambda: system)
    monkeypatch.setattr(available, "free_memory", lambda: group)
    assert available.default_kv_memory() == cache


def test_a_former_back_end_means_the_one_in_its_place(caplog: pytest.LogCaptureFixture) -> None:
    assert EngineConfig.from_flat({"backend": "numba"}).model.backend == "torch"
    assert "backend is numba, which there no longer is; torch takes its place" in caplog.text
