"""Whose failure it is. What goes wrong for one request ends that request, and nobody else's.

    known     `with blame(request)` stands around work that is done for one request: what is raised there comes out as `Blamed`
    unknown   anything else that a step raises: the requests with rows in that step end, the rest go on

`Holdings` is the other half: everything that a request was given when it was queued goes back when it ends, whatever else
fails. The log gets the traceback and the request's id; a client gets one sentence.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from kvloom.engine.device import out_of_memory
from kvloom.engine.errors import InternalError, KVLoomError
from kvloom.engine.requests.request import Request, RequestOutput, Usage

log = logging.getLogger("kvloom.engine")

INTERNAL = "internal error; the server's log says more"
"""All that a client is told of a failure of the engine's own."""

MOST_FAILURES = 8
"""Steps in a row that may fail with nobody to blame: then the engine itself is broken, and ends."""


class Blamed(Exception):
    """Something failed while it was done for one request. The cause is `__cause__`."""

    def __init__(self, request: Request) -> None:
        super().__init__(f"failed for request {request.id}")
        self.request = request


@contextmanager
def blame(request: Request) -> Iterator[None]:
    """Work for one request: raises Blamed for whatever fails in it, but for what was blamed on somebody already."""
    try:
        yield
    except Blamed:
        raise
    except Exception as error:
        raise Blamed(request) from error


def log_remedy() -> None:
    """Tell the log what helps, if what is being handled is that a device's memory has run out."""
    if asked := out_of_memory(sys.exception()):
        log.error(
            "the device's memory has run out (%s asked for); lower --max-batched-tokens, --max-num-seqs or "
            "--gpu-memory-utilization (or --kv-memory)", asked,
        )  # fmt: skip


class Holdings:
    """What every open request holds of the engine's parts."""

    def __init__(self) -> None:
        self.failures = 0
        """Parts that failed to take something back, since the start."""
        self._held: dict[Request, ExitStack] = {}

    def __len__(self) -> int:
        return len(self._held)

    @contextmanager
    def opening(self, request: Request) -> Iterator[Callable[..., None]]:
        """Take things for a request: call what this gives with (how to give back, *arguments) before each is taken.

        If the block raises, all goes back at once; else when the request ends. Giving back must be harmless if taking failed.
        """
        with ExitStack() as stack:

            def hold(give_back: Callable[..., object], *args: object) -> None:
                stack.callback(self._give_back, request, give_back, args)

            yield hold
            self._held[request] = stack.pop_all()

    def close(self, request: Request) -> bool:
        """The request has ended: give everything back, what was taken last first. Whether it was here; raises nothing."""
        held = self._held.pop(request, None)
        if held is not None:
            held.close()
        return held is not None

    def _give_back(self, request: Request, give_back: Callable[..., object], args: tuple[object, ...]) -> None:
        try:
            give_back(*args)
        except Exception:
            self.failures += 1
            log.exception("request %s has ended, but not everything it held could be given back", request.id)


@contextmanager
def no_internals() -> Iterator[None]:
    """Around what somebody asked for: errors raised on purpose pass, any other is logged and becomes a KVLoomError that says
    nothing."""
    try:
        yield
    except KVLoomError:
        raise
    except Exception:
        log.exception("what was asked of the engine failed")
        raise InternalError(INTERNAL) from None


def failed(request: Request) -> RequestOutput:
    """The last output of a request for which something failed. Made of nothing that could fail again."""
    usage = Usage(prompt_tokens=len(request.prompt), completion_tokens=max(0, request.generated), cached_tokens=request.cached)
    return RequestOutput(id=request.id, finish_reason="error", error=INTERNAL, usage=usage)
