"""The built-in model on real text: logits equal those of transformers reading the same file, and the text makes sense."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvloom.engine.model.gguf_file import read_metadata
from kvloom.engine.model.load import load_model
from kvloom.kernels.reference import ReferenceKernels

TEXT = "The capital of France is Paris, and the capital of Spain is"


@pytest.fixture(scope="module")
def tokenizer(smollm2) -> Tokenizer:
    metadata = read_metadata(smollm2, ["tokenizer.ggml.tokens", "tokenizer.ggml.merges"])
    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_config(smollm2) -> None:
    config = load_model(smollm2, "bf16", ReferenceKernels(), max_model_len=16).config
    assert (config.layers, config.hidden_size, config.q_heads, config.kv_heads, config.head_dim) == (30, 576, 9, 3, 64)
    assert (config.vocab_size, config.eos_token_ids, config.tied_embeddings, config.max_position) == (49152, (2,), True, 16)


def test_logits_equal_transformers(smollm2, tokenizer, run_logits, read_with_transformers) -> None:
    tokens = tokenizer.encode(TEXT).ids
    with torch.no_grad():
        expected = read_with_transformers(smollm2)(torch.tensor([tokens])).logits[0]
    logits = run_logits(load_model(smollm2, "fp32", ReferenceKernels(), max_model_len=64).decoder, tokens)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
    assert tokenizer.decode([int(logits[-1].argmax())]) == " Madrid"
