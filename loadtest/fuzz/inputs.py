"""What the fuzzer sends: requests whose every field is drawn, mostly within what is allowed, now and then far from it."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from kvloom.engine import KVOptions, SamplingParams
from kvloom.engine.bounds import range_of
from kvloom.engine.constraint.options import StructuredOutput
from kvloom.engine.reuse.kvshare.options import RepairOptions
from kvloom.engine.selection import METHODS
from kvloom.loadtest.fuzz.constraints import constraint

HOSTILE: tuple[Any, ...] = (
    True, -1, 0, 2**31, 2**63 - 1, 10**30, 10**5000, -0.5, math.nan, math.inf, "x" * 300, [], [1, 1], {}, None)  # fmt: skip
HOSTILE_SHARE = 0.02
"""Of values that are drawn from `HOSTILE`, whatever the field."""
TENANTS = ("", "", "alice", "bob", "carol", "press")
SCOPES = (None, None, None, None, "none", "tenant", "tenant", "group", "public", "everybody")


class Sent(NamedTuple):
    """One request of the fuzzer's."""

    prompt: list[Any]
    sampling: Callable[[], SamplingParams]
    """Raises InvalidRequestError."""
    kv: Callable[[], KVOptions]
    priority: int
    tenant: str
    salt: str


class Inputs:
    """A source of requests, the same for the same seed."""

    def __init__(
        self, seed: int, vocab: int, longest: int, *, methods: Sequence[str], priorities: bool, constrained: float
    ) -> None:
        """longest: prompt + output that the engine takes; methods: selections to draw from; constrained: share of requests
        with a grammar."""
        self._constrained = constrained
        self.random = random.Random(seed)
        self._vocab, self._longest = vocab, longest
        self._methods, self._priorities = methods, priorities
        self._texts = [self._tokens(self.random.randint(20, 120)) for _ in range(12)]
        """Pieces that prompts have in common."""

    def request(self) -> Sent:
        """The next one."""
        source, prompt = self.random, self._prompt()
        sampling, kv = self._sampling(), self._kv()
        asked = constraint(source) if source.random() < self._constrained else None
        return Sent(
            prompt=prompt,
            sampling=lambda: SamplingParams(**sampling, structured=None if asked is None else StructuredOutput(**asked)),
            kv=lambda: KVOptions(**kv),
            priority=self._odd(source.randint(-3, 3)) if self._priorities and source.random() < 0.3 else 0,
            tenant=source.choice(TENANTS),
            salt=source.choice(("", "", "", "s")),
        )

    def _tokens(self, count: int) -> list[int]:
        return [self.random.randrange(self._vocab) for _ in range(count)]

    def _prompt(self) -> list[Any]:
        source = self.random
        if source.random() < 0.01:
            return source.choice([[], [-1], [self._vocab], [5] * (self._longest + 1), [10**20], [5] * self._longest])
        if source.random() < 0.4:
            return self._tokens(source.randint(1, 40))
        prompt: list[int] = []
        for text in source.sample(self._texts, source.randint(1, 3)):
            prompt += [*text, *self._tokens(source.randint(0, 9))]
        return prompt[: self._longest - source.randint(4, 40)]

    def _odd(self, value: Any) -> Any:
        return self.random.choice(HOSTILE) if self.random.random() < HOSTILE_SHARE else value

    def _sampling(self) -> dict[str, Any]:
        source, fields = self.random, {"max_tokens": self.random.choice([1, 1, 2, 3, 4, 6, 8, 12, 24])}
        maybe: dict[str, Callable[[], Any]] = {
            "temperature": lambda: source.choice([0.0, 0.0, 1e-6, 0.7, 1.0, 100.0]),
            "top_p": lambda: source.choice([0.0, 1e-9, 0.5, 0.95, 1.0]),
            "top_k": lambda: source.choice([-1, 1, 5, 10**6]),
            "min_p": lambda: source.choice([0.0, 0.1, 1.0]),
            "presence_penalty": lambda: source.uniform(-2, 2),
            "frequency_penalty": lambda: source.uniform(-2, 2),
            "repetition_penalty": lambda: source.choice([0.01, 0.5, 1.1, 100.0]),
            "seed": lambda: source.choice([-1, 0, 7, -(2**63), 2**64 - 1]),
            "min_tokens": lambda: source.randint(0, 2),
            "logit_bias": lambda: {source.randrange(self._vocab): source.uniform(-100, 100) for _ in range(3)},
            "stop": lambda: tuple(source.choice(["a", "the", "\ufffd", "x" * 256]) for _ in range(source.randint(0, 3))),
            "stop_token_ids": lambda: tuple(self._tokens(2)),
            "allowed_token_ids": lambda: tuple(self._tokens(source.choice([1, 2, 9, 200]))),
            "bad_words": lambda: tuple(source.choice(["a", "the", " e", "th", "\ufffd"]) for _ in range(source.randint(0, 4))),
            "logprob_token_ids": lambda: tuple(self._tokens(source.randint(0, 4))),
            "ignore_eos": lambda: True,
            "include_stop_str_in_output": lambda: True,
            "skip_special_tokens": lambda: False,
            "logprobs": lambda: source.choice([0, 1, 5, 20]),
            "prompt_logprobs": lambda: source.choice([0, 2, 20]),
            "forced_tokens": lambda: tuple(self._tokens(source.randint(0, 5))),
        }
        for name, make in maybe.items():
            if source.random() < 0.12:
                fields[name] = self._odd(make())
        return fields

    def _kv(self) -> dict[str, Any]:
        source, fields = self.random, dict[str, Any]()
        if source.random() < 0.02:
            return {"segment": source.choice(("tenant", "group", "public", "none"))}
        if self._methods and source.random() < 0.6:
            name = source.choice(self._methods)
            fields["selection"] = self._odd(name) if source.random() < 0.05 else name
            fields["budget"] = None if name == "razor_view" else source.choice([8, 16, 16, 32, 48, 64, self._odd(24)])
            fields["options"] = self._options(METHODS[name].options)
            if source.random() < 0.2:
                fields["draft"], fields["draft_tokens"] = True, self._odd(source.randint(1, 16))
        if source.random() < 0.4:
            fields["reuse"] = source.choice(["approx"] * 6 + ["exact", "off", self._odd("approx")])
            if fields["reuse"] == "approx":
                fields["reuse_options"] = self._options(RepairOptions)
                fields["share"] = source.choice(SCOPES)
        fields["explain"] = source.random() < 0.2
        return fields

    def _options(self, cls: Any) -> dict[str, Any]:
        """Some options of a method, by their declared types and ranges."""
        kinds = get_type_hints(cls)
        return {
            field.name: self._odd(self._value(kinds[field.name], field))
            for field in dataclasses.fields(cls)
            if self.random.random() < 0.15
        }

    def _value(self, kind: Any, field: dataclasses.Field[Any]) -> Any:
        source, bounds = self.random, range_of(field)
        if get_origin(kind) is Literal:
            return source.choice(get_args(kind))
        if kind is bool or bool in get_args(kind):
            return source.random() < 0.5
        if kind is float and bounds is not None:
            return source.choice([bounds.low, bounds.high, source.uniform(bounds.low, min(bounds.high, 2.0))])
        if bounds is None:
            return source.choice([*METHODS, "dense"])
        low, high = int(bounds.low), int(bounds.high)
        number = source.choice(
            [low, low + 1, source.randint(low, min(high, low + 40)), self._odd(high) if source.random() < 0.2 else low + 6]
        )
        lists = tuple in (get_origin(kind), *map(get_origin, get_args(kind)))
        return sorted({source.randint(0, 3) for _ in range(2)}) if lists else number
