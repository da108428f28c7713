"""The result in a few sentences, and what stands against believing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from kvloom.loadtest.load.search import sentence
from kvloom.loadtest.report.document import amount, ms, percent
from kvloom.loadtest.report.run import Run, Stage

WANTED_SHARE = 0.95
"""Of requests within the objectives, where a run does not say."""
MOST_LAG = 0.1
"""Share of the mean TTFT that the client may be late by, at p99."""


def verdict(run: Run) -> list[str]:
    """What a reader in a hurry should know of one run."""
    stages = [stage for stage in run.stages if stage.completed]
    if not stages:
        return [f"No request succeeded.{_failed(run)}"]
    share = float(run.settings.get("slo_share") or WANTED_SHARE)
    lines = [_speed(stages[0])] if len(stages) == 1 else _over_loads(stages, share)
    if run.search:
        lines.insert(0, sentence(run.search))
    asked = sum(int(stage.number("num_prompts") or 0) for stage in run.stages)
    done = sum(stage.completed for stage in run.stages)
    lines.append(f"{done} of {asked} requests succeeded.{_failed(run)}")
    lines += list(_cache_and_answers(stages))
    return lines


def _speed(stage: Stage) -> str:
    figures = stage.figures
    per_token = f", then a token every {ms(stage.number('p50_tpot_ms'))} ms" if stage.number("p50_tpot_ms") else ""
    return (
        f"At {stage.label}: first token after {ms(figures.get('p50_ttft_ms'))} ms "
        f"(median; p99 {ms(figures.get('p99_ttft_ms'))} ms)"
        f"{per_token}; {amount(figures.get('output_throughput'), 1)} output tokens/s."
    )


def _over_loads(stages: list[Stage], share: float) -> list[str]:
    best = max(stages, key=lambda stage: stage.number("output_throughput") or 0.0)
    ordered = sorted(stages, key=lambda stage: stage.load or 0.0)
    first, last = ordered[0], ordered[-1]
    lines = [
        f"Throughput is highest at {best.label}: {amount(best.number('output_throughput'), 1)} output tokens/s.",
        f"From {first.label} to {last.label} the median TTFT goes from {ms(first.number('p50_ttft_ms'))} to "
        f"{ms(last.number('p50_ttft_ms'))} ms, TPOT from {ms(first.number('p50_tpot_ms'))} to "
        f"{ms(last.number('p50_tpot_ms'))} ms.",
    ]
    met = [stage for stage in ordered if (stage.number("goodput_share") or 0.0) >= share]
    if any(stage.number("request_goodput") is not None for stage in stages):
        lines.append(
            f"The objectives hold for {100 * share:.4g}% of requests up to {met[-1].label}."
            if met
            else f"No load met the objectives for {100 * share:.4g}% of requests."
        )
    return lines


def _failed(run: Run) -> str:
    kinds: Counter[str] = Counter()
    for stage in run.stages:
        kinds.update({kind: int(count) for kind, count in (stage.figures.get("failures") or {}).items()})
    failed = sum(stage.failed for stage in run.stages)
    cancelled = sum(int(stage.number("cancelled") or 0) for stage in run.stages)
    parts = (
        [f" {failed} failed: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) + "."] if failed else []
    )
    parts += [f" {cancelled} were cancelled by the client."] if cancelled else []
    return "".join(parts)


def _cache_and_answers(stages: list[Stage]) -> Iterator[str]:
    cached = sum(stage.number("cached_tokens") or 0.0 for stage in stages)
    prompt = sum(stage.number("total_input_tokens") or 0.0 for stage in stages)
    if prompt and any(stage.number("cached_tokens") is not None for stage in stages):
        yield f"{percent(cached / prompt)} of prompt tokens came from the cache{_ideal(stages, prompt)}."
    rates = [(stage.number("correct_rate"), stage.completed) for stage in stages]
    known = [(rate, count) for rate, count in rates if rate is not None]
    if known:
        right = sum(rate * count for rate, count in known) / sum(count for _, count in known)
        yield f"{percent(right)} of the answers that can be checked were right."
    for stage in stages if len(stages) == 1 else ():
        if (share := stage.number("goodput_share")) is not None and stage.figures.get("slo"):
            yield f"{percent(share)} of requests met every objective."


def _ideal(stages: list[Stage], prompt: float) -> str:
    """What a perfect cache could have given, where the workload knows."""
    prefix, anywhere = (
        sum(stage.number(f"reusable_{kind}") or 0.0 for stage in stages) for kind in ("tokens", "anywhere_tokens")
    )
    if not prefix and not anywhere:
        return ""
    return f" (a perfect prefix cache: {percent(prefix / prompt)}; one that reuses at any offset: {percent(anywhere / prompt)})"


def warnings(run: Run) -> list[str]:
    """What a reader must know before believing the figures."""
    found = list(run.notes)
    if run.interrupted:
        found.insert(0, "The run was interrupted: the figures are of what was measured until then.")
    for stage in run.stages:
        found += [f"{stage.label}: {text}" for text in _stage_warnings(stage)]
    return found


def _stage_warnings(stage: Stage) -> Iterator[str]:
    lag = (stage.figures.get("client_lag") or {}).get("p99_ms")
    ttft = stage.number("mean_ttft_ms")
    if lag is not None and ttft and lag > MOST_LAG * ttft:
        yield (
            f"the client was late: p99 of its lag is {ms(lag)} ms, more than {MOST_LAG:.0%} of the mean TTFT ({ms(ttft)} ms). "
            "The client, not the server, may be what these figures show."
        )
    asked = stage.number("num_prompts") or 0
    if stage.failed and stage.completed and stage.failed >= 0.01 * asked:
        yield f"{percent(stage.failed / asked)} of requests failed; the times are of the others only."
    if unsent := stage.number("not_sent"):
        yield f"{unsent:.0f} of {asked:.0f} requests were never sent."
    if asked and not stage.completed:
        yield "no request succeeded, so there are no times."
    if (share := tokens_per_chunk(stage)) and share > 1.2:
        yield f"a chunk carried {share:.1f} tokens on average, so ITL is the time between chunks, not tokens; see TPOT."


def tokens_per_chunk(stage: Stage) -> float | None:
    """Output tokens per chunk with text, None if no request brought text."""
    good = [row for row in stage.rows if row.ok and row.number("output_tokens")]
    chunks = sum(len(row.chunks) for row in good)
    return sum(row.number("output_tokens") or 0.0 for row in good) / chunks if chunks else None
