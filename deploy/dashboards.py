"""Writes Grafana's dashboards, deploy/grafana/dashboards/*.json, from the tables below: `python deploy/dashboards.py`.

Grafana's own Python package makes the JSON, so that its form is Grafana's. With --check nothing is written, and the exit code
is 1 if a file differs from what would be.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, StackingMode
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef

FOLDER = Path(__file__).parent / "grafana" / "dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")
WIDTH, HEIGHT = 8, 8


class Query(NamedTuple):
    """One of a panel's queries; `kvloom:` stands before its metrics."""

    expr: str
    legend: str


class Panel(NamedTuple):
    """A panel over time."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    about: str
    stacked: bool = False


def label(by: str) -> str:
    """A legend that is the first label's value."""
    return "{{" + by.split(",")[0] + "}}"


def rate(metric: str, by: str, legend: str = "") -> Query:
    """A counter per second."""
    return Query(f"sum by ({by}) (rate(kvloom:{metric}[$__rate_interval]))", legend or label(by))


def value(metric: str, by: str, legend: str = "") -> Query:
    """A gauge, summed over engines."""
    return Query(f"sum by ({by}) (kvloom:{metric})", legend or label(by))


def share(part: str, whole: str, by: str, legend: str = "") -> Query:
    """One counter's growth over another's; nothing while nothing grows."""
    above = f"sum by ({by}) (rate(kvloom:{part}[$__rate_interval]))"
    below = f"sum by ({by}) (rate(kvloom:{whole}[$__rate_interval]))"
    return Query(f"{above} / ({below} > 0)", legend or label(by))


def quantiles(metric: str, by: str = "", legend: str = "") -> tuple[Query, ...]:
    """Median, 90th and 99th percentile of a histogram."""
    also = f", {by}" if by else ""
    rates = f"sum by (le{also}) (rate(kvloom:{metric}_bucket[$__rate_interval]))"
    return tuple(Query(f"histogram_quantile({q}, {rates})", f"{legend}p{round(q * 100)}") for q in (0.5, 0.9, 0.99))


SERVING = {
    "Latency": (
        Panel("Time to first token", "s", quantiles("time_to_first_token_seconds"), "From arrival to the first token."),
        Panel("Time between tokens", "s", quantiles("inter_token_latency_seconds"), "Between two tokens of one answer."),
        Panel("Time of a request", "s", quantiles("e2e_request_latency_seconds"), "From arrival to the last token."),
        Panel("First token by what was reused", "s", (Query(
            "histogram_quantile(0.9, sum by (le, path) (rate(kvloom:time_to_first_token_by_path_seconds_bucket"
            "[$__rate_interval])))", "p90 {{path}}"),), "Nothing, an exact prefix, or segments of approximate reuse."),
        Panel("Time by phase, mean", "s", tuple(
            share(f"request_{phase}_time_seconds_sum", f"request_{phase}_time_seconds_count", "engine", phase)
            for phase in ("queue", "prefill", "decode")), "Where a request's time goes."),
        Panel("Time of a step", "s", quantiles("engine_step_time_seconds"), "What all streams wait for at once."),
    ),
    "Throughput": (
        Panel("Tokens per second", "short", (
            rate("generation_tokens_total", "engine", "generated"), rate("prompt_tokens_total", "engine", "of prompts")),
            "Prompt tokens include reused ones."),
        Panel("Requests per second, by how they ended", "reqps", (
            rate("request_success_total", "finished_reason"),), "", True),
        Panel("Refused requests per second", "reqps", (rate("requests_refused_total", "status"),), "By status."),
        Panel("Rows of prompts in a step", "short", quantiles("engine_step_prompt_rows"), "Beside rows that generate."),
        Panel("Tokens of a request, median", "short", (
            quantiles("request_prompt_tokens", legend="prompt ")[0],
            quantiles("request_generation_tokens", legend="answer ")[0],
        ), ""),
        Panel("Replayed steps and launches ahead", "ops", (
            rate("engine_graph_steps_total", "mode"), rate("engine_ahead_steps_total", "engine", "launched ahead"),
            rate("engine_graph_capture_failures_total", "engine", "captures failed")),
            "By how much came from a captured graph; before the tokens of the step in front were known."),
    ),
    "Queue": (
        Panel("Requests", "short", (
            value("num_requests_running", "engine", "running"), value("num_requests_waiting", "engine", "waiting")), ""),
        Panel("Prompt tokens that wait", "short", (value("num_prompt_tokens_waiting", "engine", "waiting"),), ""),
        Panel("Time in the queue", "s", quantiles("request_queue_time_seconds"), "From arrival to the first step."),
        Panel("Preempted per second", "ops", (
            rate("num_preemptions_total", "engine", "requests"), rate("replayed_tokens_total", "engine", "tokens again")), ""),
        Panel("Grammars that wait", "short", (value("num_grammars_waiting", "engine", "requests"),),
              "Requests whose grammar is not compiled yet."),
        Panel("Time to compile a grammar", "s", quantiles("grammar_compile_seconds"), "Without the wait before."),
        Panel("Engine", "short", (
            value("engine_up", "engine", "up"), rate("engine_internal_errors_total", "engine", "errors per second")), ""),
    ),
    "Replicas": (
        Panel("Replicas", "short", (
            value("replicas_up", "engine", "up"), value("replicas_wanted", "engine", "wanted, at least")),
            "One where the engine is in the server itself."),
        Panel("Lost replicas", "short", (
            Query("sum by (engine) (increase(kvloom:replicas_lost_total[10m]))", "lost"),
            Query("sum by (engine) (increase(kvloom:requests_resumed_total[10m]))", "requests that another took up")),
            "In ten minutes; those that were told to end are not among them."),
        Panel("Requests per second, by why to that replica", "reqps", (rate("routed_total", "reason"),),
              "It holds much of the prompt; too much waits where it is held; nobody holds enough.", True),
    ),
}  # fmt: skip
CACHE = {
    "Cache": (
        Panel("Blocks by state and head group", "short", (value("kv_blocks", "state, group", "{{group}} {{state}}"),),
              "Free, cached (a prefix that may be found again) and held by requests.", True),
        Panel("Held by running requests", "percentunit", (Query("max by (engine) (kvloom:kv_cache_usage_perc)", "{{engine}}"),),
              "Of the fullest head group."),
        Panel("Evicted blocks per second", "ops", (rate("kv_evicted_blocks_total", "engine"),), ""),
        Panel("Named tenants: blocks", "short", (
            value("tenant_in_use_blocks", "tenant", "{{tenant}} in use"), value("tenant_cached_blocks", "tenant",
                                                                                "{{tenant}} cached")),
            "Those that the tenants file names.", True),
        Panel("Named tenants: bytes of segments", "bytes", (value("tenant_segment_bytes", "tenant"),), "", True),
        Panel("Named tenants: prompt tokens", "short", (
            rate("tenant_tokens_total", "tenant, kind", "{{tenant}} {{kind}}"),), "Where approximate reuse serves.", True),
    ),
    "Hits": (
        Panel("Prefix hits", "percentunit", (
            share("prefix_cache_hits_total", "prefix_cache_queries_total", "engine"),), "Of prompt tokens looked up."),
        Panel("Prompt tokens by kind", "short", (rate("kvshare_tokens_total", "kind"),), "What became of them.", True),
        Panel("KVShare: requests and why nothing was reused", "reqps", (
            rate("kvshare_requests_total", "path, reason", "{{path}} {{reason}}"),), ""),
    ),
    "KVShare": (
        Panel("Runs by donor", "ops", (rate("kvshare_runs_by_donor_total", "donor"),), ""),
        Panel("Runs by whose they were", "ops", (rate("kvshare_runs_by_scope_total", "scope"),), ""),
        Panel("Recomputed of what donors had", "percentunit", (Query(
            "sum by (engine) (rate(kvloom:kvshare_recomputed_tokens_total[$__rate_interval])) / (sum by (engine) (rate("
            "kvloom:kvshare_recomputed_tokens_total[$__rate_interval]) + rate(kvloom:kvshare_reused_tokens_total"
            "[$__rate_interval])) > 0)", "{{engine}}"),), ""),
        Panel("Segments", "bytes", (
            value("kvshare_segment_bytes", "engine", "held"), value("kvshare_segment_capacity_bytes", "engine", "most")), ""),
        Panel("What reuse takes, seconds per second", "percentunit", tuple(
            rate(f"kvshare_{part}_seconds_total", "engine", part) for part in ("match", "copy", "scan")), "", True),
        Panel("What it costs", "short", (
            share("kvshare_shadow_kl_sum_total", "kvshare_shadow_tokens_total", "engine", "KL, nats"),
            value("kvshare_enabled", "engine", "enabled")), "Shadow checks compare with a full computation."),
        Panel("Repair while decoding", "short", (
            rate("kvshare_refreshed_tokens_total", "engine", "refreshed"),
            rate("kvshare_healed_tokens_total", "engine", "healed"),
            rate("kvshare_stale_left_tokens_total", "engine", "left as copied")), ""),
    ),
    "Selection and retention": (
        Panel("Read of what could have been", "percentunit", (
            share("selection_attended_total", "selection_held_total", "method"),), "Positions of decode rows, by method."),
        Panel("Attention mass covered", "percentunit", (
            share("selection_mass_total", "selection_mass_samples_total", "method"),), "Against shadow dense passes."),
        Panel("Lists made and used again", "ops", (
            rate("selection_selections_total", "method", "{{method}} made"),
            rate("selection_reused_total", "method", "{{method}} again")), ""),
        Panel("KV read", "Bps", (rate("kv_read_bytes_total", "kind"),), "Contiguous, listed, and to choose by.", True),
        Panel("State of methods and retention", "bytes", (
            value("selection_state_bytes", "engine", "held"), value("selection_state_capacity_bytes", "engine", "most")), ""),
        Panel("In use by head group", "percentunit", (Query(
            'sum by (group) (kvloom:kv_blocks{state="in_use"}) / sum by (group) (kvloom:kv_blocks)', "{{group}}"),),
            "With a retention, heads that keep a window alone are a group of their own."),
    ),
    "Drafts": (
        Panel("Accepted of drafted tokens", "percentunit", (
            share("spec_decode_num_accepted_tokens_total", "spec_decode_num_draft_tokens_total", "engine"),), ""),
        Panel("Drafts per second", "ops", (
            rate("spec_decode_num_drafts_total", "engine", "verifications"),
            rate("spec_decode_num_draft_tokens_total", "engine", "tokens drafted"),
            rate("spec_decode_num_accepted_tokens_total", "engine", "tokens accepted")), ""),
    ),
}  # fmt: skip
BOARDS = {"serving": ("kvloom: serving", SERVING), "cache": ("kvloom: cache and methods", CACHE)}


def panel(of: Panel) -> timeseries.Panel:
    """A panel in Grafana's form."""
    made = timeseries.Panel().title(of.title).datasource(SOURCE).unit(of.unit).span(WIDTH).height(HEIGHT).min(0)
    made.legend(
        common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True)
    )
    if of.about:
        made.description(of.about)
    if of.stacked:
        made.fill_opacity(20).stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
    for number, query in enumerate(of.queries):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id("ABCDEFGH"[number])
        made.with_target(target.datasource(SOURCE).range())
    return made


def board(name: str) -> str:
    """The JSON of a dashboard."""
    title, rows = BOARDS[name]
    made = dashboard.Dashboard(title).uid(f"kvloom-{name}").tags(["kvloom"]).timezone("browser").refresh("10s")
    made.time("now-30m", "now").tooltip(DashboardCursorSync.CROSSHAIR)
    for row, panels in rows.items():
        made.with_row(dashboard.Row(row))
        for of in panels:
            made.with_panel(panel(of))
    built = made.build()
    for number, part in enumerate(built.panels or (), 1):
        part.id_val = number
    return JSONEncoder(sort_keys=True, indent=1).encode(built) + "\n"


def main(words: list[str]) -> int:
    """Returns the exit code."""
    code = 0
    for name in BOARDS:
        file, text = FOLDER / f"{name}.json", board(name)
        if "--check" not in words:
            file.write_text(text)
        elif file.read_text() != text:
            print(f"{file} is not what deploy/dashboards.py makes; run it", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
