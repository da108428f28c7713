"""`kvloom plan MODEL --memory 16GiB`: what fits into a memory, for every retention."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from kvloom.engine.config import EngineConfig, parse_bytes
from kvloom.server.console import LoadingBars

MIB = 1 << 20


def plan(config: EngineConfig, memory: str) -> int:
    """Print the plan. Raises ModelError, ModelNotFoundError or ConfigError."""
    from kvloom.engine.model.load import TORCH_DTYPES
    from kvloom.engine.startup.capacity import capacity
    from kvloom.engine.startup.catalog import resolve

    model, dtype, length = config.model.model, config.model.dtype, config.model.max_model_len
    with LoadingBars() as progress:
        files = resolve(model, progress)
    found = capacity(files.path, parse_bytes(memory), TORCH_DTYPES[dtype], length, config.cache.block_size)
    console = Console(highlight=False)
    console.print(
        f"{files.name}: {found.model.layers} layers, {found.model.kv_heads} KV heads of {found.model.head_dim}, {dtype}\n"
        f"{memory} = {found.weight_bytes / MIB:,.0f} MiB weights + {found.kv_bytes / MIB:,.0f} MiB KV cache"
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
