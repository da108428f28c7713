"""`kvloom plan MODEL --memory 16GiB`: what fits into a memory, for every retention; by default into that of the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table

from kvloom.engine.config import EngineConfig
from kvloom.engine.settings.options import parse_bytes
from kvloom.server.console import LoadingBars

if TYPE_CHECKING:
    from kvloom.engine.model.config import ModelConfig

MIB = 1 << 20


class Memory(NamedTuple):
    """What is divided."""

    granted: int
    """Bytes."""
    what: str
    """That it is, in words."""
    cache: Callable[[ModelConfig, int, int], int]
    """From the model, the greatest length and the bytes that weights leave, those of the KV cache."""


def plan(config: EngineConfig, memory: str | None) -> int:
    """Print the plan. Raises ModelError, ModelNotFoundError or ConfigError."""
    from kvloom.engine.model.load import TORCH_DTYPES
    from kvloom.engine.startup.capacity import capacity
    from kvloom.engine.startup.catalog import resolve

    model, dtype, length = config.model.model, config.model.dtype, config.model.max_model_len
    with LoadingBars() as progress:
        files = resolve(model, progress)
    divided = _memory(config, memory, files.path)
    found = capacity(files.path, divided.granted, TORCH_DTYPES[dtype], length, config.cache.block_size, divided.cache)
    rest = divided.granted - found.weight_bytes - found.kv_bytes
    console = Console(highlight=False)
    console.print(
        f"{files.name}: {found.model.layers} layers, {found.model.kv_heads} KV heads of {found.model.head_dim}, {dtype}\n"
        f"{divided.what} = {found.weight_bytes / MIB:,.0f} MiB weights + {found.kv_bytes / MIB:,.0f} MiB KV cache"
        + (f" + {rest / MIB:,.0f} MiB for steps and for what methods remember" if rest else ""),
        soft_wrap=True,
    )
    table = Table("retention", "retrieval heads", "KV per request", "of everything", f"requests of {found.length:,}", "tokens")
    whole = found.settings[0].request_bytes
    for setting in found.settings:
        share = f"{setting.request_bytes / whole:.2f}x"
        size = f"{setting.request_bytes / MIB:,.1f} MiB"
        heads = f"{setting.retrieval_share:.0%}"
        table.add_row(setting.name, heads, size, share, f"{setting.requests:,}", f"{setting.tokens:,}")
    console.print(table)
    for setting in found.settings[1:]:
        console.print(f"{setting.retrieval_share:.0%}: kvloom serve {model} {setting.flags}", soft_wrap=True)
    if not found.calibrated:
        console.print(f"razor is not listed: this model has no calibration; run kvloom calibrate razor {model}", soft_wrap=True)
    return 0


def _memory(config: EngineConfig, given: str | None, path: Path) -> Memory:
    """The memory that was given, as `kvloom serve` would divide it on the device; else what the device has."""
    import torch

    from kvloom.engine.device import Placement, memory_of, settle
    from kvloom.engine.model.load import TORCH_DTYPES, fingerprint_of
    from kvloom.engine.startup import gpu_memory, sizing
    from kvloom.engine.startup.available import available_memory, size

    named = Placement(torch.device("cuda")) if given and config.model.device == "cuda" else None  # it need not be here
    device, note = named or settle(config.model.device)
    if device.type == "cpu":
        return Memory(*_on_a_cpu(given, available_memory()), lambda model, length, left: left)
    used = config.cache.gpu_memory_utilization or gpu_memory.UTILIZATION
    free, total = memory_of(device) if given is None else (parse_bytes(given), parse_bytes(given))
    beside = sizing.beside(config, sizing.share_options(config, fingerprint_of(path)), device)

    def cache(model: ModelConfig, length: int, left: int) -> int:
        steps = gpu_memory.step_memory(model, TORCH_DTYPES[config.model.dtype], config.scheduler, length)
        return gpu_memory.largest(left - steps, beside)

    taken = f", less {size(total - free)} that are taken" if total > free else ""
    return Memory(int(total * used) - (total - free), f"{used:g} of {given or size(total)} on {note or device}{taken}", cache)


def _on_a_cpu(given: str | None, free: int) -> tuple[int, str]:
    return (free, f"{free / MIB:,.0f} MiB that are free") if given is None else (parse_bytes(given), given)
