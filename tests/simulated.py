"""A device of its own on a machine that has none: tensors that say they are on a GPU and are computed on the CPU.

What a GPU refuses is refused: operations on tensors of both places, `numpy()`, and reading their memory. What it does silently
and slowly, indices that have to be brought there first, is refused too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_NAME = "simulated"
_setup_privateuseone_for_python_backend(_NAME)
GPU = torch.device(_NAME, 0)
_aten = torch.ops.aten
_BETWEEN = {_aten.copy_.default, _aten._to_copy.default}
"""Operations that bring values from one place to the other."""


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
        return self.here.tolist()


class Factories(TorchDispatchMode):
    """Makes tensors there that are asked for there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operation, where it belongs."""
    known: dict[int, There] = {}
    strangers: list[tuple[int, ...]] = []

    def here(value: Any) -> Any:
        if isinstance(value, There):
            known[id(value.here)] = value
            return value.here
        if isinstance(value, (tuple, list)):
            return type(value)(map(here, value))
        if isinstance(value, Tensor) and value.dim():
            strangers.append(tuple(value.shape))
        return value

    def placed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return known[id(value)] if id(value) in known else There(value) if there else value
        return type(value)(map(placed, value)) if isinstance(value, (tuple, list)) else value

    to_there = func is not _aten.copy_.default or isinstance(args[0], There)
    args, kwargs = here(args), {name: here(value) for name, value in kwargs.items()}
    assert not (known and strangers) or func in _BETWEEN, f"{func} of tensors there and here {strangers}"
    there = bool(known) and to_there
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == GPU.type
        kwargs["device"] = torch.device("cpu")
    return placed(func(*args, **kwargs))


@contextmanager
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, `device="cuda"` is the simulated device. Inference mode, which has no views of such tensors, only records no
    gradients."""

    def enter(mode: Any) -> None:
        mode.recorded = torch.is_grad_enabled()
        torch.set_grad_enabled(False)

    def leave(mode: Any, *_: object) -> None:
        torch.set_grad_enabled(mode.recorded)

    monkeypatch.setattr(torch.inference_mode, "__enter__", enter)
    monkeypatch.setattr(torch.inference_mode, "__exit__", leave)
    monkeypatch.setattr("kvloom.engine.startup.build.settle", lambda name: GPU if name == "cuda" else torch.device(name))
    monkeypatch.setattr("kvloom.engine.startup.memory.free_memory", lambda device: 1 << 33)
    with Factories():
        yield
