"""The layer loop as callers use it: piecewise, with fewer rows, with many and few in turn."""

from __future__ import annotations

import pytest
import torch

from kvloom.engine.model.decoder import Decoder
from kvloom.engine.model.load import load_model
from tests.conftest import native_kernels

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


@pytest.fixture
def decoder(write_gguf, kernels) -> Decoder:
    return load_model(write_gguf("F32"), "fp32", kernels).decoder


def test_pieces_make_up_forward(decoder, sequence_attention) -> None:
    attention = sequence_attention(decoder, len(TOKENS))
    attention.step(torch.arange(len(TOKENS)))
    whole = decoder.forward(torch.tensor(TOKENS), attention).clone()
    x = decoder.embed(torch.tensor(TOKENS))
    delta = decoder.layer(0, x, None, attention)
    delta = decoder.layer(1, x, delta, attention)
    assert torch.equal(decoder.finish(x, delta), whole)


def test_rows_may_be_dropped_between_layers(decoder, sequence_attention, run_logits) -> None:
    """The last layer run for the last rows only gives these rows the same result: their context is in the cache."""
    expected = run_logits(decoder, TOKENS)[-3:]
    attention, rows = sequence_attention(decoder, len(TOKENS)), len(TOKENS)
    run_logits(decoder, TOKENS)
    attention.step(torch.arange(rows))
    decoder.forward(torch.tensor(TOKENS), attention)  # fills the cache of every layer
    x = decoder.embed(torch.tensor(TOKENS))
    delta = decoder.layer(0, x, None, attention)
    keep = torch.arange(rows - 3, rows)
    x, delta = x[keep], delta[keep]
    attention.step(keep)
    hidden = decoder.finish(x, decoder.layer(1, x, delta, attention))
    torch.testing.assert_close(decoder.logits(hidden), expected, rtol=0, atol=2e-4)


def test_steps_of_changing_size_do_not_disturb_each_other(decoder, run_logits) -> None:
    expected = run_logits(decoder, TOKENS)
    for chunks in ([1] * 12, [7, 1, 4], [2, 10]):
        torch.testing.assert_close(run_logits(decoder, TOKENS, chunks), expected, rtol=0, atol=2e-4)


def test_inference_mode_and_plain_calls_mix(decoder, run_logits) -> None:
    with torch.inference_mode():
        inside = run_logits(decoder, TOKENS)
    torch.testing.assert_close(run_logits(decoder, TOKENS), inside, rtol=0, atol=0)


def test_logits_of_chosen_rows(decoder, sequence_attention) -> None:
    attention = sequence_attention(decoder, len(TOKENS))
    attention.step(torch.arange(len(TOKENS)))
    hidden = decoder.forward(torch.tensor(TOKENS), attention)
    before, chosen = hidden.clone(), torch.tensor([2, 11])
    everything = decoder.logits(hidden)
    assert torch.equal(hidden, before), "logits must not change the residual stream"
    assert everything.dtype == torch.float32 and everything.shape == (12, decoder.config.vocab_size)
    torch.testing.assert_close(decoder.logits(hidden[chosen]), everything[chosen], rtol=0, atol=1e-5)


def test_residual_stream_is_fp32(write_gguf, kernels, sequence_attention) -> None:
    decoder = load_model(write_gguf("F32"), "bf16", kernels).decoder
    attention = sequence_attention(decoder, 4)
    attention.step(torch.arange(4))
    x = decoder.embed(torch.tensor(TOKENS[:4]))
    hidden = decoder.finish(x, decoder.layer(1, x, decoder.layer(0, x, None, attention), attention))
    assert (x.dtype, hidden.dtype) == (torch.float32, torch.bfloat16)
    assert not torch.equal(x, x.bfloat16().float()), "the sum must keep what bf16 would lose"


def test_activations_are_reused(decoder, sequence_attention) -> None:
    """No buffer of a layer is allocated anew: the second step writes where the first did."""
    seen: list[set[int]] = []

    class Watch(sequence_attention):
        def __call__(self, layer, qkv, q_norm, k_norm):
            seen[-1].add(qkv.data_ptr())
            return super().__call__(layer, qkv, q_norm, k_norm)

    for rows in (6, 6, 3):
        attention = Watch(decoder, 8)
        attention.step(torch.arange(rows))
        seen.append(set())
        decoder.forward(torch.tensor(TOKENS[:rows]), attention)
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 1


def test_a_larger_workspace_is_captured_anew(write_gguf, sequence_attention) -> None:
    """Graphs write to the buffers that they were captured with; a step that needs larger ones must not find them there."""
    kernels = native_kernels(threads=1)
    eager, captured = (load_model(write_gguf("Q4_1"), "bf16", kernels).decoder for _ in range(2))

    class Kept(sequence_attention):
        """With queries and results in one place."""

        def __call__(self, layer, qkv, q_norm, k_norm):
            result = super().__call__(layer, qkv, q_norm, k_norm)
            if not hasattr(self, "kept"):
                self.kept = torch.empty(len(TOKENS), result.shape[1], dtype=result.dtype)
            return self.kept[: len(result)].copy_(result)

    ones, others, begin = Kept(eager, len(TOKENS)), Kept(captured, len(TOKENS)), 0
    for rows in (1, 1, 4, 2, 4):
        for attention in (ones, others):
            attention.step(torch.arange(begin, begin + rows))
        tokens = torch.tensor(TOKENS[begin : begin + rows])
        assert torch.equal(eager.forward(tokens, ones), captured.forward(tokens, others, "piecewise"))
        begin += rows
    assert len(captured._graphs) == 1 and not eager._graphs
