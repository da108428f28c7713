"""ModelConfig from a Hugging Face folder: config.json and generation_config.json.

Reads both spellings of rotary settings (rope_theta + rope_scaling, and rope_parameters of transformers 5); where both stand,
rope_scaling counts, as in transformers. Refuses by name whatever would change the computation and is not implemented. Reads
JSON only: code in a model folder is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kvloom.engine.errors import ModelError
from kvloom.engine.model.config import ModelConfig, cap_to_window, log
from kvloom.engine.model.files import Fields, read_json, read_json_if_there, shown
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
    path = folder / "config.json"
    if not path.exists():
        raise ModelError(f"{path} does not exist; a model folder holds config.json, *.safetensors and tokenizer.json")
    return config_from_hf(read_json(path), read_json_if_there(folder / "generation_config.json"))


def config_from_hf(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """raw, generation: the parsed config.json and generation_config.json. Raises ModelError naming what is unsupported."""
    given, architecture = Fields(raw, "config.json: "), _architecture(raw)
    family = _FAMILIES[architecture]
    _refuse_unsupported(raw, architecture)
    heads = given.integer("num_attention_heads")
    hidden = given.integer("hidden_size")
    head_dim = given.integer("head_dim", family.head_dim or hidden // max(heads, 1))
    rope, context = _rope(raw, head_dim, given.integer("max_position_embeddings", family.max_position))
    window = _sliding_window(given, family)
    attention_bias = family.attention_bias_key and given.flag("attention_bias")
    return ModelConfig(
        architecture=architecture,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "unknown"),
        vocab_size=given.integer("vocab_size"),
        hidden_size=hidden,
        layers=given.integer("num_hidden_layers"),
        q_heads=heads,
        kv_heads=given.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=given.integer("intermediate_size"),
        rms_eps=given.number("rms_norm_eps", 1e-6),
        rope=rope,
        tied_embeddings=given.flag("tie_word_embeddings"),
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family.mlp_bias_key and given.flag("mlp_bias"),
        qk_norm=family.qk_norm,
        max_position=cap_to_window(context, window),
        sliding_window=window,
        eos_token_ids=_eos(given, Fields(generation or {}, "generation_config.json: ")),
        bos_token_id=given.integer_or_none("bos_token_id"),
    )


def _architecture(raw: Mapping[str, Any]) -> str:
    given = raw.get("architectures")
    if isinstance(given, list) and given:
        architecture = str(given[0])
    else:
        by_type = {family.model_type: name for name, family in _FAMILIES.items()}
        architecture = by_type.get(str(raw.get("model_type")), str(raw.get("model_type")))
    if architecture not in _FAMILIES:
        raise ModelError(f"architecture {shown(architecture)} is not supported; supported: {', '.join(_FAMILIES)}")
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
                f"config.json sets {key} to {shown(value)}, which is not supported for {architecture}; "
                f"use a checkpoint without it" + (" (plain bf16 or fp16 weights, or GGUF)" if "quant" in key else "")
            )


def _sliding_window(given: Fields, family: _Family) -> int | None:
    """The window if any layer uses one. Qwen switches it on explicitly, Mistral by giving (or leaving out) a number."""
    types = given.array("layer_types", str)
    if unknown := {*(types or ())} - {"full_attention", "sliding_attention"}:
        raise ModelError(
            f"layers of type {', '.join(sorted(unknown))} are not supported; supported: full and sliding attention"
        )
    if family.model_type == "mistral":
        active = not given.is_null("sliding_window")
    elif family.model_type == "llama":
        active = "sliding_attention" in (types or ())
    else:
        layers = given.integer("num_hidden_layers")
        windowed = given.integer("max_window_layers", 28) < layers if types is None else "sliding_attention" in types
        active = given.flag("use_sliding_window") and windowed
    return given.integer("sliding_window", 4096) if active else None


def _rope_settings(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary settings that count, of one or two spellings."""
    scaling, parameters = raw.get("rope_scaling"), raw.get("rope_parameters")
    if scaling and parameters and scaling != parameters:
        log.warning(
            "config.json gives both rope_scaling and rope_parameters; rope_scaling counts, as in transformers: %s",
            shown(scaling),
        )
    given = scaling or parameters or {}
    nested = isinstance(given, dict) and any(isinstance(v, dict) or k.endswith("_attention") for k, v in given.items())
    if not isinstance(given, dict) or nested:
        raise ModelError(f"rotary settings per layer type are not supported: {shown(given)}; supported: one set for all layers")
    return given


def _rope(raw: Mapping[str, Any], head_dim: int, context: int) -> tuple[RopeConfig, int]:
    """Rotary settings and the context they give."""
    settings, outer = _rope_settings(raw), Fields(raw, "config.json: ")
    _refuse_unsupported({k: v for k, v in settings.items() if k == "partial_rotary_factor"}, "rotary settings")
    given = Fields(settings, "config.json: rotary settings: ")
    theta = given.number("rope_theta", outer.number("rope_theta", 10_000.0))
    kind = str(given.get("rope_type") or given.get("type") or "default")
    if kind == "default":
        return RopeConfig(dim=head_dim, theta=theta), context
    if kind == "linear":
        return RopeConfig(dim=head_dim, theta=theta, kind="linear", factor=given.number("factor")), context
    stated = outer.integer_or_none("original_max_position_embeddings") or given.integer_or_none(
        "original_max_position_embeddings"
    )
    if kind == "llama3":
        rope = RopeConfig(
            dim=head_dim,
            theta=theta,
            kind="llama3",
            factor=given.number("factor"),
            original_max_position=context if stated is None else stated,
            low_freq_factor=given.number("low_freq_factor"),
            high_freq_factor=given.number("high_freq_factor"),
        )
        return rope, context
    if kind == "yarn":
        return _yarn(given, head_dim, theta, stated, context)
    raise ModelError(f"rope type {shown(kind)} is not supported; supported: default, linear, llama3, yarn")


def _yarn(given: Fields, head_dim: int, theta: float, stated: int | None, context: int) -> tuple[RopeConfig, int]:
    """YaRN as transformers reads it. Configs often leave max_position_embeddings at the pretraining context (`stated`); the
    extended one is that times the factor."""
    original = context if stated is None else stated
    factor = given.number("factor", context / max(original, 1))
    mscale, all_dim = (given.number(name, 0.0) or None for name in ("mscale", "mscale_all_dim"))
    rope = RopeConfig(
        dim=head_dim,
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=given.number("beta_fast", 0.0) or 32.0,
        beta_slow=given.number("beta_slow", 0.0) or 1.0,
        truncate=given.flag("truncate", True),
        attention_factor=given.number("attention_factor", yarn_attention_factor(factor, mscale, all_dim)),
    )
    return rope, context if stated is None else max(context, int(original * factor))


def _eos(*sources: Fields) -> tuple[int, ...]:
    """End tokens of both files in order, without repeats: chat models often complete the list in generation_config.json."""
    return tuple(dict.fromkeys(token for source in sources for token in source.integers("eos_token_id")))
