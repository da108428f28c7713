"""ModelConfig: the shape of a Llama-family model, whatever file it came from.

`hf_config` makes one from config.json, `gguf_config` from GGUF metadata; nothing else knows either format. A config that was
made has passed `__post_init__`, so the decoder need not check again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from kvloom.engine.errors import ModelError
from kvloom.engine.model.rope import RopeConfig

log = logging.getLogger("kvloom.model")

_MOST = {"layers": 1024, "max_position": 1 << 24}  # beyond any model; a damaged config must not make a table of 10^18 rows


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A pre-norm decoder with RMS norm, rotary attention with grouped KV heads, and a gated SiLU MLP."""

    architecture: str
    """Hugging Face class name, for instance LlamaForCausalLM."""
    dtype: str
    """Type of the checkpoint's weights, for instance bfloat16 or Q4_1. For information."""
    vocab_size: int
    hidden_size: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    """Independent of hidden_size / q_heads."""
    intermediate_size: int
    rms_eps: float
    rope: RopeConfig
    tied_embeddings: bool
    """The output projection is the embedding table."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm over each query and key head before rotation (Qwen3)."""
    max_position: int
    """Positions the model may use: [0, max_position). Already cut to the sliding window, if there is one."""
    sliding_window: int | None = None
    """Window of the layers that have one; within max_position it never hides anything."""
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "layers",
            "q_heads",
            "kv_heads",
            "head_dim",
            "intermediate_size",
            "max_position",
        ):
            value, most = getattr(self, name), _MOST.get(name, 1 << 31)
            if not 1 <= value <= most:
                raise ModelError(f"the model's {name} is {value}; allowed: 1 to {most}")
        if not 0 < self.rms_eps < 1:
            raise ModelError(f"the model's rms_norm_eps is {self.rms_eps}; allowed: above 0 and below 1")
        if self.q_heads % self.kv_heads:
            raise ModelError(f"{self.q_heads} query heads cannot share {self.kv_heads} KV heads; allowed: a multiple")

    @property
    def q_size(self) -> int:
        """Columns of all query heads."""
        return self.q_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of all KV heads of K, or of V."""
        return self.kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Columns of the fused projection: q, then k, then v."""
        return self.q_size + 2 * self.kv_size


def cap_to_window(max_position: int, window: int | None) -> int:
    """Context within which sliding-window layers equal full attention: a window of w sees the last w positions.

    Layers with a window are served as full attention, which is exact up to the window and wrong beyond it.
    """
    if window is not None and window < 1:
        raise ModelError(f"the model's sliding window is {window}; allowed: 1 or more")
    if window is None or window >= max_position:
        return max_position
    log.warning("the model has sliding-window layers: context is limited to the window, %d of %d tokens", window, max_position)
    return window
