"""`sample` against its definition, one token after the other in exact order, on every back end."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.kernels import Allowed, Kernels


class How(NamedTuple):
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    number: float = 0.5


def sample(kernels: Kernels, logits: torch.Tensor, how: list[How], allowed: Allowed | None = None) -> list[int]:
    out = torch.full((len(how),), -7, dtype=torch.int64)
    assert kernels.sample(logits, torch.tensor(how, dtype=torch.float64), out, allowed) is out
    return out.tolist()


def packed(masks: np.ndarray, rows: list[int]) -> Allowed:
    """masks: [masks, vocab] bool. What lies behind the vocabulary in the last word is set: nobody may look at it."""
    whole = np.pad(masks, ((0, 0), (0, -masks.shape[1] % 32)), constant_values=True)
    bits = np.packbits(whole, axis=1, bitorder="little").view(np.int32)
    return Allowed(torch.from_numpy(bits), torch.tensor(rows, dtype=torch.int32))


def oracle(row: np.ndarray, how: How) -> tuple[int, float]:
    """The token, and how near the number is to where another one would begin, or a cut to where it would be another."""
    if how.temperature == 0:
        return int(row.argmax()), 1.0
    order = np.lexsort((np.arange(len(row)), -row))
    weights = np.exp((row[order] - row.max()) / how.temperature)
    near = np.abs(weights / max(how.min_p, 1e-300) - 1).min()
    order, weights = order[weights >= how.min_p], weights[weights >= how.min_p]
    if how.top_k:
        order, weights = order[: how.top_k], weights[: how.top_k]
    reached = weights.cumsum()
    if how.top_p < 1:
        near = min(near, np.abs(reached / reached[-1] - how.top_p).min())
        cut = int(np.searchsorted(reached, how.top_p * reached[-1])) + 1
        order, reached = order[:cut], reached[:cut]
    near = min(near, np.abs(reached / reached[-1] - how.number).min())
    return int(order[min(np.searchsorted(reached, how.number * reached[-1], side="right"), len(order) - 1)]), near


HOWS = st.builds(
    How,
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 3.0, 20.0]),
    top_k=st.integers(0, 60),
    top_p=st.sampled_from([0.01, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    number=st.floats(0, 1, exclude_max=True),
)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), vocab=st.integers(1, 700), hows=st.lists(HOWS, min_size=1, max_size=5))
def test_tokens_are_those_of_the_definition(kernels: Kernels, seed: int, vocab: int, hows: list[How]) -> None:
    logits = torch.randn(len(hows), vocab, generator=torch.Generator().manual_seed(seed)) * 3
    found = sample(kernels, logits, hows)
    for row, how, token in zip(logits.double().numpy(), hows, found):
        expected, near = oracle(row, how)
        assert token == expected or near < 1e-5


@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 1023, 1024, 1025, 5000])
def test_greedy_takes_the_first_of_equals_wherever_they_are(kernels: Kernels, vocab: int) -> None:
    for first in {0, vocab // 3, vocab - 1}:
        logits = torch.full((1, vocab), -2.0)
        logits[0, first:] = 5.0
        assert sample(kernels, logits, [How(temperature=0.0)]) == [first]


@pytest.mark.parametrize("how", [How(temperature=0.0), How(), How(top_k=2, top_p=0.5)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 7, 40, 41])
def test_a_row_that_is_not_finite_gives_no_token_and_harms_no_other(kernels: Kernels, how: How, bad: float, at: int) -> None:
    logits = torch.zeros(3, 42)
    logits[:, 5] = 30.0
    logits[1, at] = bad
    assert sample(kernels, logits, [how] * 3) == [5, -1, 5]
    assert sample(kernels, torch.full((1, 42), -torch.inf), [how]) == [-1]


def test_banned_tokens_are_never_drawn(kernels: Kernels) -> None:
    logits = torch.full((1, 3000), -torch.inf)
    logits[0, 2990:2995] = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6])
    found = {sample(kernels, logits, [How(number=i / 40)])[0] for i in range(40)}
    assert found == {2990, 2991, 2992, 2993, 2994}
    assert sample(kernels, logits, [How(number=float(np.nextafter(1.0, 0.0)))]) == [2994]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6), vocab=st.integers(1, 700), hows=st.lists(HOWS, min_size=1, max_size=5),
    share=st.sampled_from([0.0, 0.02, 0.5, 0.99]), data=st.data(),
)  # fmt: skip
def test_what_a_mask_does_not_allow_is_as_if_it_were_not_there(
    kernels: Kernels, seed: int, vocab: int, hows: list[How], share: float, data: st.DataObject
) -> None:
    make = torch.Generator().manual_seed(seed)
    logits, masks = torch.randn(len(hows), vocab, generator=make) * 3, (torch.rand(2, vocab, generator=make) < share).numpy()
    masks[0, data.draw(st.integers(0, vocab - 1))] = True
    rows = data.draw(st.lists(st.integers(-1, 1), min_size=len(hows), max_size=len(hows)))
    banned = torch.stack(
        [row if of < 0 else row.where(torch.from_numpy(masks[of]), -torch.inf) for row, of in zip(logits, rows)]
    )
    assert sample(kernels, logits, hows, packed(masks, rows)) == sample(kernels, banned, hows)


def test_logits_that_are_not_allowed_are_not_looked_at(kernels: Kernels) -> None:
    logits, masks = torch.zeros(4, 100), np.zeros((3, 100), np.bool_)
    logits[:, 3], logits[:, 50], logits[:, 99] = torch.nan, torch.inf, 5.0
    masks[0, 40:50] = masks[0, 99] = masks[2, 3] = True
    assert sample(kernels, logits, [How(temperature=0.0)] * 4, packed(masks, [0, 1, 2, -1])) == [99, -1, -1, -1]


def test_a_token_does_not_depend_on_its_batch(kernels: Kernels) -> None:
    logits = torch.randn(9, 40_000, generator=torch.Generator().manual_seed(1))
    hows = [How(temperature=0.5 + i / 4, top_k=(0, 50)[i % 2], top_p=(1.0, 0.9)[i % 3 == 0], number=i / 9) for i in range(9)]
    alone = [sample(kernels, logits[i : i + 1], [hows[i]])[0] for i in range(9)]
    assert sample(kernels, logits, hows) == alone


def test_what_does_not_belong_together_is_refused(kernels: Kernels) -> None:
    how, out = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="allowed"):
        kernels.sample(torch.zeros(3, 8), how, out)
    with pytest.raises(TypeError, match="fp64"):
        kernels.sample(torch.zeros(2, 8), how.float(), out)
    with pytest.raises(ValueError, match=r"allowed: \[masks, 1\] and \[2\]"):
        kernels.sample(torch.zeros(2, 8), how, out, packed(np.ones((2, 8), np.bool_), [0]))
    with pytest.raises(TypeError, match="int32"):
        kernels.sample(torch.zeros(2, 8), how, out, packed(np.ones((2, 8), np.bool_), [0, 1])._replace(rows=out))
