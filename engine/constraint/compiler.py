"""Grammars, compiled once and kept: off the event loop and off the engine's thread, in bounded time and memory.

    compile    on the caller's thread, for scripts
    ready      on threads of its own that give way to the engine's; a tenant that asks for the same waits for the same

Tenants take turns (`lanes`), and what is large has a thread apart, behind which nothing small waits. The long part of compiling
that, for which the interpreter's lock is not held, is done by a thread that lets all others go first; not the rest, since who
holds the lock is waited for by the engine. The cache holds those that were used last.
"""

from __future__ import annotations

import asyncio
import bisect
import functools
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvloom.engine.config import StructuredOptions
from kvloom.engine.constraint.grammar import grammar_of, limits, problem
from kvloom.engine.constraint.lanes import Lanes
from kvloom.engine.constraint.options import COMPILE_SECONDS, StructuredOutput
from kvloom.engine.constraint.progress import Progress
from kvloom.engine.constraint.vocabulary import vocabulary
from kvloom.engine.errors import InvalidRequestError, OverloadedError
from kvloom.engine.text import Tokenizer

if TYPE_CHECKING:
    import llguidance

THREADS = 2
"""For what is not large."""
NICENESS = 10
LARGE = 16 * 1024
"""Characters from which on a grammar is large: half a millisecond for each 1024."""
WAITING_OF_TENANT = 32
"""Grammars of one tenant that may wait to be compiled."""
TRIAL_TOKENS = 32
"""A new grammar is followed for so many tokens, so that one that explodes is refused before anybody waits for it."""


class Grammar:
    """What an answer must look like, compiled."""

    def __init__(self, asked: StructuredOutput, matcher: llguidance.LLMatcher) -> None:
        self.asked = asked
        self._matcher = matcher

    def begin(self, asked: StructuredOutput) -> Progress:
        """An answer of this grammar. asked: as this request asks for it, which names its own field."""
        return Progress(asked, self._matcher.deep_copy())


class Compiler:
    """Makes grammars for one vocabulary. Safe to use from several threads."""

    def __init__(self, options: StructuredOptions, tokenizer: Tokenizer, vocab_size: int, ends: Collection[int]) -> None:
        """ends: tokens that end a text."""
        self._options, self._tokenizer, self._size, self._ends = options, tokenizer, vocab_size, ends
        self._lock, self._making = threading.Lock(), threading.Lock()
        self._made: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[StructuredOutput, Grammar] = OrderedDict()
        self._kept_size = 0
        self._coming: dict[tuple[StructuredOutput, str], Future[Grammar]] = {}
        self._wanted: Counter[Future[Grammar]] = Counter()
        """Requests that wait for what is coming."""
        self._waiting: Counter[str] = Counter()
        self._lanes, self._large = Lanes(THREADS, "kvloom-grammar", _give_way), Lanes(1, "kvloom-large", _give_way)
        self._times, self._times_sum = [0] * len(COMPILE_SECONDS), 0.0

    @property
    def kept(self) -> tuple[int, int]:
        """Grammars in the cache, and characters of what they were made from."""
        return len(self._kept), self._kept_size

    def compile(self, asked: StructuredOutput) -> Grammar:
        """Raises InvalidRequestError if there is no such grammar, or it takes too much."""
        return self._find(asked) or self._timed(asked)

    def figures(self) -> dict[str, Any]:
        """Those of `EngineStats` that are of grammars."""
        with self._lock:
            waiting, times = sum(self._waiting.values()), list(self._times)
            return {"grammars_waiting": waiting, "grammar_times": times, "grammar_times_sum": self._times_sum}

    async def ready(self, asked: StructuredOutput, tenant: str) -> Grammar:
        """The same, without holding up the event loop. Raises OverloadedError if too much of the tenant's waits."""
        if (found := self._find(asked)) is not None:
            return found
        self._check_size(asked)
        if self._waiting[tenant] >= WAITING_OF_TENANT:
            raise OverloadedError(f"{WAITING_OF_TENANT} grammars of this tenant wait to be compiled; try again later")
        with self._lock:
            self._waiting[tenant] += 1
        coming = None
        try:
            coming = self._begin(asked, tenant)
            compiled = asyncio.wrap_future(coming)
            compiled.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to look at it
            return await asyncio.wait_for(asyncio.shield(compiled), self._options.grammar_compile_seconds)
        except TimeoutError:
            allowed = self._options.grammar_compile_seconds
            raise asked.refused(f"it is not compiled after {allowed:g} s; allowed: {allowed:g} s; make it smaller") from None
        except InvalidRequestError as error:  # somebody else may have asked first, in another field
            raise InvalidRequestError(str(error).replace(f"{error.param}:", f"{asked.param}:", 1), asked.param) from None
        finally:
            self._leave(coming, tenant)

    def close(self) -> None:
        """End the threads; what has not begun is given up."""
        self._lanes.close()
        self._large.close()
        if "_aside" in self.__dict__:
            self._aside.shutdown(wait=False)

    def _find(self, asked: StructuredOutput) -> Grammar | None:
        with self._lock:
            if asked in self._kept:
                self._kept.move_to_end(asked)
            return self._kept.get(asked)

    def _begin(self, asked: StructuredOutput, tenant: str) -> Future[Grammar]:
        """What will be the grammar, or why there is none, for one more request, which must `_leave`."""
        with self._lock:
            key = asked, tenant  # not another tenant's: it may lie behind all that one sent
            if (coming := self._coming.get(key)) is None:
                lanes = self._large if asked.size >= LARGE else self._lanes
                coming = self._coming[key] = lanes.submit(tenant, lambda: self._find(asked) or self._timed(asked))
                coming.add_done_callback(lambda _: self._coming.pop(key, None))
            self._wanted[coming] += 1
        return coming

    def _leave(self, coming: Future[Grammar] | None, tenant: str) -> None:
        """A request no longer waits. What has not begun is given up with the last: others would wait for it in vain."""
        with self._lock:
            if coming is not None:
                self._wanted[coming] -= 1
                if not self._wanted[coming]:
                    del self._wanted[coming]
                    coming.cancel()  # with the lock held, so that nobody joins meanwhile
            self._waiting[tenant] -= 1
            if not self._waiting[tenant]:
                del self._waiting[tenant]

    def _timed(self, asked: StructuredOutput) -> Grammar:
        """Compile it, keep it, and count how long that takes. Raises InvalidRequestError."""
        began = time.monotonic()
        try:
            return self._keep(asked, self._make(asked))
        finally:
            took = time.monotonic() - began
            with self._lock:
                self._times[bisect.bisect_left(COMPILE_SECONDS, took)] += 1
                self._times_sum += took

    def _keep(self, asked: StructuredOutput, grammar: Grammar) -> Grammar:
        with self._lock:
            if self._kept.setdefault(asked, grammar) is grammar:
                self._kept_size += asked.size
            while len(self._kept) > self._options.grammar_cache_entries or self._kept_size > self._options.grammar_cache_size:
                dropped, _ = self._kept.popitem(last=False)
                self._kept_size -= dropped.size
        return grammar

    def _make(self, asked: StructuredOutput) -> Grammar:
        """Raises InvalidRequestError."""
        self._check_size(asked)
        if not self._ends:
            raise asked.refused("this model has no token that ends a text, so its output cannot be constrained")
        try:
            text = grammar_of(asked, self._special)
            from llguidance import LLMatcher

            build = functools.partial(LLMatcher, self._vocabulary, text, log_level=0, limits=limits())
            matcher = self._aside.submit(build).result() if asked.size >= LARGE else build()
        except InvalidRequestError:
            raise
        except (ValueError, RecursionError) as error:  # of the library, which tells so of what it cannot read
            raise asked.refused(problem(str(error))) from None
        if matcher.is_error():
            raise asked.refused(problem(matcher.get_error()))
        grammar = Grammar(asked, matcher)
        self._try(grammar)
        return grammar

    def _try(self, grammar: Grammar) -> None:
        """Follow it for a while along tokens that it allows. Raises InvalidRequestError if that takes too much."""
        trial, drawn = grammar.begin(grammar.asked), np.random.default_rng(0)
        mask = np.zeros((1, -(-self._size // 32)), np.int32)
        for _ in range(TRIAL_TOKENS):
            if trial.masks((), mask)[0]:
                return
            words = mask[0].view(np.uint32) & self.no_ends.view(np.uint32)
            counts = np.bitwise_count(words).cumsum()
            if not counts[-1]:
                return
            number = int(drawn.integers(counts[-1]))
            word = int(counts.searchsorted(number, "right"))
            bits = [bit for bit in range(32) if int(words[word]) >> bit & 1]
            trial.accept(32 * word + bits[number - int(counts[word])])

    def _check_size(self, asked: StructuredOutput) -> None:
        if asked.size > self._options.max_grammar_size:
            raise asked.refused(f"it has {asked.size} characters; allowed: {self._options.max_grammar_size}")

    @property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        with self._making:
            if self._made is None:
                self._made = vocabulary(self._tokenizer, self._size, self._ends)
        return self._made

    @cached_property
    def _special(self) -> frozenset[str]:
        return frozenset(self._tokenizer.special_text(token) for token in self._tokenizer.special_ids)

    @cached_property
    def _aside(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="kvloom-aside", initializer=_step_aside)

    @cached_property
    def no_ends(self) -> npt.NDArray[np.int32]:
        """[words]: a mask of all tokens but those that end a text."""
        mask = np.full(-(-self._size // 32), 0xFFFFFFFF, np.uint32)
        for token in self._ends:
            mask[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
        return mask.view(np.int32)


def _give_way(niceness: int = NICENESS) -> None:
    """Let the engine's threads go first."""
    if hasattr(os, "setpriority"):
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def _step_aside() -> None:
    """Let everybody go first. Not SCHED_IDLE: this thread holds the interpreter's lock for moments, and where others keep all
    cores busy it would get none to give it back on."""
    _give_way(19)
