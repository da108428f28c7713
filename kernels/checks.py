"""What back ends that work on addresses ask of tensors, in the same words."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def same_dtype(first: Tensor, *others: Tensor) -> None:
    """Raises TypeError unless all are fp32, all bf16 or all fp16."""
    dtype = first.dtype
    if dtype not in FLOATS or any(other.dtype is not dtype for other in others):
        given = [str(tensor.dtype) for tensor in (first, *others)]
        raise TypeError(f"tensors must share one dtype of fp32, bf16, fp16; got {given}")


def strides(tensor: Tensor) -> tuple[int, ...]:
    """All of them. Raises ValueError if the last is not 1."""
    found = tensor.stride()
    if found[-1] != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"the last dimension must be contiguous; got strides {found} of shape {tuple(tensor.shape)}")
    return found


def fp32(tensor: Tensor) -> None:
    """Raises TypeError unless it is fp32 and its last stride 1."""
    if tensor.dtype is not torch.float32 or tensor.stride(-1) != 1:
        raise TypeError(f"must be fp32 with a contiguous last dimension; got {tensor.dtype}, strides {tensor.stride()}")


def index(tensor: Tensor, dtype: torch.dtype) -> None:
    """Raises TypeError unless it is of this dtype and contiguous."""
    if tensor.dtype is not dtype or not tensor.is_contiguous():
        raise TypeError(f"must be contiguous {dtype}; got {tensor.dtype}, strides {tensor.stride()}")
