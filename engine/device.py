"""Where a model's tensors are, and how what the host knows gets there.

On a CPU nothing is copied: what the host writes is what kernels read. Elsewhere copies are made in the order of the device's
queue.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.engine.errors import ConfigError

CPU = torch.device("cpu")
OLDEST = (8, 0)
"""Compute capability from which on a GPU is taken without being named: the first that computes in bf16."""


class Placement(NamedTuple):
    """A device, and in words which one that is, or why it is no other; nothing to say of a CPU that was named."""

    device: torch.device
    note: str = ""


def settle(name: str, backend: str = "auto") -> Placement:
    """The device of that name, with its number; of "auto" a GPU that is recent enough where torch can use one, else the CPU.

    backend: `native` computes on a CPU only. Raises ConfigError if this torch cannot use what was named here.
    """
    if name == "cpu":
        return Placement(CPU)
    if name == "auto" and backend == "native":
        return Placement(CPU, "native kernels run there alone")
    if not torch.cuda.is_available():
        reason = f"torch {torch.__version__} {'sees no GPU' if torch.backends.cuda.is_built() else 'is built without CUDA'}"
        if name == "auto":
            return Placement(CPU, reason)
        raise ConfigError(f"device is {name}, but {reason} here; use --device cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    gpu = f"{torch.cuda.get_device_name(device)}, compute capability {'.'.join(map(str, capability))}"
    if name == "auto" and capability < OLDEST:
        return Placement(CPU, f"{gpu}, is older than 8.0; --device cuda --backend torch takes it all the same")
    if backend == "auto" and importlib.util.find_spec("triton") is None:
        gpu += "; triton is not installed, whose kernels are faster than torch's"
    return Placement(device, gpu)


class DeviceMemory(NamedTuple):
    """Memory of a device other than the CPU, in bytes."""

    free: int
    """Can be allocated."""
    total: int


def memory_of(device: torch.device) -> DeviceMemory:
    """As of now, once what this process only keeps for later has been given back."""
    torch.cuda.empty_cache()
    return DeviceMemory(*torch.cuda.mem_get_info(device))


def out_of_memory(error: BaseException | None) -> str:
    """What was asked for where a device's memory ran out, such as "2.00 GiB"; empty if an error has another cause.

    What this process keeps for later is given back then, so that the next attempt finds it in one piece.
    """
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__
    if error is None:
        return ""
    torch.cuda.empty_cache()
    asked = re.search(r"Tried to allocate ([0-9.]+ \w+)", str(error))
    return asked[1] if asked else "memory"


def staged(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A host array as a tensor on the host that a device copies from by itself: a CPU's shares its memory."""
    found = torch.from_numpy(values)
    return found if device.type == "cpu" else host_memory(found.shape, found.dtype, device).copy_(found)


def upload(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A host array as a tensor on the device: a CPU's shares its memory, any other may be written again at once."""
    return staged(values, device).to(device, non_blocking=True)


def host_memory(shape: int | Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros on the host, which the device copies from and to by itself: pinned."""
    return torch.zeros(shape, dtype=dtype, pin_memory=device.type != "cpu")


def mark(device: torch.device) -> torch.Event:
    """An event that has taken place once the device has done all that is queued there now."""
    event = torch.Event(device)
    event.record()
    return event


class Front:
    """The first rows of a buffer: the view that was asked for last is kept, as most steps have as many rows as the last one."""

    def __init__(self, whole: Tensor) -> None:
        self.whole, self._view, self._count = whole, whole, len(whole)

    def __call__(self, count: int) -> Tensor:
        """The first `count` of them."""
        if count != self._count:
            self._view, self._count = self.whole[:count], min(count, len(self.whole))
        return self._view


class Mirror:
    """An array that the host writes and kernels read, at one address in every step.

    Elsewhere than on a CPU it is copied when kernels are about to read it, in the order of the device's queue. So there are two
    arrays that the host writes in turn, and one is written again once the device has read it.
    """

    def __init__(self, shape: int | Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        """Filled with zeros."""
        self._arrays = [host_memory(shape, dtype, device) for _ in range(1 if device.type == "cpu" else 2)]
        self._hosts: list[npt.NDArray[Any]] = [array.numpy() for array in self._arrays]
        self._there = Front(self._arrays[0] if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device))
        self._reads: list[torch.Event | None] = [None] * len(self._arrays)
        """Of every array, the copy that may still be under way."""
        self._turn = 0

    @property
    def host(self) -> npt.NDArray[Any]:
        """What the host writes, all that is to be read of it, before `front` is asked for."""
        if (read := self._reads[self._turn]) is not None:
            read.synchronize()
            self._reads[self._turn] = None
        return self._hosts[self._turn]

    def front(self, count: int) -> Tensor:
        """The first `count` rows where kernels read them, as the host has written them."""
        there, array = self._there(count), self._arrays[self._turn]
        if self._there.whole is array:
            return there
        there.copy_(array[:count], non_blocking=True)
        self._reads[self._turn] = mark(there.device)
        self._turn = 1 - self._turn
        return there


class Download:
    """Values of a tensor on their way to the host, where it need not wait for what is queued behind them."""

    def __init__(self, there: Tensor) -> None:
        """The tensor may be written again at once, but on a CPU."""
        self._values, self._done = there, None
        if there.device.type != "cpu":
            self._values = host_memory(there.shape, there.dtype, there.device).copy_(there, non_blocking=True)
            self._done = mark(there.device)

    def read(self) -> Any:
        """Wait for them: numbers, in lists of lists as many as the tensor had dimensions."""
        if self._done is not None:
            self._done.synchronize()
        return self._values.tolist()
