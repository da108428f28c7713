"""Prompts for approximate reuse: the same documents in another order, a new one among them, another question.

    donor     HEADER, the documents in one order, a question
    use       HEADER, the same documents in another order with one new document, a question about one of the old ones

A document is real text with a sentence planted in it, and ends in a blank line. Prompts are put together from tokens, so that a
document has the same tokens wherever it stands. Facts of one prompt are of different kinds (`facts`), as a small model mixes up
facts of one kind.

Requests run one at a time, with KV of donors and without: how far the answers are apart, and how long both take.

The exact prefix cache is emptied before every request, so that nothing but donors' segments can help. Requests that are
measured leave nothing behind (`share` none): whatever the order of settings, all of them meet the same donors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.engine.requests.request import KVOptions, Usage
from kvloom.loadtest.quality import facts
from kvloom.loadtest.quality.decoding import greedy, prefill, under_way
from kvloom.loadtest.quality.divergence import divergence
from kvloom.loadtest.quality.facts import Fact
from kvloom.loadtest.quality.text import read
from kvloom.loadtest.workloads.corpus import Reader, TextSource

HEADER = "Here are some documents, and the beginning of a sentence from one of them.\n\n"
"""What every prompt begins with: the first tokens of a sequence draw attention whatever they say, and are nobody's document."""

Tokens = tuple[int, ...]


class Use(NamedTuple):
    """A prompt that others' KV is reused for."""

    prompt: Tokens
    answer: str
    """What a right answer contains."""


class Case(NamedTuple):
    """Documents, the prompt that had them first, and prompts that have them again."""

    donor: Tokens
    documents: tuple[Tokens, ...]
    uses: tuple[Use, ...]


class Maker:
    """Cases of one size; the same seed and number give the same one."""

    def __init__(self, llm: LLM, documents: int, length: int, *, text: Path | None = None, seed: int = 0) -> None:
        """documents: in a donor; length: tokens of each; text: a file to take them from instead of the Python reference.

        Raises ConfigError if there are not so many kinds of facts, or a document has no room for one.
        """
        if not 1 <= documents <= len(facts.WORDS):
            raise ConfigError(
                f"--documents is {documents}; allowed: 1 to {len(facts.WORDS)}, as each has a fact of another kind"
            )
        self._documents, self._length, self._seed = documents, length, seed
        self._source = TextSource(llm.tokenizer, None if text is None else [read(text)])
        self.fingerprint = self._source.fingerprint
        longest = max(len(self._source.encode(f"\n{template} {{}}\n\n")) for template in (*facts.WORDS, *facts.NUMBERS))
        if length < 2 * longest:
            raise ConfigError(f"--document-len is {length}; allowed: {2 * longest} or more, to hold a fact and text around it")

    def case(self, number: int, uses: int = 1) -> Case:
        """uses: at most `len(facts.NUMBERS)`, one per new document. Raises ConfigError for more."""
        if uses > len(facts.NUMBERS):
            raise ConfigError(f"{uses} uses of the same documents are asked for; allowed: up to {len(facts.NUMBERS)}")
        name = f"kvshare {self._seed} {number}"
        random, reader = Random(name), self._source.reader(name)
        known = facts.words(random, self._documents)
        documents = [self._document(fact, reader, random) for fact in known]
        new = [self._document(fact, reader, random) for fact in facts.numbers(random, uses)]
        donor = self._prompt(documents, random.choice(known))
        return Case(donor, tuple(documents), tuple(self._use(documents, known, one, random) for one in new))

    def _use(self, documents: Sequence[Tokens], known: Sequence[Fact], new: Tokens, random: Random) -> Use:
        order = _another_order(documents, random)
        order.insert(random.randrange(len(order) + 1), new)
        asked = random.choice(known)
        return Use(self._prompt(order, asked), asked.answer)

    def _document(self, fact: Fact, reader: Reader, random: Random) -> Tokens:
        """Exactly `length` tokens."""
        sentence, end = self._source.encode(f"\n{fact.sentence}\n"), self._source.encode("\n\n")
        body = reader.tokens(self._length - len(sentence) - len(end))
        cut = random.randrange(len(body) // 8, len(body) - len(body) // 8)
        return (*body[:cut], *sentence, *body[cut:], *end)

    def _prompt(self, documents: Sequence[Tokens], asked: Fact) -> Tokens:
        middle = [token for document in documents for token in document]
        return (*self._source.encode(HEADER), *middle, *self._source.encode(asked.question))


def _another_order(documents: Sequence[Tokens], random: Random) -> list[Tokens]:
    """Shuffled; a rotation if the shuffle changed nothing."""
    order = random.sample(documents, len(documents))
    return [*order[1:], order[0]] if order == list(documents) else order


def fitting(llm: LLM, length: int, answer: int, most: int = 11) -> int:
    """Documents of that length that a model's context has room for beside a new one: at most `most`. Raises ConfigError."""
    room = llm.core.limits.max_model_len - answer - 128  # header and question
    found = min(most, room // length - 1)
    if found < 1:
        raise ConfigError(f"{llm.model.name} has no room for two documents of {length} tokens; give a smaller --document-len")
    return found


def check_length(llm: LLM, case: Case, answer: int) -> None:
    """Raises ConfigError if prompts and answers exceed what the model takes."""
    longest, needed = llm.core.limits.max_model_len, max(len(use.prompt) for use in case.uses) + answer
    if needed > longest:
        raise ConfigError(
            f"a prompt and its answer have {needed} tokens, {llm.model.name} takes {longest}; give fewer --documents or a "
            "smaller --document-len"
        )


KINDS = ("context", "isolated")
"""Donors: documents as an earlier prompt had them, or each compiled alone."""
EXACT = KVOptions(reuse="off")
Observe = Callable[[int, Tensor], None]
"""(index of the answer's token, logits [vocab] fp32, valid during the call)"""


def approximate(options: Mapping[str, Any]) -> KVOptions:
    """Reuse with these options of `RepairOptions`; whatever is left stale by them may stay so."""
    return KVOptions(reuse="approx", reuse_options={"max_stale": 1.0, **options}, share="none", explain=True)


class Ran(NamedTuple):
    """What came of one request."""

    tokens: list[int]
    usage: Usage
    first: float
    """Seconds from its submission to its first token."""


def ask(
    llm: LLM, prompt: Sequence[int], kv: KVOptions, tokens: int, *, forced: Sequence[int] = (), observe: Observe | None = None
) -> Ran:
    """Answer a prompt greedily, alone, over an empty prefix cache. Raises InvalidRequestError."""
    core = llm.core
    core.cache.evict()
    request = greedy("ask", prompt, tokens, kv, forced)
    core.observer = None if observe is None else lambda seen, logits: observe(seen.generated, logits[0])
    answer: list[int] = []
    first = usage = None
    began = time.perf_counter()
    try:
        with under_way(llm, [request]):
            while core.busy:
                for output in core.step():
                    first = time.perf_counter() - began if first is None else first
                    answer += output.tokens
                    usage = output.usage
    finally:
        core.observer = None
    assert first is not None and usage is not None
    return Ran(answer, usage, first)


def donate(llm: LLM, case: Case, kind: str) -> None:
    """Have the segment store hold the documents of one case, as donors of one kind, and nothing else."""
    llm.core.purge("")
    llm.core.cache.evict()
    if kind == "context":
        prefill(llm, [case.donor], kv=KVOptions(reuse="approx"))
    else:
        for document in case.documents:
            llm.add_segment(document)


class Reference(NamedTuple):
    """What the model says with KV of its own."""

    answer: list[int]
    log_p: Tensor
    """fp16 [answer, vocab], before every token of the answer"""
    text: str
    right: bool


def reference(llm: LLM, use: Use, tokens: int) -> Reference:
    """Answer a prompt exactly, and keep every distribution on the way."""
    rows: list[Tensor] = []
    ran = ask(llm, use.prompt, EXACT, tokens, observe=lambda _, logits: rows.append(torch.log_softmax(logits, -1).half()))
    text = llm.tokenizer.decode(ran.tokens)
    return Reference(ran.tokens, torch.stack(rows), text, use.answer in text)


class Sample(NamedTuple):
    """One prompt under one setting."""

    kl: list[float]
    """KL(exact || approximate) before every token of the exact answer, in nats."""
    same: list[bool]
    """Whether both find the same token likeliest there."""
    right: bool
    exact_right: bool
    tokens: int
    """Of the prompt,"""
    reused: int
    """of which these stayed as they were copied,"""
    recomputed: int
    """and these could have, but were computed."""
    deviation: list[float]
    """Of every run, mean ||V' - V|| / ||V'|| at the check layer, if the policy looks at it."""


def compare(llm: LLM, use: Use, exact: Reference, options: Mapping[str, Any]) -> Sample:
    """Follow the exact answer with reused KV; then answer freely. Raises ConfigError if nothing was reused."""
    kl: list[float] = []
    likeliest: list[int] = []

    def observe(index: int, logits: Tensor) -> None:
        kl.append(float(divergence(exact.log_p[index], torch.log_softmax(logits, -1).half())))
        likeliest.append(int(logits.argmax()))

    kv, count = approximate(options), len(exact.answer)
    usage = ask(llm, use.prompt, kv, count, forced=exact.answer, observe=observe).usage
    told = usage.explanation or {}
    if usage.reused_tokens + usage.recomputed_tokens == 0:
        raise ConfigError(
            f"nothing of a prompt of {usage.prompt_tokens} tokens was reused: {told.get('reason') or 'no donor was found'}; "
            "give more or longer --documents"
        )
    same = [a == b for a, b in zip(likeliest, exact.answer)]
    # As long as the likeliest tokens are those of the exact answer, a free answer is the same: the same rows, the same steps.
    agreed = same.index(False) if not all(same) else count
    text = llm.tokenizer.decode(exact.answer[:agreed])
    if use.answer not in text and agreed < count:
        text = llm.tokenizer.decode(ask(llm, use.prompt, kv, count).tokens)
    return Sample(kl, same, use.answer in text, exact.right, usage.prompt_tokens, usage.reused_tokens, usage.recomputed_tokens,
                  [run["deviation"] for run in told["runs"] if "deviation" in run])  # fmt: skip


class Times(NamedTuple):
    """Seconds to the first token, measured in turns."""

    exact: list[float]
    approximate: list[float]


def race(llm: LLM, use: Use, options: Mapping[str, Any], rounds: int, times: Times) -> None:
    """Add so many turns of both; who begins alternates."""
    for turn in range(rounds):
        order = ((EXACT, times.exact), (approximate(options), times.approximate))
        for kv, seconds in order if (len(times.exact) + turn) % 2 == 0 else order[::-1]:
            seconds.append(ask(llm, use.prompt, kv, 1).first)
