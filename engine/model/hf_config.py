"""ModelConfig from a Hugging Face folder: config.json and generation_config.json.

Reads both spellings of rotary settings (rope_theta + rope_scaling, and rope_parameters of transformers 5). Refuses by name
whatever would change the computation and is not implemented. Reads JSON only: code in a model folder is never run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kvloom.engine.errors import ModelError
from kvloom.engine.model.config import ModelConfig, cap_to_window, log
from kvloom.engine.model.rope import RopeConfig, yarn_attention_factor


class _Family(NamedTuple):
    """What an architecture fixes, and transformers' defaults for what its config.json may leave out."""

    model_type: str
    max_position: int
    head_dim: int | None = None
    qkv_bias: bool = False
    attention_bias_key: bool = False
    """config.json may switch biases of all four attention projections on."""
    mlp_bias_key: bool = False
    qk_norm: bool = False


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama", 2048, attention_bias_key=True, mlp_bias_key=True),
    "MistralForCausalLM": _Family("mistral", 131072),
    "Qwen2ForCausalLM": _Family("qwen2", 32768, qkv_bias=True),
    "Qwen3ForCausalLM": _Family("qwen3", 32768, head_dim=128, attention_bias_key=True, qk_norm=True),
}

# Settings of relatives that change the computation: value under which each is harmless.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "quantization_config": (None,),
    "hidden_act": ("silu", "swish"),
}


def read_hf_config(folder: Path) -> ModelConfig:
    """The config of a model folder. Raises ModelError if it is absent, unreadable or unsupported."""
    raw = _read_json(folder / "config.json")
    extra = _read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
    return config_from_hf(raw, extra)


def config_from_hf(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """raw, generation: the parsed config.json and generation_config.json. Raises ModelError naming what is unsupported."""
    architecture = _architecture(raw)
    family = _FAMILIES[architecture]
    _refuse_unsupported(raw, architecture)
    heads = _integer(raw, "num_attention_heads")
    hidden = _integer(raw, "hidden_size")
    head_dim = _integer(raw, "head_dim", family.head_dim or hidden // max(heads, 1))
    rope, context = _rope(raw, head_dim, _integer(raw, "max_position_embeddings", family.max_position))
    window = _sliding_window(raw, family)
    attention_bias = family.attention_bias_key and bool(raw.get("attention_bias", False))
    return ModelConfig(
        architecture=architecture,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "unknown"),
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=hidden,
        layers=_integer(raw, "num_hidden_layers"),
        q_heads=heads,
        kv_heads=_integer(raw, "num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=_integer(raw, "intermediate_size"),
        rms_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope=rope,
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family.mlp_bias_key and bool(raw.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        max_position=cap_to_window(context, window),
        sliding_window=window,
        eos_token_ids=_eos(raw, generation or {}),
        bos_token_id=_integer(raw, "bos_token_id") if raw.get("bos_token_id") is not None else None,
    )


def _architecture(raw: Mapping[str, Any]) -> str:
    given = raw.get("architectures")
    if isinstance(given, list) and given:
        architecture = str(given[0])
    else:
        by_type = {family.model_type: name for name, family in _FAMILIES.items()}
        architecture = by_type.get(str(raw.get("model_type")), str(raw.get("model_type")))
    if architecture not in _FAMILIES:
        raise ModelError(f"architecture {architecture} is not supported; supported: {', '.join(_FAMILIES)}")
    if raw.get("auto_map"):
        log.warning(
            "config.json names code of its own (auto_map); it is not run, the model is read as a plain %s", architecture
        )
    return architecture


def _refuse_unsupported(raw: Mapping[str, Any], architecture: str) -> None:
    for key, neutral in _NEUTRAL.items():
        if key in raw and raw[key] not in neutral:
            value = raw[key]
            if key == "quantization_config" and isinstance(value, dict):
                value = value.get("quant_method", value)
            raise ModelError(
                f"config.json sets {key} to {value!r}, which is not supported for {architecture}; "
                f"use a checkpoint without it" + (" (plain bf16 or fp16 weights, or GGUF)" if "quant" in key else "")
            )


def _sliding_window(raw: Mapping[str, Any], family: _Family) -> int | None:
    """The window if any layer uses one. Qwen switches it on explicitly, Mistral by giving (or leaving out) a number."""
    types = raw.get("layer_types")
    if isinstance(types, list) and (unknown := {*map(str, types)} - {"full_attention", "sliding_attention"}):
        raise ModelError(
            f"layers of type {', '.join(sorted(unknown))} are not supported; supported: full and sliding attention"
        )
    if family.model_type == "mistral":
        active = raw.get("sliding_window", 4096) is not None
    elif family.model_type == "llama":
        active = isinstance(types, list) and "sliding_attention" in types
    else:
        layers = _integer(raw, "num_hidden_layers")
        windowed = "sliding_attention" in types if isinstance(types, list) else _integer(raw, "max_window_layers", 28) < layers
        active = bool(raw.get("use_sliding_window", False)) and windowed
    return _integer(raw, "sliding_window", 4096) if active else None


def _rope(raw: Mapping[str, Any], head_dim: int, context: int) -> tuple[RopeConfig, int]:
    """Rotary settings and the context they give."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise ModelError(f"rotary settings per layer type are not supported: {given!r}; supported: one set for all layers")
    _refuse_unsupported({k: v for k, v in given.items() if k == "partial_rotary_factor"}, "rotary settings")
    theta = _number(given, "rope_theta", _number(raw, "rope_theta", 10_000.0))
    kind = str(given.get("rope_type") or given.get("type") or "default")
    if kind == "default":
        return RopeConfig(dim=head_dim, theta=theta), context
    if kind == "linear":
        return RopeConfig(dim=head_dim, theta=theta, kind="linear", factor=_number(given, "factor")), context
    original = _integer(raw, "original_max_position_embeddings", _integer(given, "original_max_position_embeddings", context))
    if kind == "llama3":
        rope = RopeConfig(
            dim=head_dim,
            theta=theta,
            kind="llama3",
            factor=_number(given, "factor"),
            original_max_position=original,
            low_freq_factor=_number(given, "low_freq_factor"),
            high_freq_factor=_number(given, "high_freq_factor"),
        )
        return rope, context
    if kind == "yarn":
        return _yarn(given, head_dim, theta, original, context)
    raise ModelError(f"rope type {kind!r} is not supported; supported: default, linear, llama3, yarn")


def _yarn(given: Mapping[str, Any], head_dim: int, theta: float, original: int, context: int) -> tuple[RopeConfig, int]:
    """YaRN as transformers reads it. Configs often leave max_position_embeddings at the pretraining context; the extended
    one is original * factor."""
    factor = _number(given, "factor", context / max(original, 1))
    temperature = given.get("attention_factor")
    if temperature is None:
        mscale, all_dim = (_number(given, k, 0.0) or None for k in ("mscale", "mscale_all_dim"))
        temperature = yarn_attention_factor(factor, mscale, all_dim)
    rope = RopeConfig(
        dim=head_dim,
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=_number(given, "beta_fast", 0.0) or 32.0,
        beta_slow=_number(given, "beta_slow", 0.0) or 1.0,
        truncate=bool(given.get("truncate", True)),
        attention_factor=float(temperature),
    )
    explicit = given.get("original_max_position_embeddings") is not None
    return rope, max(context, int(original * factor)) if explicit else context


def _eos(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """End tokens of both files in order, without repeats: chat models often complete the list in generation_config.json."""
    found: dict[int, None] = {}
    for source in (raw, generation):
        given = source.get("eos_token_id")
        for token in given if isinstance(given, list) else [given]:
            if token is not None:
                found[_integer({"eos_token_id": token}, "eos_token_id")] = None
    return tuple(found)


def _integer(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelError(f"config.json: {key} is {value!r}; a whole number is needed")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e300 < value < 1e300:
        raise ModelError(f"config.json: {key} is {value!r}; a finite number is needed")
    return float(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; a model folder holds config.json, *.safetensors and tokenizer.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}; a JSON object is needed")
    return value
