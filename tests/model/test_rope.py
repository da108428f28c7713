"""Frequencies against transformers' own formulas, tables against their definition."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvloom.engine.errors import ModelError
from kvloom.engine.model.hf_config import config_from_hf
from kvloom.engine.model.rope import RopeConfig, inverse_frequencies, rotary_table

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
    YARN,
    YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False},
    YARN | {"mscale": 1.0, "mscale_all_dim": 0.8},
    YARN | {"attention_factor": 1.3},
    YARN | {"factor": 1.0},
])  # fmt: skip
@pytest.mark.parametrize("head_dim", [64, 128])
def test_frequencies_equal_transformers(rope, head_dim) -> None:
    theirs = LlamaConfig(hidden_size=512, num_attention_heads=8, head_dim=head_dim, max_position_embeddings=32768,
                         rope_parameters=rope | {"rope_theta": 500000.0})  # fmt: skip
    expected, temperature = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs)
    ours = config_from_hf(theirs.to_dict() | {"architectures": ["LlamaForCausalLM"]}).rope
    torch.testing.assert_close(inverse_frequencies(ours).float(), expected, rtol=1e-5, atol=0)
    assert ours.attention_factor == pytest.approx(temperature)


def test_default_frequencies() -> None:
    inv_freq = inverse_frequencies(RopeConfig(dim=4, theta=10000.0))
    torch.testing.assert_close(inv_freq, torch.tensor([1.0, 0.01], dtype=torch.float64))


def test_divisors_divide_each_frequency() -> None:
    rope = RopeConfig(dim=4, theta=10000.0, divisors=(1.0, 8.0))
    torch.testing.assert_close(inverse_frequencies(rope), torch.tensor([1.0, 0.00125], dtype=torch.float64))


def test_table_holds_cosine_and_sine_times_temperature() -> None:
    rope = RopeConfig(dim=8, theta=100.0, attention_factor=1.25)
    cos, sin, inv_freq = rotary_table(rope, 50)
    angle = 49 * inverse_frequencies(rope)
    assert cos.shape == sin.shape == (50, 4) and cos.dtype == sin.dtype == inv_freq.dtype == torch.float32
    assert torch.equal(cos[49], (1.25 * angle.cos()).float()) and torch.equal(sin[49], (1.25 * angle.sin()).float())
    assert torch.equal(cos[0], torch.full((4,), 1.25)) and torch.equal(sin[0], torch.zeros(4))


def test_table_is_exact_at_far_positions() -> None:
    """fp32 angles would be off by about 1e-3 at position 131,071."""
    cos, _, _ = rotary_table(RopeConfig(dim=2, theta=10000.0), 131072)
    assert cos[131071, 0].item() == pytest.approx(torch.tensor(131071.0, dtype=torch.float64).cos().item(), abs=1e-7)


@pytest.mark.parametrize("divisors", [(1.0,), (1.0, 0.0)])
def test_unfitting_divisors_are_refused(divisors) -> None:
    with pytest.raises(ModelError, match="rope_freqs"):
        RopeConfig(dim=4, divisors=divisors)
