"""Settings: one tree of frozen dataclasses. A field's docstring is its CLI help, its name is its flag and its YAML key.

`settings.options` reads the docstrings, so that there is one place where a setting is described.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from kvloom.engine.errors import ConfigError
from kvloom.engine.settings.options import (
    Count,
    FilePath,
    JSONText,
    Milliseconds,
    Name,
    Names,
    Option,
    Part,
    Size,
    Tokens,
    json_object,
    option_fields,
    parse_value,
)

DType = Literal["bf16", "fp16", "fp32"]
WeightMode = Literal["auto", "bf16", "int8", "int4"]
Backend = Literal["auto", "native", "triton", "torch", "reference"]
DeviceName = Literal["auto", "cpu", "cuda"]
AttentionBackend = Literal["auto", "triton", "flashinfer", "flash_attn"]

SECRET_VARIABLE, LEAST_SECRET = "KVLOOM_HASH_SECRET", 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model, and how its weights are held."""

    model: str = "smollm2"
    """Built-in name, local folder (safetensors + tokenizer.json), .gguf file, or Hugging Face repo id."""
    served_model_name: Names = ()
    """Name in the API; the default is MODEL as given. Of several (repeat it, or separate by commas) requests may use each, and
    answers bear the first."""
    generation_config: Annotated[str, "auto|none|FILE"] = "auto"
    """What requests that do not say are sampled with: auto (what the model recommends: its generation_config.json, a GGUF's
    general.sampling, the built-in model's card), none (OpenAI's defaults), or a generation_config.json or its folder, whose
    max_new_tokens no answer exceeds."""
    override_generation_config: JSONText | None = None
    """JSON object on top of it: temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty,
    max_new_tokens (no answer exceeds it)."""
    chat_template: Annotated[str, "FILE"] | None = None
    """File with the Jinja chat template to use instead of the model's own, or the template itself."""
    replica: Name = "0"
    """Name of this engine where several serve the same: the label engine of /metrics, and whose its figures are."""
    dtype: DType = "bf16"
    """Compute and KV type: bf16, fp16 or fp32; also bfloat16, float16, half, float32, and auto (bf16)."""
    weights: WeightMode = "auto"
    """How linear layers are stored: bf16 (that is, dtype), int8, int4, or auto: the 4- or 8-bit codes of a GGUF as they are, 8
    bits for what is not stored so, and dtype where that is fp32 or the backend multiplies no codes."""
    max_model_len: Tokens | None = None
    """Longest prompt + output in tokens; the default is what the model was trained for, cut to what the cache holds. More
    only with a selection that goes beyond it: token_select with re-indexed positions."""
    backend: Backend = "auto"
    """Kernels: native (C++, for the CPU; $KVLOOM_NATIVE says which build), triton (for cuda), torch, reference, or auto (the
    first that works)."""
    attention_backend: AttentionBackend = "auto"
    """Who attends, on cuda, for rows that see everything: triton, or where it is installed flashinfer or flash_attn, beside the
    backend's own kernels for all other rows (not yet run on a GPU); also TRITON_ATTN, FLASHINFER, FLASH_ATTN. auto: the backend
    itself."""
    device: DeviceName = "auto"
    """Where weights and KV are, and steps are computed: cpu, cuda (not yet measured on a GPU), or auto: a GPU of compute
    capability 8.0 or more where torch can use one and the backend is not native, else the CPU."""
    enforce_eager: bool = False
    """Make every kernel call anew in every step: by default, steps are captured (on cuda in CUDA graphs, at start) and
    replayed."""
    threads: Count | None = None
    """Compute threads, 1 to 1024; the default is one per core this process may use, and no more than its control group's quota
    feeds."""

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ConfigError(f"threads is {self.threads}; allowed: 1 to 1024")
        if not all(self.served_model_name):
            raise ConfigError("served_model_name holds an empty name; give one or more names")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """The KV cache."""

    kv_memory: Size | None = None
    """Bytes for the KV cache (4GiB, 512MiB, ...); the default is a quarter of the memory that is free, at most 4 GiB, and on a
    GPU what gpu_memory_utilization leaves."""
    gpu_memory_utilization: Part | None = None
    """Part of a GPU's memory that may be taken, by weights, steps, the KV cache and by others, above 0 and up to 1: the KV
    cache gets what the rest leaves. The default is 0.92; kv_memory, where given, wins."""
    block_size: Tokens = 16
    """Tokens per block: a power of two from 1 to 256."""
    reuse: Name = "exact"
    """Where KV may come from unless a request says otherwise: off, exact (the same prefix), approx (KVShare: also segments of
    other prompts at any position, repaired)."""
    kvshare_options: JSONText | None = None
    """KVShare's own options as a JSON object, such as {"policy": "dhd", "ratio": 0.2}."""
    segment_memory: Size | None = None
    """Bytes for segments that KVShare reuses (1GiB, ...); the default is half of kv_memory. Taken only as they come."""
    hash_secret: Annotated[str, "TEXT"] | None = field(default=None, repr=False)
    """Secret of the hashes that prefixes are found by, 16 characters or more, the same for engines whose hashes must agree;
    @FILE reads it from a file, and where it is not given, $KVLOOM_HASH_SECRET is read. The default is drawn at every start."""

    def __post_init__(self) -> None:
        if self.block_size not in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            raise ConfigError(f"block_size is {self.block_size}; allowed: a power of two from 1 to 256")
        if self.kv_memory is not None and self.kv_memory <= 0:
            raise ConfigError(f"kv_memory is {self.kv_memory} bytes; allowed: more than 0")
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization is {self.gpu_memory_utilization}; allowed: above 0, up to 1")
        if self.segment_memory is not None and self.segment_memory < 0:
            raise ConfigError(f"segment_memory is {self.segment_memory} bytes; allowed: 0 or more")

    def secret(self) -> bytes | None:
        """`hash_secret` as a key, None to draw one. Raises ConfigError, which never quotes what was given."""
        given = os.environ.get(SECRET_VARIABLE) or None if self.hash_secret is None else self.hash_secret
        if given is None:
            return None
        text = given.strip()
        if text.startswith("@"):
            try:
                text = Path(text[1:]).read_text(encoding="utf-8").strip()
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or "it is no text"
                raise ConfigError(f"the file of hash_secret cannot be read: {reason}") from None
        if len(text) < LEAST_SECRET:
            raise ConfigError(f"hash_secret has {len(text)} characters; allowed: {LEAST_SECRET} or more")
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=32).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """Who runs next, and how much in a step."""

    scheduler: Name = "fcfs"
    """Order of waiting requests: fcfs (first come), priority (the request's priority, then first come), cache_aware (least
    work after cache hits first, ageing with the work that passes by). Under all three, tenants share by weight."""
    max_wait_ms: Milliseconds = 2000
    """With cache_aware: a request that has waited this long goes first, whatever work it is."""
    max_num_seqs: Count = 64
    """Most requests running at once."""
    max_batched_tokens: Tokens = 1024
    """Token budget of one step: decodes first, prompts in chunks with the rest."""
    step_time_ms: Milliseconds = 110
    """While answers are generated, a step takes about so long: prompts get what generating leaves of it, or as much as
    generating takes if that is more; 0 for as many rows as max_batched_tokens. Beside another tenant's answers they get a share
    of the time by weight."""
    async_scheduling: bool = True
    """On a GPU, launch a step before the tokens of the one in front are known, where it is certain what it computes: the host's
    work is done beside the device's. The same tokens either way."""
    max_queued_tokens: Tokens | None = None
    """Refuse new requests (429) while this many prompt tokens wait to be computed; the default is four times what the KV cache
    holds. A named tenant may fill its weight times what is left for others."""
    retention: Name = "everything"
    """What stays in memory: everything, razor (local heads keep sinks and a window alone)."""
    retention_options: JSONText | None = None
    """The retention's own options as a JSON object, such as {"induction_share": 0.3}."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_batched_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.max_wait_ms < 0:
            raise ConfigError(f"max_wait_ms is {self.max_wait_ms}; allowed: 0 (first come, first served) or more")
        if not 0 <= self.step_time_ms <= 60_000:
            raise ConfigError(f"step_time_ms is {self.step_time_ms}; allowed: 0 (no limit) to 60000")
        if self.max_queued_tokens is not None and self.max_queued_tokens < 1:
            raise ConfigError(f"max_queued_tokens is {self.max_queued_tokens}; allowed: 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantOptions:
    """Tenants: who shares the engine."""

    tenants: FilePath | None = None
    """YAML file with the weight, quotas, group and API keys of each tenant; the default is equal weights, no quotas."""
    tenant_replicas: Annotated[int, "N"] = 1
    """Engines that serve the same tenants, 1 to 4096: quotas are for all of them together, and each allows its part. Set by
    --replicas."""

    def __post_init__(self) -> None:
        if not 1 <= self.tenant_replicas <= 4096:
            raise ConfigError(f"tenant_replicas is {self.tenant_replicas}; allowed: 1 to 4096")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionOptions:
    """What a decode step reads, unless a request says otherwise."""

    selection: Name = "dense"
    """Method: dense, sink_window, token_select, tidal_decode, recycled, razor_view."""
    budget: Tokens | None = None
    """Positions that a sparse decode row reads, sinks and recent tokens included; the default is the method's own."""
    selection_options: JSONText | None = None
    """The method's own options as a JSON object, such as {"sinks": 8}."""
    draft: bool = False
    """Use the method only to draft tokens that a dense step verifies: output as if dense."""
    draft_tokens: Tokens = 4
    """Tokens per draft, 1 to 16."""
    selection_memory: Size | None = None
    """Bytes for what methods remember of running requests (64MiB, ...), all together; a request whose state does not fit waits.
    The default is an eighth of kv_memory, at least 1 MiB. Taken only as they come, beside kv_memory."""
    shadow_interval: Annotated[int, "STEPS"] = 256
    """Measure covered attention mass against a dense pass once in so many sparse steps; 0 for never."""

    def __post_init__(self) -> None:
        if self.shadow_interval < 0:
            raise ConfigError(f"shadow_interval is {self.shadow_interval}; allowed: 0 or more")
        if self.selection_memory is not None and self.selection_memory < 0:
            raise ConfigError(f"selection_memory is {self.selection_memory} bytes; allowed: 0 or more")
        self.options()

    def options(self) -> dict[str, Any]:
        """`selection_options`, read. Raises ConfigError if it is no JSON object."""
        return json_object("selection_options", self.selection_options, '{"sinks": 8}')


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOptions:
    """Structured output: what schemas and grammars may take."""

    max_grammar_size: Annotated[int, "CHARACTERS"] = 512 * 1024
    """Longest JSON schema, regular expression, grammar or list of choices, 1024 to 16777216."""
    grammar_compile_seconds: Annotated[float, "SECONDS"] = 30.0
    """How long one may take to be compiled, waiting for others included, 0.1 to 600; then it is refused."""
    grammar_cache_entries: Count = 256
    """Compiled ones that are kept, those used last, 1 to 65536."""
    grammar_cache_size: Annotated[int, "CHARACTERS"] = 8 * 1024**2
    """What they were compiled from, all together, 0 to 1073741824."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_grammar_size", 1024, 16 * 1024**2),
            ("grammar_compile_seconds", 0.1, 600),
            ("grammar_cache_entries", 1, 65536),
            ("grammar_cache_size", 0, 1024**3),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed: {low} to {high}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything the engine needs to know."""

    model: ModelOptions = field(default_factory=ModelOptions)
    """The model."""
    cache: CacheOptions = field(default_factory=CacheOptions)
    """The KV cache."""
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    """Scheduling."""
    tenants: TenantOptions = field(default_factory=TenantOptions)
    """Tenants."""
    selection: SelectionOptions = field(default_factory=SelectionOptions)
    """Selection."""
    structured: StructuredOptions = field(default_factory=StructuredOptions)
    """Structured output."""

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> EngineConfig:
        """Make a tree from one flat mapping (`LLM(**config)`, the CLI, a YAML file).

        Raises ConfigError naming an unknown key, the nearest known one, or a value that cannot be read.
        """
        known = {
            f.name: (section.name, f) for section in dataclasses.fields(cls) for f in option_fields(_section(section.name))
        }
        parts: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            if key not in known:
                raise ConfigError(f"unknown setting {key!r}; known: {', '.join(sorted(known))}")
            section, option = known[key]
            parts.setdefault(section, {})[key] = parse_value(option, value)
        return cls(**{name: _section(name)(**part) for name, part in parts.items()})

    def changed(self) -> dict[str, Any]:
        """Settings that are not at their default, by flat name: what a server says of itself, without the model's name."""
        sections = [getattr(self, f.name) for f in dataclasses.fields(self)]
        return {
            option.name: getattr(section, option.name)
            for section in sections
            for option in option_fields(section.__class__)
            if option.name not in _NAMES and not option.secret and getattr(section, option.name) != option.default
        }


_NAMES = ("model", "served_model_name")


@functools.cache
def _section(name: str) -> type:
    section: type = get_type_hints(EngineConfig)[name]
    return section


def all_options() -> Iterator[tuple[str, Option]]:
    """Every engine setting with the docstring of its section, in order."""
    for section in dataclasses.fields(EngineConfig):
        cls = _section(section.name)
        for option in option_fields(cls):
            yield inspect.cleandoc(cls.__doc__ or ""), option
