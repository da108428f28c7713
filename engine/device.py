"""Where a model's tensors are, and how what the host knows gets there.

On a CPU nothing is copied: what the host writes is what kernels read. Elsewhere copies are made in the order of the device's
queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.engine.errors import ConfigError

CPU = torch.device("cpu")


def settle(name: str) -> torch.device:
    """The device of that name, with its number. Raises ConfigError if this torch cannot use it here."""
    if name == "cpu":
        return CPU
    if not torch.cuda.is_available():
        reason = "sees no GPU" if torch.backends.cuda.is_built() else "is built without CUDA"
        raise ConfigError(f"device is {name}, but torch {torch.__version__} {reason} here; use --device cpu")
    return torch.device(name, torch.cuda.current_device())


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device other than the CPU."""
    return int(torch.cuda.mem_get_info(device)[0])


def upload(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A host array as a tensor on the device: a CPU's shares its memory, any other may be written again at once."""
    return torch.from_numpy(values).to(device, non_blocking=True)


class Mirror:
    """An array that the host writes and kernels read, at one address in every step."""

    def __init__(self, shape: int | Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        """Filled with zeros. The host's memory is not pinned: what is copied from it asynchronously is read before the call
        returns, so that the next step may be written while this one runs."""
        self._host = torch.zeros(shape, dtype=dtype)
        self._there = self._host if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
        self.host: npt.NDArray[Any] = self._host.numpy()
        """What the host writes, before `front` is asked for."""

    def front(self, count: int) -> Tensor:
        """The first `count` rows where kernels read them, as the host has written them."""
        there = self._there[:count]
        return there if self._there is self._host else there.copy_(self._host[:count], non_blocking=True)
