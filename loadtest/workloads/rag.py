"""rag: the same documents come again in another order with another question, so that only non-prefix reuse can win.

Each tenant has a pool of documents, part of it common to all tenants. A pool is divided into sets of as many documents as a
prompt holds; requests go through tenants, then sets, then start again. Every document states a fact of its own and the question
asks for one, so answers are checked: reuse that hurts shows.

With --no-shuffle a set always has the same order and a prefix cache wins all but the question: the control.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

from kvloom.loadtest.client.record import Job
from kvloom.loadtest.workloads.base import LONGEST, Workload, require
from kvloom.loadtest.workloads.corpus import Reader, TextSource
from kvloom.loadtest.workloads.facts import Fact, ask, facts, plant


@dataclass(frozen=True, slots=True, kw_only=True)
class RagOptions:
    """A prompt is about docs_per_prompt * docs_len tokens and a question."""

    tenants: int = 2
    """Tenants, named tenant1, tenant2, ..."""
    documents: int = 32
    """Documents of a tenant; what is left after dividing them by docs_per_prompt is not used."""
    docs_per_prompt: int = 4
    """Documents in a prompt."""
    docs_len: int = 256
    """Tokens of a document, about."""
    common_share: float = 0.5
    """Share of each tenant's documents that all tenants have, 0 to 1."""
    output_len: int = 16
    """Tokens of an answer."""
    shuffle: bool = True
    """Another order of documents each time; switched off, a set of documents always has the same order."""

    def __post_init__(self) -> None:
        require(self, 1, 1000, "tenants")
        require(self, 1, 64, "docs_per_prompt")
        require(self, self.docs_per_prompt, 2048, "documents")
        require(self, 48, LONGEST, "docs_len")
        require(self, 0, 1, "common_share")
        require(self, 1, LONGEST, "output_len")


class Document(NamedTuple):
    """A text that states a fact."""

    text: str
    fact: Fact


def build(options: RagOptions, text: TextSource, seed: int, count: int) -> list[Job]:
    rng = random.Random(f"rag {seed}")
    sets = _sets(options, text, seed, rng)
    jobs = []
    for index in range(count):
        tenant, visit = index % options.tenants, index // options.tenants
        round_, number = divmod(visit, len(sets[tenant]))
        documents = sets[tenant][number]
        asked = documents[(round_ + number) % len(documents)].fact
        ordered = _order(documents, round_, rng) if options.shuffle else documents
        prompt = ask(asked, "\n\n".join(d.text for d in ordered))
        jobs.append(
            Job(
                prompt=prompt,
                output_tokens=options.output_len,
                tenant=f"tenant{tenant + 1}",
                label="documents seen before" if round_ else "new documents",
                expect=asked.value,
            )
        )
    return jobs


def _sets(options: RagOptions, text: TextSource, seed: int, rng: random.Random) -> list[list[list[Document]]]:
    """Per tenant, its sets of documents; common documents lie in another set, among others, for each tenant."""
    common = round(options.common_share * options.documents)
    own = options.documents - common
    known = iter(facts(common + own * options.tenants, rng))
    reader = text.reader(f"rag {seed}")
    everyones = [_document(next(known), reader, options, text, rng) for _ in range(common)]
    tenants = []
    for _ in range(options.tenants):
        pool = everyones + [_document(next(known), reader, options, text, rng) for _ in range(own)]
        rng.shuffle(pool)
        size = options.docs_per_prompt
        tenants.append([pool[i : i + size] for i in range(0, len(pool) - size + 1, size)])
    return tenants


def _document(fact: Fact, reader: Reader, options: RagOptions, text: TextSource, rng: random.Random) -> Document:
    body = reader.text(max(options.docs_len - len(text.encode(fact.sentence)) - 2, 1))  # 2: the breaks around the fact
    return Document(plant(fact, body, rng.random()), fact)


def _order(documents: list[Document], round_: int, rng: random.Random) -> list[Document]:
    """Another document first in each round until all have been: what comes first decides what a prefix cache finds."""
    first = round_ % len(documents)
    rest = documents[:first] + documents[first + 1 :]
    rng.shuffle(rest)
    return [documents[first], *rest]


RAG = Workload(
    name="rag",
    help="the same documents in another order with another question: only non-prefix reuse can win; answers are checked",
    options=RagOptions,
    make=build,
)
