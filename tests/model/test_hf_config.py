"""config.json: what is read, both spellings of rotary settings, and what is refused by name."""

from __future__ import annotations

import json
import logging
import math

import pytest

from kvloom.engine.errors import ModelError
from kvloom.engine.model.hf_config import config_from_hf, read_hf_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32768}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"]}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}


def test_llama_fields() -> None:
    config = config_from_hf(LLAMA | {"eos_token_id": 2, "bos_token_id": 1, "rope_theta": 5e5})
    assert (config.layers, config.q_heads, config.kv_heads, config.head_dim) == (2, 8, 2, 8)
    assert (config.eos_token_ids, config.bos_token_id, config.max_position) == ((2,), 1, 4096)
    assert (config.rope.kind, config.rope.theta, config.rope.dim) == ("default", 5e5, 8)
    assert (config.dtype, config.tied_embeddings, config.qkv_bias, config.qk_norm) == ("bfloat16", False, False, False)
    assert (config.q_size, config.kv_size, config.qkv_size) == (64, 16, 96)


def test_families_differ_in_biases_norms_and_head_size() -> None:
    qwen2, qwen3 = config_from_hf(QWEN2), config_from_hf(QWEN3)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, False, 8)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)
    biased = config_from_hf(LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, True)


def test_missing_kv_heads_means_one_per_query_head() -> None:
    assert config_from_hf({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}).kv_heads == 8


@pytest.mark.parametrize("scaling", [
    {"type": "linear", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 1024},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
])  # fmt: skip
def test_old_and_new_spelling_of_rope_agree(scaling) -> None:
    old = config_from_hf(LLAMA | {"rope_theta": 2e4, "rope_scaling": scaling})
    new = {k: v for k, v in scaling.items() if k != "type"} | {"rope_theta": 2e4}
    new.setdefault("rope_type", scaling.get("type"))
    assert old == config_from_hf(LLAMA | {"rope_parameters": new})
    assert old.rope.kind == new["rope_type"] and old.rope.factor == scaling["factor"]


def test_yarn_extends_context_and_infers_temperature() -> None:
    """Qwen2.5's documentation adds YaRN and leaves max_position_embeddings at 32,768."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = config_from_hf(QWEN2 | {"rope_scaling": scaling})
    assert config.max_position == 131072
    assert config.rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert config_from_hf(QWEN2 | {"rope_scaling": scaling | {"attention_factor": 1.5}}).rope.attention_factor == 1.5


def test_end_tokens_of_both_files(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 5}))
    assert read_hf_config(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5, 9]}))
    assert read_hf_config(tmp_path).eos_token_ids == (5, 7, 9)


@pytest.mark.parametrize(("raw", "window"), [
    (MISTRAL | {"sliding_window": 1024}, 1024),
    ({k: v for k, v in MISTRAL.items() if k != "sliding_window"} | {"max_position_embeddings": 32768}, 4096),
    (QWEN2 | {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 1}, 512),
    (QWEN3 | {"use_sliding_window": True, "sliding_window": 256,
              "layer_types": ["full_attention", "sliding_attention"]}, 256),
])  # fmt: skip
def test_active_window_caps_the_context_and_says_so(raw, window, caplog) -> None:
    with caplog.at_level(logging.WARNING, "kvloom.model"):
        config = config_from_hf(raw)
    assert config.max_position == config.sliding_window == window
    assert "sliding-window" in caplog.text


@pytest.mark.parametrize("raw", [
    MISTRAL | {"sliding_window": None},
    QWEN2 | {"use_sliding_window": False, "sliding_window": 512},
    QWEN2 | {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 2},
])  # fmt: skip
def test_inactive_window_is_ignored(raw) -> None:
    config = config_from_hf(raw)
    assert config.sliding_window is None and config.max_position == raw["max_position_embeddings"]


@pytest.mark.parametrize(("change", "named"), [
    ({"architectures": ["Gemma2ForCausalLM"]}, "Gemma2ForCausalLM"),
    ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
    ({"architectures": None, "model_type": "mamba"}, "mamba"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
    ({"num_local_experts": 8}, "num_local_experts"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, "mrope"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "per layer type"),
    ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
    ({"num_key_value_heads": 3}, "8 query heads cannot share 3"),
    ({"head_dim": 7}, "head_dim"),
    ({"num_hidden_layers": 0}, "layers is 0"),
    ({"num_hidden_layers": 10**18}, "layers is 1000000000000000000"),
    ({"max_position_embeddings": 10**18}, "max_position is 1000000000000000000"),
    ({"rope_theta": float("nan")}, "rope_theta"),
    ({"rope_theta": 10**400}, "rope_theta"),
    ({"num_attention_heads": 0}, "q_heads is 0"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"vocab_size": True}, "vocab_size"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"eos_token_id": ["x"]}, "eos_token_id"),
    ({"rope_theta": -1.0}, "rope_theta"),
    ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "factor"),
    ({"rope_scaling": {"type": "linear"}}, "factor"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}}, "original_max"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}}, "high_freq"),
])  # fmt: skip
def test_refused_by_name(change, named) -> None:
    with pytest.raises(ModelError, match=named):
        config_from_hf(LLAMA | change)


def test_model_type_stands_in_for_missing_architectures() -> None:
    assert config_from_hf({k: v for k, v in LLAMA.items() if k != "architectures"}).architecture == "LlamaForCausalLM"


def test_code_in_the_folder_is_named_and_not_run(tmp_path, caplog) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"auto_map": {"AutoModel": "evil.Model"}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with caplog.at_level(logging.WARNING, "kvloom.model"):
        assert read_hf_config(tmp_path).layers == 2
    assert "not run" in caplog.text


@pytest.mark.parametrize(
    ("text", "named"), [(None, "does not exist"), ("{", "JSON"), ("[" * 100_000, "JSON"), ("[]", "list"), ("\xff", "JSON")]
)
def test_unreadable_config(tmp_path, text, named) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=named):
        read_hf_config(tmp_path)
