"""Asking an engine the questions of a task, and what share it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvloom.engine import LLM
from kvloom.engine.request import KVOptions
from kvloom.loadtest.quality.decoding import Cost, Passage, follow
from kvloom.loadtest.quality.tasks import Trial
from kvloom.loadtest.study.intervals import bootstrap, wilson


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said to one question."""

    trial: Trial
    text: str
    score: float


class Answers(NamedTuple):
    """What was said to all of them, and what the decode steps cost."""

    answers: list[Answer]
    cost: Cost

    @property
    def accuracy(self) -> float:
        return sum(answer.score for answer in self.answers) / len(self.answers)

    def figures(self) -> dict[str, Any]:
        """`accuracy` with its 95% interval and number of trials."""
        scores = [answer.score for answer in self.answers]
        whole = all(score in (0.0, 1.0) for score in scores)
        blocks = [answer.trial.haystack for answer in self.answers]
        interval = wilson(sum(scores), len(scores)) if whole else bootstrap(scores, blocks)
        return {"accuracy": self.accuracy, "accuracy_ci": interval, "trials": len(scores)}


def ask(llm: LLM, trials: Sequence[Trial], kv: KVOptions, batch: int, done: Callable[[], None] = lambda: None) -> Answers:
    """Ask `batch` questions at once, in order: those of one haystack share its KV. `done` is called after every batch.

    Raises InvalidRequestError if a question cannot be served so.
    """
    found, cost = [], Cost()
    for first in range(0, len(trials), batch):
        part = trials[first : first + batch]
        passages = [Passage(trial.prompt, trial.question) for trial in part]
        followed = follow(llm, passages, kv, free=max(trial.room for trial in part))
        for trial, tokens in zip(part, followed.outputs):
            begin = len(trial.question)
            text = llm.tokenizer.decode(tokens[begin : begin + trial.room])
            found.append(Answer(trial, text, trial.score(text)))
        cost.add(followed.cost)
        done()
    return Answers(found, cost)
