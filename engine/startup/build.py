"""From settings to a ready engine: find the model, load it, size the cache, put the parts together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from kvloom import kernels
from kvloom.engine.cache import CacheManager, GroupSpec
from kvloom.engine.cache.prefix import DomainFactory
from kvloom.engine.client import ModelInfo
from kvloom.engine.config import EngineConfig
from kvloom.engine.core import EngineCore
from kvloom.engine.device import Placement, settle
from kvloom.engine.errors import ConfigError
from kvloom.engine.model.config import ModelConfig
from kvloom.engine.model.heads import Heads
from kvloom.engine.model.linear import quantizes
from kvloom.engine.model.load import TORCH_DTYPES, LoadedModel, load_model
from kvloom.engine.model.rope import rotary_table
from kvloom.engine.requests.request import KVOptions
from kvloom.engine.requests.tenants import Tenants
from kvloom.engine.retention import RETENTIONS, Retention
from kvloom.engine.reuse import REUSE
from kvloom.engine.reuse.kvshare.options import ShareOptions
from kvloom.engine.reuse.kvshare.segments import SegmentStore
from kvloom.engine.reuse.kvshare.share import KVShare
from kvloom.engine.reuse.kvshare.sink import PROSE
from kvloom.engine.scheduling import ORDERS
from kvloom.engine.scheduling.limits import Limits
from kvloom.engine.selection import SELECTIONS, Geometry
from kvloom.engine.selection.base import extrapolates
from kvloom.engine.selection.policies import Defaults, Selectors
from kvloom.engine.startup.assemble import assemble
from kvloom.engine.startup.available import size
from kvloom.engine.startup.catalog import ModelFiles, packed_folder, resolve
from kvloom.engine.startup.gpu_memory import SMALLER_STEPS, fewer_bits, fitting
from kvloom.engine.startup.prepare import Prepared, read_template
from kvloom.engine.startup.processors import processors
from kvloom.engine.startup.recommended import sampling_defaults
from kvloom.engine.startup.sizing import make_cache, make_states, segment_bound, share_options
from kvloom.engine.step.runner import Runner
from kvloom.engine.text import Tokenizer, check_vocabulary, end_tokens
from kvloom.kernels.dense import Beside, beside
from kvloom.kernels.interface import Kernels, Rows

log = logging.getLogger("kvloom.engine")

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) while something takes time."""


class Built(NamedTuple):
    """A loaded engine that nobody drives yet."""

    core: EngineCore
    model: ModelInfo
    tokenizer: Tokenizer


def build(config: EngineConfig, progress: Progress | None = None, prepared: Prepared | None = None) -> Built:
    """Load the model and make an engine of it. prepared: what was begun of it already.

    Raises ModelError, ModelNotFoundError or ConfigError.
    """
    _check_names(config)
    placement = _placement(config)
    with fitting(placement.device, "what steps work in", lambda: SMALLER_STEPS):
        return _build(config, placement, progress, prepared)


def _build(config: EngineConfig, placement: Placement, progress: Progress | None, prepared: Prepared | None) -> Built:
    """Raises torch.OutOfMemoryError where a device's memory runs out after the weights are there."""
    tenants = Tenants.read(config.tenants.tenants).divided(config.tenants.tenant_replicas)
    secret = config.cache.secret()
    progress = progress or (lambda stage, done, total: None)
    threads = config.model.threads or processors().threads
    torch.set_num_threads(threads)
    if prepared is None:
        found = resolve(config.model.model, progress)
        prepared = Prepared(lambda: found, read_template(config.model.chat_template))
    files, device = prepared.files, placement.device
    dtype = TORCH_DTYPES[config.model.dtype]
    own = _backend(config.model.backend, device, threads, progress)
    backend = _attention(config.model.attention_backend, own, device, dtype)
    codes = backend.quantized is not None
    with fitting(device, "the weights", lambda: fewer_bits(files.path, dtype, codes)):
        loaded, retention = _load(config, files, prepared, backend, device, progress)
    if quantizes(config.model.weights, loaded.decoder.dtype, backend):
        torch.set_num_threads(1)  # what a step leaves to torch is short, and its threads would take cores from the kernels'
    tokenizer = prepared.tokenizer
    check_vocabulary(tokenizer, loaded.config.vocab_size, files.path)
    eos = end_tokens(tokenizer, loaded.config.eos_token_ids, loaded.config.vocab_size, files.path)
    sharing = None if retention is not None else share_options(config, loaded.fingerprint)
    cache = make_cache(config, loaded, retention, sharing)
    _try(backend, cache, loaded.config)
    length = _max_model_len(config, loaded, cache)
    trained, vocab = loaded.config.max_position, loaded.config.vocab_size
    loaded.decoder.rotary = rotary_table(loaded.config.rope, length, device)  # never longer than the cache
    if config.model.enforce_eager:
        loaded.decoder.enforce_eager()
    geometry = _geometry(loaded, length, cache.block_size, retention)
    states = make_states(config, cache.bytes, retention, device)
    runner = Runner(
        loaded.decoder,
        cache,
        backend,
        geometry,
        states,
        max_rows=config.scheduler.max_batched_tokens,
        max_seqs=config.scheduler.max_num_seqs,
        shadow_interval=config.selection.shadow_interval,
        retention=retention,
    )
    _capture(runner, progress)
    selectors = _selectors(config, geometry, backend)
    domains = DomainFactory(
        loaded.fingerprint, config.model.dtype, config.model.weights, config.scheduler.retention, secret=secret
    )
    share = None if sharing is None else _share(config, sharing, loaded, cache, backend, domains, tokenizer, tenants, length)
    core = assemble(
        config, runner, cache, states, backend, selectors, tokenizer, domains, tenants, Limits(length, trained, vocab), eos,
        retention, share,
    )  # fmt: skip
    return Built(core, _info(config, prepared, loaded, placement, length, backend, threads), tokenizer)


def _placement(config: EngineConfig) -> Placement:
    """The device, told to the log if it was not named. Raises ConfigError if there is no such, or a setting is none of it."""
    placement, given = settle(config.model.device, config.model.backend), config.cache.gpu_memory_utilization
    if config.model.device == "auto":
        log.info("device %s: %s", placement.device, placement.note)
    if given is not None and placement.device.type == "cpu":
        reason = "on a CPU the KV cache takes memory that other programs need, so its size is given: use --kv-memory"
        if config.model.device == "cpu":
            raise ConfigError(f"gpu_memory_utilization is {given:g}, but device is cpu; {reason}")
        log.warning("gpu_memory_utilization is left out: %s; %s", placement.note, reason)
    return placement


def _load(
    config: EngineConfig, files: ModelFiles, prepared: Prepared, backend: Kernels, device: torch.device, progress: Progress
) -> tuple[LoadedModel, Retention | None]:
    """The model, its weights in the order of the head groups of its retention; and that, None if everything is kept."""
    method, dtype = RETENTIONS[config.scheduler.retention], TORCH_DTYPES[config.model.dtype]
    options, made = method.read(config.scheduler.retention_options), list[Retention | None]()

    def head_groups(model: ModelConfig, model_key: str) -> list[Heads] | None:
        made.append(method.make(options, model_key, model, dtype))
        return None if made[0] is None else list(zip(*(spec.heads for spec in made[0].specs)))

    loaded = load_model(
        files.path,
        config.model.dtype,
        backend,
        config.model.weights,
        progress=lambda done, total: progress("loading layers", done, total),
        head_groups=head_groups,
        packed_folder=packed_folder(),
        gguf=prepared.gguf,
        device=device,
    )
    return loaded, made[0]


def _backend(name: str, device: torch.device, threads: int, progress: Progress) -> Kernels:
    """The kernels of that name. Raises ConfigError if they cannot be had on this machine and device."""
    try:
        return kernels.load(name, device.type, threads, progress)
    except ValueError as error:  # what was asked for names itself
        raise ConfigError(str(error)) from error
    except Exception as error:  # no compiler, or one that fails
        raise ConfigError(f"backend is {name}, which cannot be had here: {error}; use --backend auto") from error


def _attention(name: str, own: Kernels, device: torch.device, dtype: torch.dtype) -> Kernels:
    """Kernels with that library for rows that see everything. Raises ConfigError if it cannot be had here."""
    try:
        if name == "triton" and own.name != name:
            raise ValueError(f"the backend here is {own.name}")
        return own if name in ("auto", "triton") else beside(own, name, device, dtype)
    except Exception as error:  # of a library's own that is broken
        raise ConfigError(
            f"attention_backend is {name}, which cannot be had here: {error}; use --attention-backend auto"
        ) from error


def _selectors(config: EngineConfig, geometry: Geometry, backend: Kernels) -> Selectors:
    """Selection methods, and the default one. Raises ConfigError if that cannot serve sequences as long as they may be."""
    selection, scheduler = config.selection, config.scheduler
    defaults = Defaults(selection.selection, selection.budget, selection.options(), selection.draft, selection.draft_tokens)
    selectors = Selectors(defaults, geometry, backend, scheduler.max_batched_tokens - scheduler.max_num_seqs)
    if geometry.max_len > geometry.trained_len and not extrapolates(selectors.policy(KVOptions()).selector):
        raise _beyond_training(geometry.max_len, geometry.trained_len)
    return selectors


def _check_names(config: EngineConfig) -> None:
    for name, value, allowed in (
        ("reuse", config.cache.reuse, REUSE),
        ("scheduler", config.scheduler.scheduler, tuple(ORDERS)),
        ("selection", config.selection.selection, SELECTIONS),
        ("retention", config.scheduler.retention, RETENTIONS),
    ):
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")


def _geometry(loaded: LoadedModel, length: int, block_size: int, retention: Retention | None) -> Geometry:
    model = loaded.config
    chosen = GroupSpec.everything(model.layers, model.kv_heads) if retention is None else retention.specs[0]
    return Geometry(
        layers=model.layers,
        q_heads=model.q_heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_len=length,
        trained_len=model.max_position,
        inv_freq=loaded.decoder.rotary.inv_freq,
        model_key=loaded.fingerprint,
        block_size=block_size,
        heads=chosen.heads,
    )


def _capture(runner: Runner, progress: Progress) -> None:
    """Have steps captured beforehand, where that is done. Raises ConfigError if that fails."""
    began = time.perf_counter()
    try:
        runner.capture(lambda done, total: progress("capturing graphs", done, total))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a driver or a compiler
        raise ConfigError(f"steps cannot be captured here: {error}; use --enforce-eager") from error
    if captured := runner.decoder.graphs:
        log.info("%d graphs captured in %.1f s", captured, time.perf_counter() - began)


def _try(backend: Kernels, cache: CacheManager, model: ModelConfig) -> None:
    """Attend to the cache with no rows; have a library prepare. Raises ConfigError if kernels do not serve such heads or
    blocks."""
    for storage in (group.storage for group in cache.groups):
        none = torch.zeros(0, dtype=torch.int32, device=storage.device)
        kv = max(storage.layers, key=lambda layer: layer.k.shape[1])
        heads = kv.k.shape[1]
        q = kv.k.new_empty(0, heads * model.q_heads // model.kv_heads, model.head_dim)
        try:
            plan = backend.plan(Rows(none.view(0, 1), none, none, none), q.shape[1], heads, model.head_dim)
            backend.attend(q, kv, plan, scale=1.0, out=q)
            if isinstance(backend, Beside):
                backend.prepare(kv, q.shape[1])
        except ValueError as error:
            other = "" if backend.dense is None else ", --attention-backend"
            raise ConfigError(f"{error}; choose another --backend{other} or --block-size") from None


def _share(
    config: EngineConfig,
    options: ShareOptions,
    loaded: LoadedModel,
    cache: CacheManager,
    backend: Kernels,
    domains: DomainFactory,
    tokenizer: Tokenizer,
    tenants: Tenants,
    length: int,
) -> KVShare:
    """What serves approximate reuse."""
    capacity = segment_bound(config, cache.storage.blocks * cache.storage.block_bytes, options, cache.storage.device)
    return KVShare(
        options,
        SegmentStore(capacity, lambda name: tenants.get(name).segment_bytes, lambda name: tenants.get(name).weight),
        loaded.decoder,
        cache,
        backend,
        domains,
        tenants,
        default=config.cache.reuse,
        special=tokenizer.special_ids,
        sink=_sink(tokenizer, length),
    )


def _sink(tokenizer: Tokenizer, length: int) -> list[int]:
    """Neutral tokens in front of text that is compiled alone, at most a quarter of the longest sequence."""
    return tokenizer.encode(PROSE)[: length // 4]


def _beyond_training(asked: int, trained: int) -> ConfigError:
    how = """--selection token_select --selection-options '{"positions": "reindexed", "prefill_budget": 1024}'"""
    return ConfigError(
        f"max_model_len is {asked}, but this model was trained for {trained}; give at most {trained}, or a selection that goes "
        f"beyond: {how}"
    )


def _max_model_len(config: EngineConfig, loaded: LoadedModel, cache: CacheManager) -> int:
    """Longest request: what was asked for, or what the model was trained for; never more than the cache holds.

    Whether a default selection other than dense can serve more than that is checked once it is made.
    """
    trained, capacity, asked = loaded.config.max_position, cache.longest, config.model.max_model_len
    if asked is None:
        if trained > capacity:
            log.warning(
                "kv_memory holds %d tokens, so max_model_len is %d instead of the model's %d, which takes about %s",
                capacity, capacity, trained, size(cache.bytes * trained // capacity),
            )  # fmt: skip
        return min(trained, capacity)
    if asked < 2:
        raise ConfigError(f"max_model_len is {asked}; allowed for this model: 2 to {trained}")
    if asked > trained and config.selection.selection == "dense":
        raise _beyond_training(asked, trained)
    if asked > capacity:
        raise ConfigError(f"max_model_len is {asked}, but the KV cache holds {capacity} tokens; raise kv_memory or lower it")
    return asked


def _info(
    config: EngineConfig,
    prepared: Prepared,
    loaded: LoadedModel,
    placement: Placement,
    length: int,
    backend: Kernels,
    threads: int,
) -> ModelInfo:
    options = config.model
    name, *others = dict.fromkeys(map(_text, options.served_model_name or (options.model,)))
    sampling, source = sampling_defaults(options, prepared.files, prepared.gguf)
    return ModelInfo(
        name=name,
        other_names=tuple(others),
        root=_text(prepared.files.name),
        source=options.model,
        replica=options.replica,
        max_model_len=length,
        vocab_size=loaded.config.vocab_size,
        device="cpu" if placement.device.type == "cpu" else "cuda",
        device_note=placement.note,
        dtype=options.dtype,
        weights=options.weights,
        weights_held=loaded.weights_held,
        backend=backend.name,
        build=backend.build,
        paths=backend.paths,
        attention=backend.dense or "",
        threads=f"{threads} on {processors()}",
        created=int(time.time()),
        settings=config.changed(),
        sampling=sampling,
        sampling_source=source,
        chat_template=prepared.chat_template,
    )


def _text(name: str) -> str:
    """A name as text that can be sent: paths may hold bytes that are no UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
