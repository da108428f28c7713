"""Which replica a prompt goes to: where the least has to be computed, unless too much waits there already.

    hit(r)    = 64 x the keys in front (`deploy.prompt_keys`) that replica r is thought to hold, and the segments of the prompt
                that it computed once
    waits(r)  = prompt tokens that r has yet to compute + 32 for every sequence, which it decodes or will
              = own + others + (fronts - 1) x (own - own at the last report)

    affinity  keep the replicas that hold nearly as much as the best one, if that is worth it
    guard     unless four times what it saves waits there more than elsewhere: then all are candidates again
    fallback  nobody holds enough: consistent hashing with bounded loads (Mirrokni et al., 2018, arXiv 1608.01350), so that
              fronts that know nothing of each other bring prompts that begin alike together
    choice    among candidates the least `prompt - hit + waits`; a draw among equals

What a replica holds is approximate: what was sent there, the last of it that fits into its cache, corrected by what its answers
say they found. Engines report nothing else, and need not: others measured that their events add little (smg: 28.9 against 27.5
requests/s).

What waits there of one's own is known at once, of other fronts' with a report that may be a second old. Until the next one a
front takes it that the others do as it does. Else all of them would send all they get, for as long, to what was idle when
it was asked (`docs/scale.md` has what that costs). Guard and bound compare with the mean: of many replicas one is always idle.

Knows nothing of Ray: `deploy.router` asks it on the way of every request, `deploy.simulate` by the million.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import random
import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvloom.deploy.prompt_keys import CHUNK, Prompt, PromptKeys

NEAR = 0.8
"""Replicas that hold so much of what the best one holds count as holding it."""
LEAST_HIT = 0.1
"""Affinity decides where the best replica holds so much of the prompt, at least."""
GUARD = 4.0
"""How many times what affinity saves may wait more than waits on average elsewhere."""
DECODE_TOKENS = 32.0
"""What a sequence counts for that is decoded, or will be, in prompt tokens that wait."""
WRONG, FORGOTTEN = 0.5, 0.1
"""An answer that found less than this share of what was thought corrects what is thought: this part is forgotten."""
SPOTS = 64
"""Places of each replica on the ring of consistent hashing, a multiple of 8."""
DEFAULT_CAPACITY = 65536
"""Tokens that a replica is thought to hold until it says how many."""


@dataclass(slots=True)
class Choice:
    """Where a prompt goes."""

    replica: str
    hit: int
    """Tokens of it that are thought to be held there."""
    reason: str
    """affinity, guard (too much waits where it is held) or hash (nobody holds enough)."""


@dataclass(slots=True)
class _Placed:
    """A request on its way."""

    slot: int
    hit: int
    """Tokens that were thought to be held there."""
    waits: float
    """What it counts for there."""
    tells: float
    """What the replica counts it for when it reports: while it waits there, all of its prompt."""


@dataclass(slots=True)
class _Replica:
    name: str
    spots: npt.NDArray[np.uint64]
    """On the ring."""
    held: OrderedDict[int, int] = field(default_factory=OrderedDict)
    """Key -> tokens, the one used longest ago in front."""
    tokens: int = 0
    """Of all held keys."""
    capacity: int = DEFAULT_CAPACITY
    own: float = 0.0
    """What waits there of requests that came from here."""
    tells: float = 0.0
    """The same as the replica counts it."""
    others: float = 0.0
    """What waited there of other fronts' requests, at its last report,"""
    seen: float = 0.0
    """and of own ones."""
    fronts: int = 1
    """That send there."""


class Placement:
    """The choice, and what it is made from. Safe to use from several threads."""

    def __init__(self, secret: bytes, seed: int | None = None, *, announced: bool = False) -> None:
        """secret: of keys, the same in every front whose hashes shall agree; seed: of draws among equals, for tests. announced:
        whether only requests that are announced can be placed, where they end on another thread than they are placed on."""
        self._announced: set[str] | None = set() if announced else None
        self._shunned: frozenset[str] = frozenset()
        self._keys = PromptKeys(secret)
        self.prompt = self._keys.prompt
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._replicas: list[_Replica | None] = []
        self._slots: dict[str, int] = {}
        self._holders: dict[int, int] = {}  # key -> bit set of slots
        self._waits: npt.NDArray[np.float64] = np.zeros(0)  # infinite where a slot is empty
        self._ring, self._owners = array("Q"), array("Q")  # places, sorted, and the slots that they belong to
        self._placed: dict[str, _Placed] = {}
        self.routed: Counter[str] = Counter()
        """Requests by the reason of their choice."""

    # Who is there --------------------------------------------------------------------------------------------------------

    def update(self, replicas: Mapping[str, int | None]) -> None:
        """The replicas that there are now, with the tokens that their caches hold, where that is known. What was held by others
        is forgotten."""
        with self._lock:
            gone = [name for name in self._slots if name not in replicas]
            new = [name for name in replicas if name not in self._slots]
            self._remove(gone)
            self._add(new)
            if gone or new:
                self._arrange()
            for name, capacity in replicas.items():
                replica = self._at(self._slots[name])
                replica.capacity = capacity or replica.capacity
                self._trim(replica, self._slots[name])

    def report(self, name: str, waits: float, fronts: int = 1) -> None:
        """What a replica says that waits there: tokens of whole prompts that it has not begun, and DECODE_TOKENS for every
        sequence, those of waiting prompts too. fronts: how many send there."""
        with self._lock:
            if (slot := self._slots.get(name)) is not None:
                replica = self._at(slot)
                replica.others, replica.seen = max(0.0, waits - replica.tells), replica.own
                replica.fronts = max(1, fronts)
                self._weigh(slot)

    @property
    def names(self) -> list[str]:
        """Of the replicas."""
        return list(self._slots)

    # The way of a request ------------------------------------------------------------------------------------------------

    def choose(self, prompt: Prompt, among: Iterable[str] | None = None, avoid: Iterable[str] = ()) -> Choice | None:
        """Where a prompt should go; changes nothing. among: only to these; avoid: to these, or to those that are shunned,
        only where there are no others. None if there is no such replica."""
        with self._lock:
            if bad := self._shunned.union(avoid):
                good = [name for name in (self._slots if among is None else among) if name not in bad]
                among = good or among
            return self._choose(prompt, among)

    def shun(self, names: Iterable[str]) -> None:
        """Choose these replicas, of which nothing is heard, only where there is no other; no others are shunned any more."""
        self._shunned = frozenset(names)

    def announce(self, request: str) -> None:
        """A request begins: until it has `ended` it can be placed."""
        with self._lock:
            if self._announced is not None:
                self._announced.add(request)

    def where(self, request: str) -> str | None:
        """The replica that a request was placed on, while it is there."""
        with self._lock:
            placed = self._placed.get(request)
            return None if placed is None else self._at(placed.slot).name

    def placed(self, request: str, prompt: Prompt, name: str, reason: str = "") -> None:
        """A request goes to a replica: what it brings waits there until it `began`, and is held from now on. Said again of the
        same replica it changes nothing. reason: of its choice, counted the first time."""
        with self._lock:
            if self._announced is not None and request not in self._announced:
                return  # it has ended before Ray said where it went
            slot, before = self._slots.get(name), self._placed.get(request)
            if before is None and reason:
                self.routed[reason] += 1
            if before is not None and before.slot == slot:
                return
            self._settle(request)
            if slot is None:
                return
            hit = self._hit(prompt, self._at(slot))
            placed = self._placed[request] = _Placed(slot, hit, 0.0, 0.0)
            self._change(placed, DECODE_TOKENS + prompt.tokens - hit, DECODE_TOKENS + prompt.tokens)
            self._hold(slot, prompt)

    def began(self, request: str, found: int) -> None:
        """Its first token is there: it decodes now, and tells how many tokens of its prompt were found. Where that is far less
        than was thought, less is held there than is thought: a tenth is forgotten, what was used longest ago."""
        with self._lock:
            if (placed := self._placed.get(request)) is None:
                return
            self._change(placed, DECODE_TOKENS, DECODE_TOKENS)
            if found < WRONG * placed.hit:
                self._trim(self._at(placed.slot), placed.slot, 1 - FORGOTTEN)

    def ended(self, request: str) -> None:
        """It is over, however."""
        with self._lock:
            self._settle(request)
            if self._announced is not None:
                self._announced.discard(request)

    def forget(self, name: str | None = None) -> None:
        """A replica, or every one, holds nothing any more."""
        with self._lock:
            for slot, replica in enumerate(self._replicas):
                if replica is not None and name in (None, replica.name):
                    for key in list(replica.held):
                        self._drop(replica, slot, key)

    # -------------------------------------------------------------------------------------------------------------------

    @property
    def keys(self) -> int:
        """Keys that are remembered, of all replicas."""
        return sum(len(replica.held) for replica in self._replicas if replica is not None)

    def waits(self, name: str) -> float:
        """What is thought to wait at a replica."""
        return float(self._waits[self._slots[name]])

    def _at(self, slot: int) -> _Replica:
        replica = self._replicas[slot]
        assert replica is not None
        return replica

    def _add(self, names: Sequence[str]) -> None:
        empty = [slot for slot, replica in enumerate(self._replicas) if replica is None]
        more = max(0, len(names) - len(empty))
        empty += range(len(self._replicas), len(self._replicas) + more)
        self._replicas += [None] * more
        self._waits = np.append(self._waits, np.full(more, np.inf))
        fronts = max((replica.fronts for replica in self._replicas if replica is not None), default=1)  # until it says
        for name, slot in zip(names, empty):
            self._replicas[slot] = _Replica(name, self._spots(name), fronts=fronts)
            self._slots[name], self._waits[slot] = slot, 0.0

    def _remove(self, names: Sequence[str]) -> None:
        gone = {self._slots.pop(name) for name in names}
        for slot in gone:
            replica = self._at(slot)
            for key in list(replica.held):
                self._drop(replica, slot, key)
            self._replicas[slot], self._waits[slot] = None, np.inf
        if gone:
            self._placed = {request: placed for request, placed in self._placed.items() if placed.slot not in gone}

    def _spots(self, name: str) -> npt.NDArray[np.uint64]:
        digests = (hashlib.blake2b(f"{name} {i}".encode(), key=self._keys.secret).digest() for i in range(SPOTS // 8))
        return np.frombuffer(b"".join(digests), np.uint64)

    def _arrange(self) -> None:
        """Make the ring anew."""
        slots = list(self._slots.values())
        places = np.concatenate([np.zeros(0, np.uint64), *(self._at(slot).spots for slot in slots)])
        order = places.argsort()
        self._ring = array("Q", places[order].tobytes())
        self._owners = array("Q", np.repeat(np.array(slots, np.uint64), SPOTS)[order].tobytes())

    def _choose(self, prompt: Prompt, among: Iterable[str] | None) -> Choice | None:
        hits, waits = self._hits(prompt), self._waits
        if among is not None and not self._slots.keys() <= (names := set(among)):
            inside = [self._slots[name] for name in names if name in self._slots]
            waits = np.full_like(waits, np.inf)
            waits[inside] = self._waits[inside]
            hits[waits == np.inf] = 0
        slots = np.flatnonzero(waits < np.inf)
        if not len(slots):
            return None
        usual, best, reason = float(waits[slots].mean()), float(hits.max()), "hash"
        if best and best >= LEAST_HIT * prompt.tokens:
            holds = hits >= NEAR * best
            near, elsewhere = np.flatnonzero(holds), waits[~holds & (waits < np.inf)]
            if not len(elsewhere) or waits[near].min() <= elsewhere.mean() + GUARD * best:
                slots, reason = near, "affinity"
            else:
                reason = "guard"
        if reason == "hash":
            slots = np.array([self._hashed(prompt, waits, usual)])
        costs = waits[slots] - hits[slots]  # and the prompt's tokens, everywhere the same
        slot = int(self._random.choice(slots[costs == costs.min()]))
        return Choice(self._at(slot).name, int(hits[slot]), reason)

    def _hashed(self, prompt: Prompt, waits: npt.NDArray[np.float64], usual: float) -> int:
        """The first replica behind the prompt's place on the ring where at most about this prompt waits more than usual."""
        place = prompt.prefixes[min(3, len(prompt.prefixes) - 1)] if prompt.prefixes else self._random.getrandbits(64)
        begin, fits = bisect.bisect_left(self._ring, place), waits <= usual + prompt.tokens
        for i in range(len(self._ring)):
            slot = self._owners[(begin + i) % len(self._ring)]
            if fits[slot]:
                return slot
        raise AssertionError("somewhere no more waits than on average")

    def _hits(self, prompt: Prompt) -> npt.NDArray[np.float64]:
        """Tokens held, by slot."""
        found = np.zeros(len(self._replicas))
        alive, depth = -1, 0
        for key in prompt.prefixes:
            still = alive & self._holders.get(key, 0)
            if alive not in (-1, still):
                found[_members(alive & ~still)] = depth * CHUNK
            alive, depth = still, depth + 1
            if not alive:
                break
        if alive not in (0, -1):
            found[_members(alive)] = depth * CHUNK
        for key, tokens in prompt.segments:
            if holders := self._holders.get(key):
                found[_members(holders)] += tokens
        return np.minimum(found, prompt.tokens)  # what is in the prefix and in a segment was counted twice

    def _hit(self, prompt: Prompt, replica: _Replica) -> int:
        """Tokens held by one, the same."""
        held = replica.held
        prefix = CHUNK * sum(1 for _ in itertools.takewhile(held.__contains__, prompt.prefixes))
        return min(prefix + sum(tokens for key, tokens in prompt.segments if key in held), prompt.tokens)

    def _hold(self, slot: int, prompt: Prompt) -> None:
        replica = self._at(slot)
        prefixes = [(key, CHUNK) for key in reversed(prompt.prefixes)]  # the first is of use for longest: it is forgotten last
        for key, tokens in (*prompt.segments, *prefixes):
            if key in replica.held:
                replica.held.move_to_end(key)
            else:
                replica.held[key] = tokens
                replica.tokens += tokens
                self._holders[key] = self._holders.get(key, 0) | 1 << slot
        self._trim(replica, slot)

    def _trim(self, replica: _Replica, slot: int, part: float = 1.0) -> None:
        """Forget what fits into the cache no more, or all but a part of what is held."""
        most = min(replica.capacity, part * replica.tokens)
        while replica.tokens > most:
            self._drop(replica, slot, next(iter(replica.held)))

    def _drop(self, replica: _Replica, slot: int, key: int) -> None:
        replica.tokens -= replica.held.pop(key)
        if left := self._holders[key] & ~(1 << slot):
            self._holders[key] = left
        else:
            del self._holders[key]

    def _settle(self, request: str) -> None:
        if (placed := self._placed.pop(request, None)) is not None:
            self._change(placed, 0.0, 0.0)

    def _change(self, placed: _Placed, waits: float, tells: float) -> None:
        """A request counts for something else where it is."""
        replica = self._at(placed.slot)
        replica.own += waits - placed.waits
        replica.tells += tells - placed.tells
        placed.waits, placed.tells = waits, tells
        self._weigh(placed.slot)

    def _weigh(self, slot: int) -> None:
        replica = self._at(slot)
        more = replica.others + (replica.fronts - 1) * (replica.own - replica.seen)
        self._waits[slot] = replica.own + max(0.0, more)


def _members(mask: int) -> npt.NDArray[np.intp]:
    """The numbers of the bits that are set, ascending."""
    octets = np.frombuffer(mask.to_bytes(mask.bit_length() // 8 + 1, "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(octets, bitorder="little"))
