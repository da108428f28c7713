"""Which selector a request uses: its own wishes over the server's defaults, checked against the model.

Requests with the same method, budget and options share one selector; a selector that no open request uses is forgotten when too
many have gathered.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvloom.engine.bounds import shown
from kvloom.engine.errors import ConfigError, InvalidRequestError
from kvloom.engine.requests.request import KVOptions, Request
from kvloom.engine.requests.sampling import MAX_DRAFT_TOKENS
from kvloom.engine.requests.state import WORD
from kvloom.engine.selection import METHODS, SELECTIONS, Geometry, MethodStats, Selector
from kvloom.engine.selection.base import Method, Whole, read_options
from kvloom.kernels.interface import Kernels

MOST_SELECTORS = 64


class Defaults(NamedTuple):
    """The server's own choice."""

    selection: str = "dense"
    budget: int | None = None
    options: Mapping[str, Any] = {}
    draft: bool = False
    draft_tokens: int = 4


class Policy(NamedTuple):
    """What one request does."""

    selector: Selector | None
    """None: dense."""
    draft_tokens: int
    """Tokens drafted by the selector before a dense step verifies them; 0: its output is taken as it is."""


@dataclass(slots=True)
class _Entry:
    selector: Selector
    open: set[Request] = field(default_factory=set)
    """Requests that use it."""


class Selectors:
    """All selectors in use. Called on the engine's thread."""

    def __init__(self, defaults: Defaults, geometry: Geometry, kernels: Kernels, prompt_rows: int) -> None:
        """prompt_rows: rows that a step has for prompts whatever else runs. Raises ConfigError if the defaults cannot work."""
        self._prompt_rows = prompt_rows
        self.stats: dict[str, MethodStats] = {name: MethodStats() for name in METHODS}
        self._geometry, self._kernels, self._defaults = geometry, kernels, defaults
        self._entries: OrderedDict[tuple[str, int, Any], _Entry] = OrderedDict()
        try:
            self._check_budget(defaults.budget)
            self._draft_tokens(defaults.draft_tokens)
            budget = None if defaults.selection == "dense" else defaults.budget  # then it is for requests that ask for a method
            self.policy(KVOptions(draft=defaults.draft or None, budget=budget))
        except InvalidRequestError as error:
            raise ConfigError(str(error).replace("kv.", "--")) from None

    def policy(self, kv: KVOptions) -> Policy:
        """Raises InvalidRequestError naming the option that cannot work."""
        defaults = self._defaults
        name = kv.selection or defaults.selection
        own = name == defaults.selection
        if name not in SELECTIONS:
            raise InvalidRequestError(f"kv.selection is {shown(name)}; allowed: {', '.join(SELECTIONS)}", param="kv.selection")
        draft = defaults.draft and own if kv.draft is None else kv.draft
        if name == "dense":
            self._refuse_for_dense(kv)
            return Policy(None, 0)
        options = read_options(METHODS[name], kv.options or (defaults.options if own else {}))
        selector = self._selector(name, self._budget(METHODS[name], options, kv.budget), options)
        self._refuse_for_some_heads(name, selector)
        if not draft:
            if kv.draft_tokens is not None:
                raise InvalidRequestError(
                    "kv.draft_tokens is given without kv.draft; set draft to true", param="kv.draft_tokens"
                )
            return Policy(selector, 0)
        if selector.prompts == "sparse":
            raise InvalidRequestError(
                f"kv.draft verifies against dense KV, but {name} with these options computes the prompt sparsely; "
                "leave out either of them",
                param="kv.draft",
            )
        tokens = kv.draft_tokens if kv.draft_tokens is not None else defaults.draft_tokens
        return Policy(selector, self._draft_tokens(tokens))

    def open(self, selector: Selector, request: Request) -> None:
        """A request starts to use a selector that `policy` gave."""
        self._entry(selector).open.add(request)

    def close(self, selector: Selector, request: Request) -> None:
        """It has ended. Harmless if it was never opened."""
        self._entry(selector).open.discard(request)

    def too_large(self, kv: KVOptions, memory: int) -> InvalidRequestError:
        """The error for a request whose method's state `memory` bytes can never hold."""
        selector, largest = self.policy(kv).selector, self._largest_budget(kv, memory)
        assert selector is not None
        wanted = sum(record.words for record in selector.records) * WORD
        fits = f"a kv.budget of at most {largest} fits, and so do" if largest else "what fits are"
        return InvalidRequestError(
            f"what this selection remembers of the request takes {wanted} bytes, and this server has {memory} for all requests "
            f"(--selection-memory); {fits} prompts and outputs of together at most {selector.budget} tokens, which need none",
            param="kv.budget",
        )

    def _largest_budget(self, kv: KVOptions, memory: int) -> int:
        """The largest budget with which a request's state takes at most `memory` bytes; 0 if there is none."""
        name = kv.selection or self._defaults.selection
        method, own = METHODS[name], name == self._defaults.selection
        options = read_options(method, kv.options or (self._defaults.options if own else {}))
        if not method.takes_budget(options):
            return 0

        def state(budget: int) -> int:
            """Bytes; none for budgets that are too small for the other options, so that larger ones are tried."""
            try:
                records = method.make(options, budget, self._geometry, self._kernels).records
            except InvalidRequestError:
                return 0
            return sum(record.words for record in records) * WORD

        largest = bisect.bisect_right(range(1, self._geometry.max_len + 1), memory, key=state)
        return largest if largest and state(largest) else 0

    def _entry(self, selector: Selector) -> _Entry:
        return next(entry for entry in self._entries.values() if entry.selector is selector)

    def _refuse_for_dense(self, kv: KVOptions) -> None:
        for option, value in (("budget", kv.budget), ("draft", kv.draft or None), ("draft_tokens", kv.draft_tokens)):
            if value is not None:
                raise InvalidRequestError(
                    f"kv.{option} is given, but the selection is dense, which reads everything; choose a kv.selection: "
                    f"{', '.join(METHODS)}",
                    param=f"kv.{option}",
                )

    def _refuse_for_some_heads(self, name: str, selector: Selector) -> None:
        if self._geometry.partial and isinstance(selector, Whole) and selector.whole:
            raise InvalidRequestError(
                f"kv.selection is {name}, but this server's --retention keeps whole sequences of some heads alone: "
                f"{selector.whole}",
                param="kv.selection",
            )

    def _draft_tokens(self, tokens: int) -> int:
        if type(tokens) is not int or not 1 <= tokens <= MAX_DRAFT_TOKENS:
            raise InvalidRequestError(
                f"kv.draft_tokens is {shown(tokens)}; allowed: 1 to {MAX_DRAFT_TOKENS}", param="kv.draft_tokens"
            )
        return tokens

    def _budget(self, method: Method, options: Any, asked: int | None) -> int:
        """The budget of a request: its own, the server's, or the method's."""
        longest = self._geometry.max_len
        if not method.takes_budget(options):
            if asked is not None:
                raise InvalidRequestError(
                    f"kv.budget is {asked}, but {method.name} has no budget with these options; leave it out", param="kv.budget"
                )
            return longest
        budget = self._defaults.budget if asked is None else asked
        self._check_budget(budget)
        return min(method.default_budget, longest) if budget is None else budget

    def _check_budget(self, budget: int | None) -> None:
        longest = self._geometry.max_len
        if budget is not None and (type(budget) is not int or not 1 <= budget <= longest):
            raise InvalidRequestError(
                f"kv.budget is {shown(budget)}; allowed: 1 to {longest}, this server's context", param="kv.budget"
            )

    def _selector(self, name: str, budget: int, options: Any) -> Selector:
        key = (name, budget, options)
        entry = self._entries.get(key)
        if entry is None:
            selector = METHODS[name].make(options, budget, self._geometry, self._kernels)
            if (piece := max(selector.grid, selector.tail)) > self._prompt_rows and piece > 0:
                raise InvalidRequestError(
                    f"kv.{name} computes prompts in pieces of {piece} tokens, but a step of this server has room for "
                    f"{max(0, self._prompt_rows)} beside its streams (max_batched_tokens less max_num_seqs); make them "
                    "smaller, or have the operator change one of these",
                    param=f"kv.{name}",
                )
            selector.stats = self.stats[name]
            entry = self._entries[key] = _Entry(selector)
            self._forget()
        self._entries.move_to_end(key)
        return entry.selector

    def _forget(self) -> None:
        for key, entry in list(self._entries.items())[:-1]:
            if len(self._entries) <= MOST_SELECTORS:
                return
            if not entry.open:
                del self._entries[key]
