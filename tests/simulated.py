"""A device of its own on a machine that has none: tensors that say they are on a GPU and are computed on the CPU.

What a GPU refuses is refused: operations on tensors of both places, `numpy()`, reading their memory, and what does not fit into
it. What it does silently and slowly, indices that have to be brought there first, is refused too.

Operations are done at once, or late: not before the host waits, and copies from pinned memory read what is there by then.
`tests.recorded` captures them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from kvloom.engine.device import CPU, DeviceMemory, Placement

_NAME = "simulated"
_setup_privateuseone_for_python_backend(_NAME)
GPU = torch.device(_NAME, 0)
_aten = torch.ops.aten
GIB = 1 << 30


@dataclass
class Memory:
    """What the device says it has, in bytes, and the largest piece of it that can be had."""

    total: int = 9 * GIB
    free: int = 8 * GIB
    largest: int = 1 << 62

    def check(self, size: int) -> None:
        """Raises as CUDA does where a tensor of so many bytes does not fit."""
        if size > self.largest:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size / GIB:.2f} GiB. GPU 0 has no more.")


memory = Memory()
_BETWEEN = {_aten.copy_.default, _aten._to_copy.default}
"""Operations that bring values from one place to the other."""
_ASKING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim"}
"""Operations that a host waits for, by the names of their packets."""
_PINNED: set[int] = set()
"""Addresses of memory that the device reads by itself."""


class Call(NamedTuple):
    """An operation that can be done again on the same tensors. results: what it makes, and writes where it was made first."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    results: list[Tensor]

    def again(self) -> None:
        for old, new in zip(self.results, tensors(self.function(*self.args, **self.kwargs))):
            old.copy_(new)


def tensors(value: Any) -> list[Tensor]:
    """All of them in nested tuples and lists."""
    if isinstance(value, (tuple, list)):
        return [found for each in value for found in tensors(each)]
    return [value] if isinstance(value, Tensor) else []


class Stream:
    """What the device does, in order."""

    def __init__(self) -> None:
        self.used = self.late = False
        self.queue: list[Call] = []
        self.done = 0
        """Calls that were queued and have been made."""
        self.captured: list[Call] | None = None
        """Calls while they are captured: none is made."""

    def wait(self, until: int | None = None) -> None:
        """Do what is queued, or so much of all that ever was."""
        for call in self.queue[: None if until is None else max(0, until - self.done)]:
            call.again()
            self.queue.pop(0)
            self.done += 1

    def operation(self, func: Any, args: Any, kwargs: Any, between: bool) -> Any:
        """An operation of torch's, now or later. between: whether it is one from host to device or back."""
        name = func.overloadpacket.__name__
        asks = name in _ASKING or (name.startswith("index") and any(one.dtype == torch.bool for one in tensors(args[1:2])))
        if self.captured is not None:
            assert not asks and not between, f"{func} asks for values or copies from the host, while calls are captured"
        elif not self.late:
            return func(*args, **kwargs)
        elif asks:
            self.wait()
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            result, made = kwargs.get("out", args[0]), []
        else:
            result = func(*args, **kwargs)
            made, known = tensors(result), {tensor.untyped_storage().data_ptr() for tensor in tensors(args)}
            if any(tensor.untyped_storage().data_ptr() in known for tensor in made):
                return result  # a view
        (self.queue if self.captured is None else self.captured).append(Call(func, args, kwargs, made))
        return result


STREAM = Stream()


class Event:
    """`device.mark` of the simulated device."""

    def __init__(self) -> None:
        self._until = STREAM.done + len(STREAM.queue)

    def synchronize(self) -> None:
        STREAM.wait(self._until)


def pinned(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`device.host_memory` of the simulated device."""
    made = torch.zeros(shape, dtype=dtype)
    if device == GPU:
        _PINNED.add(made.untyped_storage().data_ptr())
    return made


class There(Tensor):
    """A tensor on the simulated device. here: what it holds."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made: There = Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=GPU,
            storage_size=here.untyped_storage().nbytes(),
        )  # fmt: skip
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})

    def tolist(self) -> Any:
        assert STREAM.captured is None, "values are asked for while calls are captured"
        STREAM.wait()
        return self.here.tolist()


class Factories(TorchDispatchMode):
    """Makes tensors there that are asked for there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operation, where it belongs."""
    known: dict[int, There] = {}
    storages: set[int] = set()
    strangers: list[tuple[int, ...]] = []

    def here(value: Any) -> Any:
        if isinstance(value, There):
            known[id(value.here)] = value
            storages.add(value.here.untyped_storage().data_ptr())
            return value.here
        if isinstance(value, (tuple, list)):
            return type(value)(map(here, value))
        if isinstance(value, Tensor) and value.dim():
            strangers.append(tuple(value.shape))
        return value

    def read(value: Any) -> Any:
        """What lies in memory that is not pinned is read before the call returns."""
        pinned = not isinstance(value, Tensor) or value.untyped_storage().data_ptr() in _PINNED
        return value if pinned or id(value) in known else value.clone()

    def placed(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) in known or not there:
                return known.get(id(value), value)
            if value.untyped_storage().data_ptr() not in storages:
                memory.check(value.untyped_storage().nbytes())
            return There(value)
        return type(value)(map(placed, value)) if isinstance(value, (tuple, list)) else value

    to_there = func is not _aten.copy_.default or isinstance(args[0], There)
    args, kwargs = here(args), {name: here(value) for name, value in kwargs.items()}
    assert not (known and strangers) or func in _BETWEEN, f"{func} of tensors there and here {strangers}"
    there, between = bool(known) and to_there, bool(strangers)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == GPU.type
        between |= bool(known) and not there
        kwargs["device"] = torch.device("cpu")
    if known and not there and not (args and args[0].untyped_storage().data_ptr() in _PINNED):
        STREAM.wait()  # brought to memory that the host reads at once
    if STREAM.late and there:
        args = tuple(map(read, args))
    return placed(STREAM.operation(func, args, kwargs, between) if known or there else func(*args, **kwargs))


@contextmanager
def simulated_gpu(monkeypatch: pytest.MonkeyPatch, *, late: bool = False) -> Iterator[Memory]:
    """Within, `device="cuda"` is the simulated device, whose memory is given: all that is asked for is there. Inference mode,
    which has no views of such tensors, only records no gradients. late: operations are done late."""
    vars(memory).update(vars(Memory()))

    def enter(mode: Any) -> None:
        mode.recorded = torch.is_grad_enabled()
        torch.set_grad_enabled(False)

    def leave(mode: Any, *_: object) -> None:
        torch.set_grad_enabled(mode.recorded)

    monkeypatch.setattr(torch.inference_mode, "__enter__", enter)
    monkeypatch.setattr(torch.inference_mode, "__exit__", leave)
    placed = {"cpu": Placement(CPU), "auto": Placement(GPU, "chosen"), "cuda": Placement(GPU, "a simulated GPU")}
    monkeypatch.setattr("kvloom.engine.startup.build.settle", lambda name, backend: placed[name])
    for user in ("memory", "gpu_memory"):
        there = f"kvloom.engine.startup.{user}.memory_of"
        monkeypatch.setattr(there, lambda device: DeviceMemory(memory.free, memory.total))
    monkeypatch.setattr("kvloom.engine.device.host_memory", pinned)
    monkeypatch.setattr("kvloom.engine.device.mark", lambda device: Event())
    STREAM.used, STREAM.late = True, late
    try:
        with Factories():
            yield memory
    finally:
        STREAM.used = STREAM.late = False
