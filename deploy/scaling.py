"""How many replicas there should be, by the prompt tokens that wait: QUEUED_TOKENS for each are enough.

A policy of Ray Serve's autoscaler: it is asked some times a second, with what `Replica.record_autoscaling_stats` told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

QUEUED_TOKENS = 2048
"""Prompt tokens that may wait at each replica before there is one more: a second or two of a CPU's work."""
MOST_SEQS = 64
"""Sequences that one replica should decode at once, at most."""


def wanted(queued_tokens: float, running: float, replicas: int, few: int, most: int, *, seqs: int) -> int:
    """Replicas for what waits: one for every QUEUED_TOKENS, and room for every sequence that runs. One fewer is enough where
    what is there would still fit; nothing is taken away while anything waits."""
    by_queue = math.ceil(queued_tokens / QUEUED_TOKENS) + (1 if queued_tokens else 0)
    by_seqs = math.ceil(running / seqs)
    need = max(by_queue, by_seqs, 1)
    if queued_tokens and need < replicas:
        need = replicas
    return min(most, max(few, need))


def policy(context: Any) -> tuple[int, Mapping[str, Any]]:
    """Called by Ray Serve with its `AutoscalingContext`."""
    told = context.aggregated_metrics or {}
    queued = sum(told.get("queued_tokens", {}).values())
    running = sum(told.get("running", {}).values())
    few, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return wanted(queued, running, context.current_num_replicas, few, most, seqs=MOST_SEQS), {}


def autoscaling(few: int, most: int) -> Any:
    """Ray Serve's settings for between `few` and `most` replicas."""
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    return AutoscalingConfig(
        min_replicas=few, max_replicas=most, initial_replicas=few, upscale_delay_s=2.0, downscale_delay_s=30.0,
        metrics_interval_s=1.0, look_back_period_s=2.0, policy=AutoscalingPolicy(policy_function=policy),
    )  # fmt: skip
