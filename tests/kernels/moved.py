"""Kernels of another device, called with the host's tensors: what tests expect on a CPU is asked of a GPU unchanged.

Memory is moved as a whole, not tensor by tensor: strides, tensors that share memory, and what lies around them are as they are
here. It is brought over before each call, that of the plan included, and back after it, so that tests see all that was
written, where it should be and elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

OPERATIONS = frozenset({
    "store", "plan", "attend", "fold", "score", "pool", "select", "renew", "rotate", "sample", "add_rms_norm", "rotate_store",
    "silu_mul",
})  # fmt: skip
REFUSAL = "back end takes"
"""In the message of a ValueError: these kernels do not serve such shapes."""


class Memory(NamedTuple):
    """A piece of memory: what the host has, and its copy, both as bytes."""

    here: Tensor
    there: Tensor


class Moved:
    """`Kernels` on a device. Forgets what it has seen when a test ends (`forget`)."""

    def __init__(self, kernels: Any, device: torch.device) -> None:
        self._kernels, self._device = kernels, device
        self._memories: dict[int, Memory] = {}
        self._plans: dict[int, tuple[Any, set[int]]] = {}
        """By its id, a plan and the memory of its rows."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._kernels, name)
        return self._moving(name, found) if name in OPERATIONS else found

    def forget(self) -> None:
        """Let go of all that was moved."""
        self._memories.clear()
        self._plans.clear()

    def _moving(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def moved(*args: Any, **kwargs: Any) -> Any:
            known: dict[int, Tensor] = {}
            used: set[int] = set()
            args, kwargs = self._there(args, known, used), self._there(kwargs, known, used)
            with self._brought_over(used), refusals():
                found = call(*args, **kwargs)
            if name == "plan":
                self._plans[id(found)] = found, used
                return found
            return self._here(found, known)

        return moved

    @contextmanager
    def _brought_over(self, used: set[int]) -> Iterator[None]:
        for at in used:
            self._memories[at].there.copy_(self._memories[at].here)
        yield
        for at in used:
            self._memories[at].here.copy_(self._memories[at].there)

    def _there(self, value: Any, known: dict[int, Tensor], used: set[int]) -> Any:
        """An argument as the kernels get it. known: by the id of a tensor there, the one here; used: memory, by its address."""
        if isinstance(value, Tensor):
            made = self._tensor(value, used)
            known[id(made)] = value
            return made
        if isinstance(value, dict):
            return {key: self._there(item, known, used) for key, item in value.items()}
        if isinstance(value, tuple):
            items = [self._there(item, known, used) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if id(value) in self._plans:
            used |= self._plans[id(value)][1]
        return value

    def _tensor(self, tensor: Tensor, used: set[int]) -> Tensor:
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device)
        at = storage.data_ptr()
        if at not in self._memories:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._memories[at] = Memory(here, here.to(self._device, copy=True))
        used.add(at)
        there = self._memories[at].there.untyped_storage()
        made = torch.empty(0, dtype=tensor.dtype, device=self._device)
        return made.set_(there, tensor.storage_offset(), tensor.shape, tensor.stride())

    def _here(self, value: Any, known: dict[int, Tensor]) -> Any:
        """A result as the test gets it: what it gave, or a copy of what is new."""
        if isinstance(value, Tensor):
            return known[id(value)] if id(value) in known else value.cpu()
        return tuple(self._here(item, known) for item in value) if isinstance(value, tuple) else value


@contextmanager
def refusals() -> Iterator[None]:
    """Skips the test where kernels say that they do not serve such shapes."""
    try:
        yield
    except ValueError as error:
        if REFUSAL in str(error):
            pytest.skip(str(error))
        raise
