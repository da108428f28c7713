"""The parts of an engine, put together: who knows whom, and which features take part."""

from __future__ import annotations

import math

from kvloom.engine.cache import CacheManager
from kvloom.engine.cache.prefix import DomainFactory
from kvloom.engine.config import EngineConfig
from kvloom.engine.constraint.compiler import Compiler
from kvloom.engine.core import EngineCore
from kvloom.engine.requests.lifecycle import Feature
from kvloom.engine.requests.state import StateMemory
from kvloom.engine.requests.tenants import Tenants
from kvloom.engine.retention.base import Forgetting, Retention
from kvloom.engine.reuse.kvshare.share import KVShare
from kvloom.engine.reuse.kvshare.unavailable import NoKVShare
from kvloom.engine.scheduling import ORDERS, Scheduler
from kvloom.engine.scheduling.admission import Admission
from kvloom.engine.scheduling.cache_aware import PrefixEstimator
from kvloom.engine.scheduling.limits import Limits
from kvloom.engine.scheduling.share_estimate import ShareEstimator
from kvloom.engine.selection.policies import Selectors
from kvloom.engine.statistics import Statistics
from kvloom.engine.step.decoding import Decoding
from kvloom.engine.step.masks import Constraints
from kvloom.engine.step.runner import Runner
from kvloom.engine.step.sampler import Sampler
from kvloom.engine.text import Tokenizer
from kvloom.kernels.interface import Kernels


def assemble(
    config: EngineConfig,
    runner: Runner,
    cache: CacheManager,
    states: StateMemory,
    kernels: Kernels,
    selectors: Selectors,
    tokenizer: Tokenizer,
    domains: DomainFactory,
    tenants: Tenants,
    limits: Limits,
    eos: frozenset[int],
    retention: Retention | None,
    share: KVShare | None,
) -> EngineCore:
    """An engine with no requests. states: memory of what selection and retention remember; retention: what gives KV back, None
    if everything is kept; share: what serves approximate reuse, None if this engine cannot."""
    ends = frozenset(token for token in eos if 0 <= token < limits.vocab_size)
    compiler = Compiler(config.structured, tokenizer, limits.vocab_size, ends)
    constraints = Constraints(compiler, limits.vocab_size, runner.decoder.device, config.scheduler.max_batched_tokens)
    features: list[Feature] = [NoKVShare(config.cache.reuse) if share is None else share, constraints]
    if retention is not None:
        features.append(Forgetting(retention, states, kernels))
    order = ORDERS[config.scheduler.scheduler]
    scheduler = Scheduler(
        cache,
        order,
        max_seqs=config.scheduler.max_num_seqs,
        max_tokens=config.scheduler.max_batched_tokens,
        step_seconds=config.scheduler.step_time_ms / 1000 or math.inf,
        reuse=share,
        states=states,
        weight=lambda tenant: tenants.get(tenant).weight,
        max_wait=config.scheduler.max_wait_ms / 1000,
        estimator=PrefixEstimator(cache) if share is None else ShareEstimator(cache, share),
    )
    statistics = Statistics(
        replicas=(config.model.replica,), cache=cache, scheduler=scheduler, decoder=runner.decoder, kernels=kernels,
        selectors=selectors, states=states, kvshare=share, compiler=compiler,
    )  # fmt: skip
    admission = Admission(
        limits=limits,
        cache=cache,
        domains=domains,
        selectors=selectors,
        states=states,
        features=features,
        reuse=config.cache.reuse,
        uses_priority=order.uses_priority,
    )
    sampler = Sampler(limits.vocab_size, kernels, lambda text: tokenizer.encode(text, add_special_tokens=False))
    decoding = Decoding(sampler, runner, tokenizer, ends, features, statistics, scheduler.table, constraints)
    jobs = None if share is None else share.jobs
    overlaps = config.scheduler.async_scheduling and cache.storage.device.type != "cpu"
    return EngineCore(
        runner, cache, states, scheduler, admission, decoding, statistics, tenants, features, jobs, overlaps=overlaps
    )
