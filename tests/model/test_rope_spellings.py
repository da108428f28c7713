"""Both spellings of rotary settings, alone and together: logits equal transformers' reading of the same config.json."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvloom.engine.errors import ModelError
from kvloom.engine.model.hf_config import config_from_hf
from kvloom.engine.model.load import load_model

TOKENS = [(7 * i * i + 3 * i) % 61 for i in range(45)]
LINEAR = {"rope_type": "linear", "factor": 3.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
DEFAULT = {"rope_type": "default"}
OWN = {"rope_theta": 700.0}

CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta outside": {"rope_theta": 500.0},
    "theta inside": {"rope_parameters": DEFAULT | OWN},
    "theta on both sides": {"rope_theta": 500.0, "rope_parameters": DEFAULT | OWN},
    "theta outside, type inside": {"rope_theta": 500.0, "rope_parameters": DEFAULT},
    "parameters linear": {"rope_parameters": LINEAR | OWN},
    "parameters llama3": {"rope_theta": 500.0, "rope_parameters": LLAMA3},
    "parameters yarn": {"rope_parameters": YARN | OWN},
    "scaling linear, old name": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "scaling yarn": {"rope_theta": 500.0, "rope_scaling": YARN},
    "default and scaling linear": {"rope_parameters": DEFAULT | OWN, "rope_scaling": LINEAR},
    "default and scaling llama3": {"rope_parameters": DEFAULT | OWN, "rope_theta": 500.0, "rope_scaling": LLAMA3},
    "default and scaling yarn": {"rope_parameters": DEFAULT | OWN, "rope_scaling": YARN | {"rope_theta": 300.0}},
    "linear and scaling llama3": {"rope_parameters": LINEAR | OWN, "rope_scaling": LLAMA3},
    "yarn and scaling default": {"rope_parameters": YARN | OWN, "rope_scaling": {"type": "default"}},
    "yarn and empty scaling": {"rope_parameters": YARN | OWN, "rope_scaling": {}},
    "yarn and no scaling": {"rope_parameters": YARN | OWN, "rope_scaling": None},
    "original context outside": {"original_max_position_embeddings": 16, "rope_parameters": LLAMA3 | OWN},
    "attention factor": {"rope_scaling": YARN | {"attention_factor": 1.7}},
    "neutral partial factor": {"partial_rotary_factor": 1.0, "rope_parameters": LINEAR | OWN},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose rotary settings are left out of config.json."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(11)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=96, initializer_range=0.3, pad_token_id=None)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if not k.startswith("rope")}))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(plain, tmp_path, kernels, run_logits, case) -> None:
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | CASES[case]))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = oracle(torch.tensor([TOKENS])).logits[0]
    found = run_logits(load_model(folder, "fp32", kernels).decoder, TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


RAW = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 8, "intermediate_size": 128, "max_position_embeddings": 4096,
}  # fmt: skip


def test_two_spellings_that_differ_are_told(caplog) -> None:
    with caplog.at_level(logging.WARNING, "kvloom.model"):
        config_from_hf(RAW | {"rope_parameters": DEFAULT, "rope_scaling": DEFAULT})
        assert not caplog.text
        config_from_hf(RAW | {"rope_parameters": DEFAULT, "rope_scaling": LINEAR})
    assert "rope_scaling counts" in caplog.text and "'linear'" in caplog.text


@pytest.mark.parametrize(("change", "named"), [
    ({"rope_parameters": DEFAULT, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_parameters": {"full_attention": None, "sliding_attention": None}}, "per layer type"),
    ({"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_scaling": YARN | {"attention_factor": "much"}}, "attention_factor"),
    ({"rope_scaling": YARN | {"attention_factor": -1.0}}, "attention_factor is -1"),
    ({"rope_scaling": YARN | {"beta_fast": -3}}, "beta_fast is -3"),
    ({"rope_scaling": YARN | {"factor": 1e300}}, "factor is 1e"),
    ({"rope_scaling": YARN | {"original_max_position_embeddings": 10**400}}, "original_max_position_embeddings is a number of"),
    ({"rope_scaling": YARN | {"original_max_position_embeddings": 1 << 40}}, "original_max_position_embeddings of 10995"),
    ({"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": -1e9}}, "mscale_all_dim"),
    ({"rope_scaling": YARN | {"truncate": "no"}}, "truncate is 'no'; true or false"),
    ({"rope_scaling": ["yarn"]}, "per layer type"),
    ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope type"),
    ({"rope_theta": 1e200}, "rope_theta is 1e"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; true or false"),
    ({"layer_types": "sliding_attention"}, "layer_types"),
    ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding window is 0"),
    ({"vocab_size": 10**5000}, "vocab_size is a number of"),
])  # fmt: skip
def test_refused_by_name(change, named) -> None:
    with pytest.raises(ModelError, match=named):
        config_from_hf(RAW | change)
