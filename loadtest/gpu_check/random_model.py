"""An engine around a model of random weights, put together without files: token ids in, token ids out."""

from __future__ import annotations

import torch

from kvloom.engine.cache import CacheManager, GroupSpec, Storage
from kvloom.engine.cache.prefix import DomainFactory
from kvloom.engine.calibration import RazorCalibration
from kvloom.engine.config import EngineConfig
from kvloom.engine.core import EngineCore
from kvloom.engine.model.config import ModelConfig
from kvloom.engine.model.decoder import Decoder, Layer
from kvloom.engine.model.linear import DenseLinear, Linear
from kvloom.engine.model.quantized import DenseEmbedding, QuantizedLinear, round_to_int8
from kvloom.engine.model.rope import RopeConfig, rotary_table
from kvloom.engine.requests.state import StateMemory
from kvloom.engine.requests.tenants import Tenants
from kvloom.engine.scheduling.limits import Limits
from kvloom.engine.selection import Geometry
from kvloom.engine.selection.policies import Defaults, Selectors
from kvloom.engine.startup.assemble import assemble
from kvloom.engine.startup.memory import STATE_PART
from kvloom.engine.step.runner import Runner
from kvloom.engine.text import Tokenizer
from kvloom.kernels import Kernels
from kvloom.loadtest.bench.roofline import Shape

BLOCK = 16


class NoText(Tokenizer):
    """A vocabulary whose tokens are no text."""

    def __init__(self) -> None:
        """Of any size: it is never asked."""

    @property
    def strips_first_space(self) -> bool:
        return False

    def token_bytes(self, token: int) -> bytes:
        return b""

    def is_special(self, token: int) -> bool:
        return False


def calibration(shape: Shape) -> RazorCalibration:
    """Retrieval heads for RazorAttention, a third of all: no model of random weights has any of its own."""
    scores = tuple(tuple(float((layer + head) % 3 == 0) for head in range(shape.kv_heads)) for layer in range(shape.layers))
    return RazorCalibration(model_key="random", model="random", induction=scores, echo=scores)


def model(shape: Shape, length: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM", dtype="random", vocab_size=shape.vocab, hidden_size=shape.hidden, layers=shape.layers,
        q_heads=shape.q_heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim, intermediate_size=shape.intermediate,
        rms_eps=1e-5, rope=RopeConfig(dim=shape.head_dim, theta=500_000.0), tied_embeddings=False, max_position=length,
    )  # fmt: skip


def decoder(shape: Shape, length: int, kernels: Kernels, device: torch.device, dtype: torch.dtype, bits: int = 16) -> Decoder:
    """Weights drawn where they stay, the same for the same device. bits: 16 for `dtype`, or 8."""
    source, config = torch.Generator(device).manual_seed(0), model(shape, length)

    def drawn(outputs: int, inputs: int) -> torch.Tensor:
        made = torch.empty(outputs, inputs, dtype=dtype, device=device)
        return made.normal_(0.0, inputs**-0.5, generator=source)

    def linear(name: str) -> Linear:
        inputs, outputs = shape.linears()[name]
        weight = drawn(outputs, inputs)
        if bits == 16:
            return DenseLinear(weight)
        quantized = kernels.quantized
        assert quantized is not None
        return QuantizedLinear(quantized, quantized.pack(round_to_int8(weight)))

    ones = torch.ones(shape.hidden, device=device)
    layers = [
        Layer(input_norm=ones, qkv=linear("qkv"), q_norm=None, k_norm=None, o=linear("o"), mlp_norm=ones,
              gate_up=linear("gate_up"), down=linear("down"))
        for _ in range(shape.layers)
    ]  # fmt: skip
    embedding = DenseEmbedding(drawn(shape.vocab, shape.hidden))
    return Decoder(config, dtype, kernels, embedding=embedding, layers=layers, final_norm=ones, head=linear("head"))


def engine(made: Decoder, shape: Shape, length: int, tokens: int, seqs: int) -> EngineCore:
    """An engine with room for so many tokens of so many requests of up to `length`. RazorAttention finds a calibration only
    where `find_razor` is made to give `calibration`."""
    kernels, device = made.kernels, made.device
    config = EngineConfig.from_flat({"max_num_seqs": seqs, "max_batched_tokens": max(1024, 2 * seqs), "step_time_ms": 0})
    spec = GroupSpec.everything(shape.layers, shape.kv_heads)
    cache = CacheManager(Storage(spec, -(-tokens // BLOCK) + 2 * seqs, BLOCK, shape.head_dim, made.dtype, device))
    made.rotary = rotary_table(made.config.rope, length, device)
    geometry = Geometry(
        layers=shape.layers, q_heads=shape.q_heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim, max_len=length,
        trained_len=length, inv_freq=made.rotary.inv_freq, model_key="random", block_size=BLOCK, heads=spec.heads,
    )  # fmt: skip
    states = StateMemory(cache.bytes // STATE_PART, None, device)
    rows = config.scheduler.max_batched_tokens
    runner = Runner(made, cache, kernels, geometry, states, max_rows=rows, max_seqs=seqs)
    return assemble(
        config, runner, cache, states, kernels, Selectors(Defaults(), geometry, kernels, rows - seqs), NoText(),
        DomainFactory("random"), Tenants(), Limits(length, length, shape.vocab), frozenset(), None, None,
    )  # fmt: skip
