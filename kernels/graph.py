"""Captured calls: what a back end gives the engine to make a step's calls again in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class CaptureError(RuntimeError):
    """Calls of a step were made, and could not be captured; the cause says why. result: what they returned."""

    def __init__(self, cause: Exception, result: object) -> None:
        super().__init__(str(cause))
        self.result = result


class Graph(Protocol):
    """Calls of a step, captured in the order in which they were made, to be made again in one.

    A replay runs the same kernels at the same addresses, with the numbers that the host gave them. Whoever captures keeps the
    tensors of captured calls alive and in place, those of the rows of their plans too, and changes their contents alone; plans
    may be made anew (`Kernels.plan`, into). For one thread at a time.

                    of kernel calls                                             of a device
    holds           kernel calls alone                                          all that is queued there, torch's own calls too
    replayed for    any number of rows: tensors are the beginnings of buffers   as many rows as were captured
                    with the same strides for all of them
    what is made    lies where it did                                           belongs to the graph: nobody else may read it
    while capturing
    """

    of_device: bool

    def piece(self, calls: Callable[[], T]) -> T:
        """Make these calls, of this thread; they become the graph's next piece if no exception ends them. Returns what they do.

        A device's graph makes them twice, the second time to capture them, and nothing is computed then: so that whatever takes
        place once, like compiling a kernel, has taken place, and what they read on the host is refused. Raises CaptureError if
        that fails: the graph is of no use then, but all that the calls do is done.
        """
        ...

    def replay(self, piece: int, rows: int) -> None:
        """Make a piece's calls again, for this many rows. Raises ValueError if a plan that they use has another number."""
        ...
