"""What takes part in the lives of requests: one protocol for every feature, so that the engine's core names none.

received    it has come, and nothing is checked
opened      it is being queued, its options are resolved; whoever cannot serve it says so
admitted    it has blocks and a place in the next step             (`plan.Reuse` alone has something to do there)
computed    a step has stored KV of it
sampled     a token is about to be taken from its logits
prefilled   that was the first: its prompt is computed
ended       it is over, and still has its blocks
closed      nothing of it stays

stepping    the next step is about to be planned
stepped     it has been computed, in so much time
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from kvloom.engine.cache import BlockTable
    from kvloom.engine.requests.plan import Chunk, StepPlan
    from kvloom.engine.requests.request import Request


class Feature:
    """A part of an engine, which inherits what it has nothing to do with. Called on the engine's thread.

    What is raised for a request ends that request and no other; but nothing may go wrong in `closed`.
    """

    def received(self, request: Request) -> None:
        """A request has come: its prompt may still be changed. Raises InvalidRequestError."""

    def opened(self, request: Request) -> None:
        """A request is being queued. Raises InvalidRequestError if it cannot be served."""

    def computed(self, chunks: Sequence[Chunk]) -> None:
        """These chunks of a step are computed, or launched, and their requests go on; where a step is launched ahead, both are
        told. Raises Blamed."""

    def sampled(self, request: Request, logits: Tensor, row: int) -> None:
        """A token is about to be taken from this row of the logits: [rows, vocab] fp32, valid during the call."""

    def prefilled(self, request: Request, table: BlockTable) -> None:
        """A request's prompt is computed, and its first token is about to be known. table: where its KV is."""

    def ended(self, request: Request) -> None:
        """A request has ended; its blocks are about to go back."""

    def closed(self, request: Request) -> None:
        """Nothing of a request may stay, however far it came. Harmless if called again."""

    def stepping(self) -> None:
        """Do what must not delay the outputs of the step before. Raises Blamed."""

    def stepped(self, plan: StepPlan, seconds: float) -> None:
        """A step has been computed in so much time."""

    def explain(self, request: Request) -> Mapping[str, Any]:
        """What to tell whoever asked why its request was served as it was; empty for nothing."""
        return {}

    def look(self, tokens: Sequence[int], prefix: int, tenant: str, salt: str) -> Mapping[str, Any]:
        """What a prompt would find beside its exact prefix. Changes nothing."""
        return {}

    def purge(self, tenant: str) -> int:
        """Forget what is kept of a tenant beyond its requests. Returns how much, in pieces. Raises InvalidRequestError if
        nothing is ever kept."""
        return 0

    def reset(self) -> int:
        """Forget what is kept of everybody beyond their requests, and work that would make more of it. Returns how much, in
        pieces."""
        return 0


Features = Sequence[Feature]
