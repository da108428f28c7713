"""One load test: its jobs made, its stages run, its files written.

Ctrl-C and a server that goes away end a run early; what was measured is written all the same.
"""

from __future__ import annotations

import asyncio
import datetime
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from kvloom.engine.errors import ConfigError, ModelError, ModelNotFoundError
from kvloom.loadtest.arrivals import Load, due_times
from kvloom.loadtest.client import Client, Job
from kvloom.loadtest.corpus import TextSource
from kvloom.loadtest.drive import Driver, StageRun, check_order
from kvloom.loadtest.flags import BenchError
from kvloom.loadtest.machine import describe
from kvloom.loadtest.measures import DEFINITIONS
from kvloom.loadtest.outputs import Outputs
from kvloom.loadtest.plan import Plan
from kvloom.loadtest.progress import Meter
from kvloom.loadtest.ready import check, first_model, wait_until_ready
from kvloom.loadtest.scrape import Scraper
from kvloom.loadtest.summary import stage_summary
from kvloom.loadtest.workloads import WORKLOADS

WARMUP_SEED = 1_000_003
"""Added to the seed, so that warming up does not fill the cache with the prompts that are measured."""
WARMUP_CONCURRENCY = 4


@dataclass(frozen=True, slots=True)
class Work:
    """All jobs of a run."""

    warmup: list[Job]
    stages: list[list[Job]]
    due: list[list[float]]
    """Seconds after the start of its stage at which each job is due."""
    corpus: str
    """Fingerprint of the text that prompts were made of."""


@dataclass(slots=True)
class Outcome:
    """What a run left."""

    model: str = ""
    stages: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False
    lost: bool = False


def build(plan: Plan) -> Work:
    """Make the jobs of every stage. Raises ConfigError if the workload cannot be made or sent."""
    workload = WORKLOADS[plan.workload]
    try:
        text = TextSource.load(plan.tokenizer)
        stages = [workload.build(plan.options, text, plan.stage_seed(i), plan.count) for i in range(len(plan.loads))]
        warmup = workload.build(plan.options, text, plan.seed + WARMUP_SEED, plan.warmup) if plan.warmup else []
        for jobs in (*stages, warmup):
            _check(plan, jobs)
        due = [due_times(load, jobs, plan.stage_seed(i)) for i, (load, jobs) in enumerate(zip(plan.loads, stages))]
    except ConfigError:
        raise
    except (ModelError, ModelNotFoundError) as error:
        raise ConfigError(f"--tokenizer {plan.tokenizer}: {error}") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"workload {plan.workload}: {error}") from None
    return Work(warmup, stages, due, text.fingerprint)


def _check(plan: Plan, jobs: Sequence[Job]) -> None:
    check_order(jobs)
    if plan.loads[0].mode == "trace" and any(job.at is None for job in jobs):
        raise ConfigError(f"workload {plan.workload} has no times of its own; give --rate, --ramp-up or --concurrency")
    if plan.endpoint == "chat" and not all(isinstance(job.prompt, str) for job in jobs):
        raise ConfigError(
            f"workload {plan.workload} makes token ids, which the chat endpoint does not take; use --endpoint completions"
        )


class Bench:
    """One run."""

    def __init__(self, plan: Plan, work: Work, outputs: Outputs, console: Console) -> None:
        self._plan = plan
        self._work = work
        self._outputs = outputs
        self._console = console
        self.outcome = Outcome(plan.model or "")

    async def run(self) -> None:
        """Every stage. Raises BenchError if the server is not there or refuses what is sent."""
        plan = self._plan
        async with self._client("") as client:
            await wait_until_ready(client, plan.ready_timeout)
            self.outcome.model = plan.model or await first_model(client)
        async with self._client(self.outcome.model) as client:
            first = (self._work.warmup or self._work.stages[0])[0]
            await check(client, first, plan.tenant_keys)
            await self._warm_up(client)
            self._outputs.begin()
            for stage, load in enumerate(plan.loads):
                if self.outcome.interrupted or self.outcome.lost:
                    break
                await self._stage(client, stage, load)

    def _client(self, model: str) -> Client:
        plan = self._plan
        return Client(plan.base_url, model, api_key=plan.api_key, tenant_keys=plan.tenant_keys, endpoint=plan.endpoint,
                      extra_body=plan.extra_body, retries=plan.retries, timeout=plan.timeout)  # fmt: skip

    async def _warm_up(self, client: Client) -> None:
        jobs = self._work.warmup
        load = Load(concurrency=self._plan.loads[0].concurrency or WARMUP_CONCURRENCY)
        driver = Driver(client, jobs, [0.0] * len(jobs), load)
        with on_interrupt(driver.stop):
            run = await driver.run()
        self.outcome.interrupted = run.interrupted
        if run.lost:
            raise BenchError(f"the server at {client.base_url} went away while it was warmed up")

    async def _stage(self, client: Client, stage: int, load: Load) -> None:
        jobs, due = self._work.stages[stage], self._work.due[stage]
        scraper = Scraper(client, self._plan.scrape_interval)
        await scraper.begin()
        with Meter(self._console, load.name, len(jobs)) as meter:

            def ended(record: Any, started: float) -> None:
                meter.add(record)
                self._outputs.add(record, started, stage)

            driver = Driver(client, jobs, due, load, on_end=ended)
            beside = [asyncio.create_task(work) for work in (scraper.watch(time.perf_counter()), meter.show(driver))]
            with on_interrupt(driver.stop):
                run = await driver.run()
            for task in beside:
                task.cancel()
        server = await scraper.finish()
        self._note(stage, run, server, scraper.timeline)

    def _note(self, stage: int, run: StageRun, server: dict[str, Any] | None, timeline: list[dict[str, Any]]) -> None:
        """Take the figures of a stage, and put them on disk."""
        plan, load = self._plan, self._plan.loads[stage]
        self.outcome.interrupted, self.outcome.lost = run.interrupted, run.lost
        head = {"name": load.name, "stage": stage, "seed": plan.stage_seed(stage), "date": _now(), "backend": "openai",
                "model_id": self.outcome.model}  # fmt: skip
        figures = stage_summary(run, load, plan.slo, max(self._work.due[stage]))
        self.outcome.stages.append({**head, **figures, "server": server, "timeline": timeline})
        self._outputs.summarise(summary_of(plan, self.outcome, self._work.corpus))


def summary_of(plan: Plan, outcome: Outcome, corpus: str) -> dict[str, Any]:
    """summary.json: the settings and the stages; the keys of a single stage also stand at the top, where vLLM's tools look."""
    settings = {
        "base_url": plan.base_url,
        "model": outcome.model,
        "endpoint": plan.endpoint,
        "workload": plan.workload,
        "workload_options": {name: _plain(value) for name, value in asdict(plan.options).items()},
        "num_requests": plan.count,
        "tokenizer": plan.tokenizer,
        "corpus": corpus,
        "seed": plan.seed,
        "same_prompts": plan.same_prompts,
        "mode": plan.loads[0].mode,
        "loads": [load.name for load in plan.loads],
        "warmup": plan.warmup,
        "retries": plan.retries,
        "timeout": plan.timeout,
        "extra_body": dict(plan.extra_body),
        "machine": describe(),
        "date": _now(),
        "definitions": DEFINITIONS,
    }
    top = outcome.stages[0] if len(plan.loads) == len(outcome.stages) == 1 else {}
    return {
        **top,
        "settings": settings,
        "interrupted": outcome.interrupted,
        "server_lost": outcome.lost,
        "stages": outcome.stages,
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool, type(None), list, tuple, dict)) else str(value)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def new_loop() -> asyncio.AbstractEventLoop:
    """uvloop where there is one: it halves the client's work per chunk, which the server's cores would have to do."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


@contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `stop` meanwhile, where signals can be handled (in the main thread)."""
    loop = asyncio.get_running_loop()
    handled = False
    with suppress(NotImplementedError, RuntimeError, ValueError):
        loop.add_signal_handler(signal.SIGINT, stop)
        handled = True
    try:
        yield
    finally:
        if handled:
            loop.remove_signal_handler(signal.SIGINT)


def bench(plan: Plan, console: Console) -> Outcome:
    """Run a plan and write its files and its report. Raises ConfigError, BenchError or OSError."""
    work = build(plan)
    with Outputs(plan.out, plan.workload, save_text=plan.save_text) as outputs:
        test = Bench(plan, work, outputs, console)
        try:
            with asyncio.Runner(loop_factory=new_loop) as runner:
                runner.run(test.run())
        except KeyboardInterrupt:
            test.outcome.interrupted = True
        if test.outcome.stages:
            outputs.summarise(summary_of(plan, test.outcome, work.corpus))
    return test.outcome
