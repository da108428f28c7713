"""One load test: its jobs made, its stages run, its files written.

Ctrl-C and a server that goes away end a run early; what was measured is written all the same.
"""

from __future__ import annotations

import asyncio
import datetime
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from rich.console import Console

from kvloom.engine.errors import ConfigError, ModelError, ModelNotFoundError
from kvloom.loadtest.client.arrivals import Load, due_times
from kvloom.loadtest.client.client import Client, Job
from kvloom.loadtest.client.drive import Driver, StageRun, check_order
from kvloom.loadtest.client.ready import check, first_model, wait_until_ready
from kvloom.loadtest.client.scrape import Scraper
from kvloom.loadtest.load.measures import DEFINITIONS, stage_summary
from kvloom.loadtest.load.outputs import Outputs
from kvloom.loadtest.load.plan import Plan
from kvloom.loadtest.load.search import Search
from kvloom.loadtest.load.terminal import Meter
from kvloom.loadtest.study.flags import BenchError
from kvloom.loadtest.study.machine import describe
from kvloom.loadtest.workloads import WORKLOADS, Workload
from kvloom.loadtest.workloads.corpus import TextSource
from kvloom.loadtest.workloads.synthetic import RandomOptions, random_ids

WARMUP_SEED = 1_000_003
"""Added to the seed, so that warming up does not fill the cache with the prompts that are measured."""
WARMUP_CONCURRENCY = 4


class Stage(NamedTuple):
    """The jobs of one stage, and the seconds after its start at which each is due."""

    load: Load
    jobs: list[Job]
    due: list[float]


class Work:
    """Makes the jobs of a run. Raises ConfigError for a workload that cannot be made or sent."""

    def __init__(self, plan: Plan) -> None:
        """Makes what is known before the first stage has ended, so that a mistake shows before anything is sent."""
        self._plan = plan
        self._workload = WORKLOADS[plan.workload]
        try:
            self._text = TextSource.load(plan.tokenizer)
        except (ModelError, ModelNotFoundError) as error:
            raise ConfigError(f"--tokenizer {plan.tokenizer}: {error}") from None
        self.corpus = self._text.fingerprint
        """Of the text that prompts were made of."""
        self.stages = [self.stage(i, load) for i, load in enumerate(plan.loads)]
        self.warmup = self._warmup()

    def stage(self, index: int, load: Load) -> Stage:
        """One stage."""
        seed = self._plan.stage_seed(index)
        jobs = self._build(self._workload, self._plan.options, seed, self._plan.requests(load))
        try:
            return Stage(load, jobs, due_times(load, jobs, seed))
        except ValueError:
            ways = "give --rate, --ramp-up, --concurrency or --stages"
            raise ConfigError(f"workload {self._workload.name} has no times of its own; {ways}") from None

    def _warmup(self) -> list[Job]:
        """Requests of the same kind with other prompts; random ones if the workload has no others."""
        workload, options = (self._workload, self._plan.options) if self._workload.endless else (random_ids, RandomOptions())
        return self._build(workload, options, self._plan.seed + WARMUP_SEED, self._plan.warmup) if self._plan.warmup else []

    def _build(self, workload: Workload, options: Any, seed: int, count: int) -> list[Job]:
        chat = self._plan.endpoint == "chat"
        try:
            jobs = workload.build(options, self._text, seed, count, chat=chat)
            check_order(jobs)
        except ConfigError:
            raise
        except (ValueError, OSError) as error:
            raise ConfigError(f"workload {workload.name}: {error}") from None
        if not chat and any(job.messages for job in jobs):
            raise ConfigError("the file holds messages, which the completions endpoint does not take; use --endpoint chat")
        return jobs


@dataclass(slots=True)
class Outcome:
    """What a run left."""

    model: str = ""
    stages: list[dict[str, Any]] = field(default_factory=list)
    search: dict[str, Any] | None = None
    """What --find-rate found."""
    interrupted: bool = False
    lost: bool = False


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
            first = (self._work.warmup or self._work.stages[0].jobs)[0]
            await check(client, first, plan.tenant_keys)
            await self._warm_up(client)
            self._outputs.begin()
            await (self._search(client) if plan.find_steps else self._all(client))

    async def _all(self, client: Client) -> None:
        """Stage after stage, until one ends early."""
        for index, stage in enumerate(self._work.stages):
            await self._stage(client, index, stage)
            if self.outcome.interrupted or self.outcome.lost:
                return

    async def _search(self, client: Client) -> None:
        """Stages at the rates that a search asks for."""
        plan, first = self._plan, self._plan.loads[0]
        assert first.rate is not None and plan.find_steps is not None
        search = Search(first.rate, plan.slo_share, plan.find_steps)
        while (rate := search.next()) is not None:
            index = len(search.steps)
            await self._stage(client, index, self._work.stage(index, replace(first, rate=rate)))
            if self.outcome.interrupted or self.outcome.lost:
                return
            search.add(rate, self.outcome.stages[-1]["goodput_share"])
            self.outcome.search = search.result()
            self._console.print(f"step {index + 1}: rate {rate:g}, {search.steps[-1].share:.1%} of requests within the limits")

    def _client(self, model: str) -> Client:
        names = ("api_key", "tenant_keys", "endpoint", "extra_body", "headers", "retries", "timeout")
        return Client(self._plan.base_url, model, **{name: getattr(self._plan, name) for name in names})

    async def _warm_up(self, client: Client) -> None:
        jobs = self._work.warmup
        load = Load(concurrency=self._plan.loads[0].concurrency or WARMUP_CONCURRENCY)
        driver = Driver(client, jobs, [0.0] * len(jobs), load)
        with on_interrupt(driver.stop):
            run = await driver.run()
        self.outcome.interrupted = run.interrupted
        if run.lost:
            raise BenchError(f"the server at {client.base_url} went away while it was warmed up")

    async def _stage(self, client: Client, index: int, stage: Stage) -> None:
        load, jobs, due = stage
        scraper = Scraper(client, self._plan.scrape_interval)
        await scraper.begin()
        with Meter(self._console, load.name, len(jobs)) as meter:

            def ended(record: Any, started: float) -> None:
                meter.add(record)
                self._outputs.add(record, started, index)

            driver = Driver(client, jobs, due, load, on_end=ended)
            beside = [asyncio.create_task(work) for work in (scraper.watch(time.perf_counter()), meter.show(driver))]
            with on_interrupt(driver.stop):
                run = await driver.run()
            for task in beside:
                task.cancel()
        server = await scraper.finish()
        self._note(index, stage, run, server, scraper.timeline)

    def _note(
        self, index: int, stage: Stage, run: StageRun, server: dict[str, Any] | None, timeline: list[dict[str, Any]]
    ) -> None:
        """Take the figures of a stage, and put them on disk."""
        plan, load = self._plan, stage.load
        self.outcome.interrupted, self.outcome.lost = run.interrupted, run.lost
        head = {"name": load.name, "stage": index, "seed": plan.stage_seed(index), "date": _now(), "backend": "openai",
                "model_id": self.outcome.model}  # fmt: skip
        figures = stage_summary(run, load, plan.slo, max(stage.due), plan.percentiles)
        self.outcome.stages.append({**head, **figures, "server": server, "timeline": timeline})
        self._outputs.summarise(summary_of(plan, self.outcome, self._work.corpus))


def summary_of(plan: Plan, outcome: Outcome, corpus: str) -> dict[str, Any]:
    """summary.json: the settings and the stages; the keys of a single stage also stand at the top, where vLLM's tools look."""
    same = {name: getattr(plan, name) for name in ("tokenizer", "seed", "same_prompts", "warmup", "retries", "timeout")}
    settings = {
        "base_url": plan.base_url,
        "model": outcome.model,
        "endpoint": plan.endpoint,
        "workload": plan.workload,
        "workload_options": asdict(plan.options),
        "num_requests": plan.count,
        **same,
        "corpus": corpus,
        "mode": plan.loads[0].mode,
        "loads": [stage["name"] for stage in outcome.stages],
        "slo_share": plan.slo_share if plan.slo else None,
        "extra_body": dict(plan.extra_body),
        "headers": sorted(plan.headers),
        "machine": describe(),
        "date": _now(),
        "definitions": DEFINITIONS,
    }
    top = outcome.stages[0] if len(plan.loads) == len(outcome.stages) == 1 and not outcome.search else {}
    ended = {"interrupted": outcome.interrupted, "server_lost": outcome.lost, "search": outcome.search}
    return {**top, "settings": settings, **ended, "stages": outcome.stages}


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
    work = Work(plan)
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
