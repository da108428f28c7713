"""A thousand replicas and the fronts before them, in simulated time: the router that serves, engines that compute nothing.

    Call      a request: its keys, its front, what has become of it
    Engine    one replica: a first-come queue, steps that take what they were measured to take, a cache of keys
    Router    who chooses (`simulated_routers`)
    Fleet     all of it, event by event: arrivals, ends of steps, what replicas tell once a second, failures

A step takes a fixed time, so much per computed row and so much per sequence that decodes (`simulate_scheduler.Machine`).
No clock is read: the same calls give the same outcome everywhere. Messages between fronts and replicas take no time.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from kvloom.deploy import placement
from kvloom.deploy.prompt_keys import CHUNK, Prompt
from kvloom.loadtest.simulate_scheduler import Machine

LOST_SECONDS = 0.07
"""Until fronts know that a replica is dead, as measured with Ray (`ActorDiedError` in mid-stream)."""
RESTART_SECONDS = 6.0
"""Until another engine answers in its place, as measured."""
REPAIRED = 0.15
"""Part of the tokens of a reused segment that KVShare computes anew: its `ratio` by default."""
TICKS = 20
"""Replicas tell what waits once a second, so many groups of them one after another, each told to all fronts at once."""


@dataclass(slots=True, eq=False)
class Call:
    """A request."""

    number: int
    at: float
    """Seconds, when it comes."""
    prompt: Prompt
    output: int
    """Tokens that are generated, 1 or more."""
    front: int
    after: tuple[int, ...] = ()
    """Keys of the full chunks of prompt and answer, where they are asked about again; else those of the prompt count."""
    key: str = ""
    """By which its front knows it."""
    left: int = -1
    """Prompt tokens to compute, negative before it is admitted."""
    found: int = 0
    """Prompt tokens that were found where it went first."""
    first: float = math.nan
    """When its first token was there."""


class Cache:
    """The keys that a replica really holds, the one used longest ago forgotten first."""

    def __init__(self, capacity: float) -> None:
        """capacity: in tokens."""
        self.capacity, self.tokens = capacity, 0
        self.held: OrderedDict[int, int] = OrderedDict()

    def match(self, prompt: Prompt) -> tuple[int, int]:
        """(tokens of the exact prefix, tokens of reused segments behind it). Segments fill the prompt from its beginning."""
        held = self.held
        prefix = CHUNK * sum(1 for _ in itertools.takewhile(held.__contains__, prompt.prefixes))
        reused = end = 0
        for key, tokens in prompt.segments:
            end += tokens
            if end > prefix and key in held:
                reused += min(tokens, end - prefix)
        return prefix, reused

    def hold(self, prompt: Prompt, after: tuple[int, ...] = ()) -> None:
        """Hold what a prompt left behind, and its answer."""
        held = self.held
        for key in reversed(after or prompt.prefixes):
            if key in held:
                held.move_to_end(key)
            else:
                held[key] = CHUNK
                self.tokens += CHUNK
        for key, tokens in prompt.segments:
            if key in held:
                held.move_to_end(key)
            else:
                held[key] = tokens
                self.tokens += tokens
        while self.tokens > self.capacity:
            self.tokens -= held.popitem(last=False)[1]


class Engine:
    """One replica. Prompts are served first come first, in chunks beside the sequences that decode."""

    def __init__(self, name: str, machine: Machine, capacity: int, fleet: Fleet) -> None:
        self.name, self.machine, self.fleet = name, machine, fleet
        self.cache = Cache(capacity)
        self.calls: dict[int, Call] = {}
        self.alive = True
        self.work = 0.0
        """Seconds of rows and of sequences that decode, within what is measured."""
        self._waiting: deque[Call] = deque()
        self._queued = self._running = self._streams = self._step = 0
        self._ends: list[tuple[int, int, Call]] = []  # (step, number, call) of sequences that decode: a heap
        self._finishing: list[Call] = []
        self._began = self._seconds = self._cost = 0.0  # of the steps that run now, all the same: when, each takes, each works
        self._steps = self._version = 0  # how many, 0 while idle; which event ends them

    @property
    def waits(self) -> float:
        """What it tells, as `Replica.record_routing_stats` does: whole prompts that wait, and something for each sequence."""
        return self._queued + placement.DECODE_TOKENS * len(self.calls)

    def arrive(self, call: Call, now: float) -> None:
        """A call comes."""
        self.calls[call.number] = call
        call.left = -1
        self._waiting.append(call)
        self._queued += call.prompt.tokens
        if not self._steps:
            self._plan(now)
        elif self._steps > 1:  # only decodes: the step that runs now is the last one without the newcomer
            self._steps = min(self._steps, int((now - self._began) / self._seconds) + 1)
            self._schedule()

    def ended(self, version: int, now: float) -> None:
        """The steps that ran are over. Nothing happens if they were cut short since."""
        if version != self._version or not self.alive:
            return
        self._step += self._steps
        if self.fleet.measured(now):
            self.work += self._steps * self._cost
        for call in self._finishing:
            self._streams += 1
            heapq.heappush(self._ends, (self._step + call.output - 1, call.number, call))
            self.cache.hold(call.prompt)
            self.fleet.began(call, now)
        while self._ends and self._ends[0][0] <= self._step:
            call = heapq.heappop(self._ends)[2]
            self._streams -= 1
            self._running -= 1
            if call.after:
                self.cache.hold(call.prompt, call.after)
            del self.calls[call.number]
            self.fleet.ended(call)
        self._steps = 0
        if self._streams or self._waiting:
            self._plan(now)

    def die(self) -> list[Call]:
        """All that it was to answer. Sequences that decoded go on elsewhere with their tokens as a part of the prompt."""
        self.alive = False
        for end, _, call in self._ends:
            left = end - self._step
            call.prompt = replace(call.prompt, tokens=call.prompt.tokens + call.output - left)
            call.output = max(1, left)
        return list(self.calls.values())

    def _plan(self, now: float) -> None:
        """Begin a step, or so many as pass before anything changes."""
        machine = self.machine
        decoding = machine.step_seconds + self._streams * machine.stream_seconds
        most = machine.max_tokens - self._streams
        if self._streams:
            most = int(min(most, max(machine.longest_step - decoding, decoding) * machine.rows_per_second + 1))
        rows, self._finishing = 0, []
        while self._waiting and rows < most:
            call = self._waiting[0]
            if call.left < 0:
                if self._running >= machine.max_seqs:
                    break
                self._admit(call)
            took = min(most - rows, call.left)
            call.left -= took
            rows += took
            if call.left:
                break
            self._finishing.append(self._waiting.popleft())
        self._steps = 1 if rows else self._ends[0][0] - self._step
        self._cost = self._streams * machine.stream_seconds + rows / machine.rows_per_second
        self._began, self._seconds = now, machine.step_seconds + self._cost
        self._schedule()

    def _admit(self, call: Call) -> None:
        prefix, reused = self.cache.match(call.prompt)
        call.left = max(1, call.prompt.tokens - prefix - reused + math.ceil(REPAIRED * reused))
        self._queued -= call.prompt.tokens
        self._running += 1
        if call.first != call.first:  # it is not one that goes on
            call.found = min(prefix + reused, call.prompt.tokens - 1)

    def _schedule(self) -> None:
        self._version += 1
        self.fleet.schedule(self._began + self._steps * self._seconds, self.ended, self._version)


class Router(Protocol):
    """Who chooses."""

    def present(self, names: Sequence[str]) -> None:
        """The replicas that there are now."""

    def pick(self, call: Call) -> str:
        """The replica where a call goes, and it goes there now."""

    def began(self, call: Call) -> None:
        """Its first token is there; `call.found` says what was found."""

    def ended(self, call: Call) -> None:
        """It is over."""

    def report(self, name: str, waits: float) -> None:
        """What a replica tells all fronts."""


@dataclass(slots=True)
class Failure:
    """Replicas that die at once."""

    at: float
    """Seconds."""
    part: float = 0.1
    """Of all replicas."""


@dataclass(slots=True)
class Fleet:
    """Engines behind a router."""

    router: Router
    machine: Machine
    replicas: int
    capacity: int
    """Tokens that each replica's cache holds."""
    window: tuple[float, float] = (0.0, math.inf)
    """Seconds between which work is measured."""
    engines: dict[str, Engine] = field(default_factory=dict)
    done: list[Call] = field(default_factory=list)
    """Calls that had their first token, in that order."""
    retried: int = 0
    """Calls whose replica died."""
    _events: list[tuple[float, int, Callable[[Any, float], None], Any]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=itertools.count)
    _coming: bool = True
    _lost: list[Call] = field(default_factory=list)

    def run(self, calls: Iterable[Call], failure: Failure | None = None) -> list[Call]:
        """Answer calls, given in order of time, to the last one's end. Returns them in the order of their first tokens."""
        self._start([f"replica-{i}" for i in range(self.replicas)], 0.0)
        for tick in range(TICKS):
            self.schedule(tick / TICKS, self._report, tick)
        if failure is not None:
            self.schedule(failure.at, self._fail, failure.part)
        for call in calls:
            self._until(call.at)
            self._route(call, call.at)
        self._coming = False
        self._until(math.inf)
        return self.done

    def schedule(self, at: float, what: Callable[[Any, float], None], argument: Any) -> None:
        """Call `what(argument, at)` then."""
        heapq.heappush(self._events, (at, next(self._order), what, argument))

    def measured(self, now: float) -> bool:
        """Whether work counts now."""
        return self.window[0] <= now < self.window[1]

    def began(self, call: Call, now: float) -> None:
        """Called by an engine: the first token of a call is there."""
        if call.first != call.first:
            call.first = now
            self.done.append(call)
        self.router.began(call)

    def ended(self, call: Call) -> None:
        """Called by an engine: a call is complete."""
        self.router.ended(call)

    def _until(self, time: float) -> None:
        events = self._events
        while events and events[0][0] <= time:
            now, _, what, argument = heapq.heappop(events)
            what(argument, now)

    def _route(self, call: Call, now: float) -> None:
        engine = self.engines[self.router.pick(call)]
        if engine.alive:
            engine.arrive(call, now)
        else:
            self._lost.append(call)

    def _start(self, names: Sequence[str], now: float) -> None:
        for name in names:
            self.engines[name] = Engine(name, self.machine, self.capacity, self)
        self.router.present([name for name, engine in self.engines.items() if engine.alive])
        for name in names:
            self.router.report(name, 0.0)

    def _report(self, tick: int, now: float) -> None:
        for engine in itertools.islice(self.engines.values(), tick, None, TICKS):
            if engine.alive:
                self.router.report(engine.name, engine.waits)
        if self._coming:
            self.schedule(now + 1.0, self._report, tick)

    def _fail(self, part: float, now: float) -> None:
        for engine in random.Random(0).sample(list(self.engines.values()), round(part * self.replicas)):
            self._lost += engine.die()
        self.schedule(now + LOST_SECONDS, self._noticed, None)

    def _noticed(self, _: None, now: float) -> None:
        """Fronts know who is dead, and send again what was there."""
        self.router.present([name for name, engine in self.engines.items() if engine.alive])
        lost, self._lost = self._lost, []
        self.retried += len(lost)
        for call in lost:
            call.key += "+"
            self._route(call, now)
        gone = sum(not engine.alive for engine in self.engines.values())
        self.schedule(now + RESTART_SECONDS - LOST_SECONDS, self._start, [f"replica-{self.replicas + i}" for i in range(gone)])


def loads(engines: Mapping[str, Engine]) -> list[float]:
    """Seconds of work of every engine that lives."""
    return [engine.work for engine in engines.values() if engine.alive]
