"""CUDA graphs on a machine without a GPU: calls on the simulated device, recorded and made again on the same tensors.

As on a GPU, nothing is computed while calls are captured, every number of the host's stays what it was, and what asks for a
value or copies from the host is refused. What captured calls make belongs to the graph, whose memory others share: it is
overwritten when a capture ends, and after each replay, so that whoever reads it is found out.

A call of the torch back end is recorded as one, with the tensors that say what its rows see, as a Triton kernel is launched
with them; of the Triton back end every launch and every operation of torch's in between.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from kvloom.engine.model.decoder import Decoder
from kvloom.kernels.cuda_graph import CudaGraph
from kvloom.kernels.graph import CaptureError
from kvloom.kernels.tiles import TorchPlan
from kvloom.kernels.vectorized import TorchKernels
from tests.simulated import GPU, STREAM, Call, There

CALLS = ("store", "attend", "fold", "score", "pool", "select", "renew", "rotate_store", "add_rms_norm", "silu_mul")


class Recording:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self, made: list[Recording], plans: dict[int, TorchPlan]) -> None:
        """made: all of them, in the order of their captures; plans: see `recorded`."""
        self.calls: list[Call] = []
        self.replays, self._made, self._plans = 0, made, plans

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert STREAM.captured is None, "one capture at a time"
        STREAM.captured = self.calls
        self._made.append(self)

    def capture_end(self) -> None:
        STREAM.captured = None
        self._overwrite()

    def replay(self) -> None:
        assert STREAM.captured is None and self.calls
        self.replays += 1
        self._plans.clear()
        for call in self.calls:
            call.again()
        self._overwrite()

    def _overwrite(self) -> None:
        for tensor in (made for call in self.calls for made in call.results):
            tensor.fill_(torch.nan if tensor.is_floating_point() else tensor.dtype == torch.bool or -(2**20))


def recorded(name: str, function: Any, plans: dict[int, TorchPlan]) -> Any:
    """A call of the torch back end, which is recorded while calls are captured. plans: of the replay under way, in place of
    those that were captured."""
    signature = inspect.signature(function)

    def again(*args: Any, **kwargs: Any) -> None:
        """With plans of what rows see now."""
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        if isinstance(plan := given.get("plan"), TorchPlan):
            fresh = TorchPlan(plan.rows, plan.kv_heads, plan.head_dim, {})
            given["plan"] = plans.setdefault(id(plan), fresh)
        if name == "fold":
            given["most"] = int((given["last"] - given["first"]).max())
        function(*bound.args, **bound.kwargs)

    def called(*args: Any, **kwargs: Any) -> Any:
        if STREAM.captured is None:
            return function(*args, **kwargs)
        STREAM.captured.append(Call(again, args, kwargs, []))
        return signature.bind(*args, **kwargs).arguments.get("q" if name == "rotate_store" else "out")

    return called


def launched(run: Any) -> Any:
    """Triton's interpreter on the simulated device: `run` of a kernel."""

    def here(value: Any) -> Any:
        return value.here if isinstance(value, There) else value

    def called(kernel: Any, *args: Any, **kwargs: Any) -> None:
        args, kwargs = tuple(map(here, args)), {name: here(value) for name, value in kwargs.items()}
        if STREAM.captured is None:
            run(kernel, *args, **kwargs)
        else:
            STREAM.captured.append(Call(run, (kernel, *args), kwargs, []))

    return called


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Has back ends on the simulated device capture CUDA graphs, which are these. Before `simulated_gpu`. A capture that fails
    ends the step, instead of letting it run eagerly from then on."""

    def ended(decoder: Decoder, key: object, error: CaptureError) -> None:
        raise error

    made, plans = list[Recording](), dict[int, TorchPlan]()
    monkeypatch.setattr(Decoder, "_give_up", ended)
    monkeypatch.setattr("torch.cuda.CUDAGraph", lambda: Recording(made, plans))
    monkeypatch.setattr("torch.cuda.stream", lambda stream: nullcontext())
    monkeypatch.setattr("torch.cuda.current_stream", lambda: Mock(spec=torch.cuda.Stream))
    monkeypatch.setattr(
        "kvloom.kernels.cuda_graph._shared", functools.cache(lambda device: (None, Mock(spec=torch.cuda.Stream)))
    )
    monkeypatch.setattr(TorchKernels, "graph", lambda self: CudaGraph(GPU) if STREAM.used else None)
    for name in CALLS:
        monkeypatch.setattr(TorchKernels, name, recorded(name, getattr(TorchKernels, name), plans))
    return made
