"""ModelConfig from GGUF metadata (llama, qwen2 and qwen3; Mistral and SmolLM files call themselves llama).

GGUF says less than config.json: biases, QK norm and tied embeddings are read off the tensor directory, end tokens off the
tokenizer's metadata, Llama 3.1's frequency scaling off the tensor rope_freqs.weight. Refuses by name what is not supported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from kvloom.engine.errors import ModelError
from kvloom.engine.model.config import ModelConfig, cap_to_window
from kvloom.engine.model.files import Fields, shown
from kvloom.engine.model.gguf_file import GGUFFile, GGUFTensor
from kvloom.engine.model.rope import RopeConfig, yarn_attention_factor

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Present and not harmless: the model computes something else.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.clamp_kqv": (0.0,),
    "attention.scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}


def config_from_gguf(file: GGUFFile, divisors: tuple[float, ...] | None = None) -> ModelConfig:
    """divisors: the tensor rope_freqs.weight, if the file has one.

    Raises ModelError naming what is missing or unsupported.
    """
    architecture, tensors = _architecture(file.metadata), file.tensors
    given = Fields(file.metadata, "", f"{architecture}.")
    _refuse_unsupported(given)
    hidden, q_heads = given.integer("embedding_length"), given.integer("attention.head_count")
    head_dim = given.integer("attention.key_length", hidden // max(q_heads, 1))
    if given.integer("attention.value_length", head_dim) != head_dim:
        raise ModelError(f"{file.path}: heads of different size for keys and values are not supported")
    window = given.integer("attention.sliding_window", 0) or None
    return ModelConfig(
        architecture=ARCHITECTURES[architecture],
        dtype=_common_kind(tensors),
        vocab_size=_vocabulary(file),
        hidden_size=hidden,
        layers=given.integer("block_count"),
        q_heads=q_heads,
        kv_heads=given.integer("attention.head_count_kv", q_heads),
        head_dim=head_dim,
        intermediate_size=given.integer("feed_forward_length"),
        rms_eps=given.number("attention.layer_norm_rms_epsilon", 1e-6),
        rope=_rope(given, head_dim, divisors),
        tied_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        max_position=cap_to_window(given.integer("context_length"), window),
        sliding_window=window,
        eos_token_ids=_eos(Fields(file.metadata, "", "tokenizer.ggml.")),
        bos_token_id=Fields(file.metadata, "").integer_or_none("tokenizer.ggml.bos_token_id"),
    )


def _architecture(metadata: Mapping[str, Any]) -> str:
    found = metadata.get("general.architecture")
    if not isinstance(found, str) or found not in ARCHITECTURES:
        raise ModelError(f"the architecture is {shown(found)}; supported: {', '.join(ARCHITECTURES)}")
    return found


def _refuse_unsupported(given: Fields) -> None:
    for key, neutral in _NEUTRAL.items():
        value = given.get(key)
        if value is not None and value not in neutral:
            raise ModelError(f"{key} is {shown(value)}, which is not supported; supported: {neutral[0]}")


def _rope(given: Fields, head_dim: int, divisors: tuple[float, ...] | None) -> RopeConfig:
    rotary = given.integer("rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise ModelError(f"partial rotary embedding ({rotary} of {head_dim} dimensions) is not supported")
    theta = given.number("rope.freq_base", 10_000.0)
    kind = given.get("rope.scaling.type", "none")
    if kind == "none":
        factor = given.number("rope.scale_linear", 1.0)  # spelling of files from 2023
        kind = "none" if factor == 1.0 else "linear"
    else:
        factor = given.number("rope.scaling.factor", 1.0)
    if kind == "none":
        return RopeConfig(dim=head_dim, theta=theta, divisors=divisors)
    if kind == "linear":
        return RopeConfig(dim=head_dim, theta=theta, kind="linear", factor=factor, divisors=divisors)
    if kind == "yarn":
        return _yarn(given, head_dim, theta, factor, divisors)
    raise ModelError(f"rope scaling type {shown(kind)} is not supported; supported: none, linear, yarn")


def _yarn(given: Fields, head_dim: int, theta: float, factor: float, divisors: tuple[float, ...] | None) -> RopeConfig:
    """llama.cpp's reading: the stated temperature multiplies the one inferred from the factor."""
    stated = given.number("rope.scaling.attn_factor", given.number("rope.scaling.yarn_attn_factor", 1.0))
    return RopeConfig(
        dim=head_dim,
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_position=given.integer("rope.scaling.original_context_length", given.integer("context_length")),
        beta_fast=given.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=given.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=stated * yarn_attention_factor(factor),
        divisors=divisors,
    )


def _vocabulary(file: GGUFFile) -> int:
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise ModelError(f"{file.path} has no tensor token_embd.weight; is it a language model?")
    return table.shape[0]


def _common_kind(tensors: Mapping[str, GGUFTensor]) -> str:
    """The type that most matrices have."""
    kinds = Counter(tensor.kind.name for tensor in tensors.values() if len(tensor.shape) > 1)
    return kinds.most_common(1)[0][0] if kinds else "unknown"


def _eos(given: Fields) -> tuple[int, ...]:
    """End of sequence, of turn and of message, in that order and without repeats."""
    ids = (given.integer_or_none(f"{name}_token_id") for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(i for i in ids if i is not None))
