"""A tiny random Llama on disk, with a tokenizer trained on this repository's own documentation strings."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kvloom.engine import LLM
from kvloom.engine.scheduling import admission
from tests.native import native_kernels as native_kernels

if (worker := os.environ.get("PYTEST_XDIST_WORKER", "")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))  # a core per worker: engines take as many threads as there are cores for them
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    torch.set_num_threads(1)  # two threads on one core wait for each other, and kernels that no engine calls would have two

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path) -> int:
    """A byte-level BPE tokenizer with chat markers; returns its vocabulary size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([__doc__ or "", TEMPLATE, Path(__file__).read_text()], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random three-layer Llama in fp32 (4 query heads, 2 KV heads of 16, context 512)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    vocab = write_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=16, max_position_embeddings=512, bos_token_id=None, eos_token_id=2,
                         pad_token_id=None, initializer_range=0.15)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def oracle(tiny: Path) -> Any:
    """The same model in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def drawn_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests without a seed get the same ones in every run: one token in 300 of the tiny model ends a text."""
    monkeypatch.setattr(admission.secrets, "randbits", random.Random(0).getrandbits)


@pytest.fixture
def make_llm(tiny: Path) -> Iterator[Callable[..., LLM]]:
    """Builds engines on the tiny model; afterwards proves that each gave every block back."""
    made: list[LLM] = []

    def make(**config: Any) -> LLM:
        made.append(LLM(str(tiny), **{"dtype": "fp32", "kv_memory": "8MiB", "step_time_ms": 0, **config}))
        return made[-1]

    yield make
    for llm in made:
        llm.core.check()
        assert llm.core.cache.pool.in_use == 0
