"""Drawing tokens by the triton back end, rows cut into many parts: the tokens of the definition, whatever parts there are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvloom.kernels import Kernels
from tests.kernels import conftest
from tests.kernels.test_sample import HOWS, How, oracle, sample

pytest.importorskip("triton")
from kvloom.kernels.triton import TritonKernels, sampling

pytestmark = pytest.mark.skipif(conftest.DEVICE != "cpu", reason="kernels are interpreted here")


@pytest.fixture(scope="module")
def triton() -> Kernels:
    return TritonKernels("cpu")


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(1, 400),
    hows=st.lists(HOWS, min_size=2, max_size=2),
    ties=st.sampled_from([0.0, 0.5, 3.0]),
    banned=st.sampled_from([0.0, 0.3, 0.97]),
    parts=st.sampled_from([64, 128]),
)
def test_tokens_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch,
    triton: Kernels,
    seed: int,
    vocab: int,
    hows: list[How],
    ties: float,
    banned: float,
    parts: int,
) -> None:
    """Of vocabularies that fill no part, with equal logits within parts and across them, and tokens that must not come."""
    make = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(hows), vocab, generator=make) * 3
    if ties:
        logits = (logits / ties).round() * ties
    logits[torch.rand(logits.shape, generator=make) < banned] = -torch.inf
    logits[:, seed % vocab] = 1.0
    monkeypatch.setattr(sampling, "PART", parts)
    monkeypatch.setattr(sampling, "TILE", 128)
    found = sample(triton, logits, hows)
    for row, how, token in zip(logits.double().numpy(), hows, found):
        expected, near = oracle(row, how)
        assert token == expected or near < 1e-5
    monkeypatch.undo()
    assert sample(triton, logits, hows) == found, "to the bit, however rows are cut"


def test_rows_for_which_there_is_no_room_come_later() -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(3))
    hows = [How(temperature=0.5 * i, top_k=20 * (i % 2), top_p=1 - i / 9, number=i / 3) for i in range(3)]
    how, out = (torch.tensor(hows, dtype=torch.float64), torch.full((3,), -7))
    room, wanted = sampling.scratch_size(300), sample(TritonKernels("cpu"), logits, hows)
    for numbers in (room, 2 * room + 1, 9 * room):
        scratch = torch.full((numbers,), -1, dtype=torch.int32)
        assert sampling.sample(logits, how, out, scratch).tolist() == wanted
        assert sampling.sample(logits[:0], how[:0], out[:0], scratch).tolist() == []


def test_logits_of_any_stride() -> None:
    wide = torch.randn(3, 333, generator=torch.Generator().manual_seed(4))
    hows = [How(number=0.3), How(temperature=0.0), How(top_p=0.6, number=0.8)]
    for columns in (slice(0, 320), slice(1, 320), slice(5, 333)):
        rows = wide[:, columns]
        assert sample(TritonKernels("cpu"), rows, hows) == sample(TritonKernels("cpu"), rows.contiguous(), hows)


@pytest.mark.parametrize(
    ("spread", "how", "most"),
    [(3, How(top_p=0.9, number=0.5), 20_000), (3, How(top_k=50, number=0.9), 400), (0, How(number=0.99), None)],
)
def test_few_tokens_of_a_large_vocabulary_are_looked_at_again(spread: float, how: How, most: int | None) -> None:
    """And all of one in which every token is as likely as the others."""
    vocab = 131_075 if most else 9_001
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(5)) * spread
    out, scratch = torch.zeros(1, dtype=torch.int64), torch.full((sampling.scratch_size(vocab),), -1, dtype=torch.int32)
    (token,) = sampling.sample(logits, torch.tensor([how], dtype=torch.float64), out, scratch).tolist()
    expected, near = oracle(logits[0].double().numpy(), how)
    assert token == expected or near < 1e-5
    chosen = scratch[-vocab:]
    assert 0 < int((chosen >= 0).sum()) <= (most or vocab)
    assert bool((chosen[chosen >= 0].diff() > 0).all())
