"""How far a query has moved: the summaries that Recycled Attention's trigger compares (RefreshKV, section 3, "dynamic").

    mean   the mean over heads, as in the paper: one cosine; hides a change in a single head
    min    every head on its own: the least cosine counts
    flat   all heads in one vector (TokenSelect, Algorithm 1)

Sums run over one row at a time in one order: a row's cosine does not depend on the batch.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

Compare = Literal["mean", "min", "flat"]
Floats = npt.NDArray[np.float32]


def summary(q: Tensor, compare: Compare) -> Floats:
    """What is kept of queries [rows, q_heads, head_dim]: [rows, vectors, size] fp32."""
    heads: Floats = q.float().numpy()
    if compare == "mean":
        return heads.mean(axis=1, keepdims=True)
    return heads.reshape(len(heads), 1, -1) if compare == "flat" else heads


def similarity(queries: Floats, kept: Floats) -> Floats:
    """[rows]: cosines of `summary`'s queries and kept ones, [rows, vectors * size]; the least of a row's vectors."""
    old = kept.reshape(queries.shape)
    products = (queries * old).sum(axis=-1)
    lengths = np.sqrt(np.square(queries).sum(axis=-1) * np.square(old).sum(axis=-1))
    cosines: Floats = products / np.maximum(lengths, np.finfo(np.float32).tiny)
    return cosines.min(axis=-1)
