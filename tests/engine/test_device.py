"""Everything of an engine is on its device: on a simulated GPU, each method and feature gives what it gives on a CPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch

from kvloom.engine import LLM, KVOptions, SamplingParams
from kvloom.engine.device import Download, Mirror, settle
from kvloom.engine.errors import ConfigError
from kvloom.engine.llm import Completion
from tests.selection import test_guard
from tests.selection.test_guard import EVERY, config
from tests.simulated import GPU, STREAM, There, simulated_gpu

MakeLLM = Callable[..., LLM]
calibrated = test_guard.calibrated
SAMPLED = SamplingParams(
    temperature=0.7, top_p=0.95, min_p=0.01, seed=3, max_tokens=6, ignore_eos=True, logprobs=2, repetition_penalty=1.1,
    presence_penalty=0.1, logit_bias={5: 1.0},
)  # fmt: skip
OF_ALL = ("dense", "tidal_decode", "retention razor, recycled")
"""Of the others as well, decoding is held to a CPU's by test_graphs.py."""
CASES: dict[str, KVOptions] = {
    **{name: EVERY[name] for name in OF_ALL},
    "sparse prompts": KVOptions(selection="token_select", budget=32, options={"prefill_budget": 32}),
    "re-indexed": KVOptions(
        selection="token_select", budget=32, options={"positions": "reindexed", "prefill_budget": 32, "chunk": 16, "theta": 0.3}
    ),
    "drafts": KVOptions(selection="tidal_decode", budget=32, options={"layers": (1,)}, draft=True),
}


def prompts(count: int) -> list[list[int]]:
    source = random.Random(4)
    return [[source.randrange(3, 300) for _ in range(length)] for length in (41, 50, 97)[:count]]


def told(results: Sequence[Completion]) -> list[tuple[list[int], list[float]]]:
    assert all(result.error is None for result in results)
    return [(result.tokens, [entry.logprob for entry in result.logprobs]) for result in results]


def same(found: list[tuple[list[int], list[float]]], wanted: list[tuple[list[int], list[float]]]) -> None:
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
    for (_, these), (_, those) in zip(found, wanted):
        assert these == pytest.approx(those, abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_method_gives_on_a_gpu_what_it_gives_on_a_cpu(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    settings = {"backend": "torch", "kv_memory": "1MiB", "shadow_interval": 3, **config(name)}
    sampling = [SAMPLED, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, prompt_logprobs=1, logprobs=0)]
    wanted = told(make_llm(**settings).generate(prompts(2), sampling, kv=CASES[name]))
    with simulated_gpu(monkeypatch):
        llm = make_llm(device="cuda", **settings)
        same(told(llm.generate(prompts(2), sampling, kv=CASES[name])), wanted)
    assert llm.model.device == "cuda"
    runner = llm.core.runner
    assert all(isinstance(tensor, There) for group in llm.core.cache.groups for kv in group.storage.layers for tensor in kv)
    assert isinstance(runner.decoder.embedding.weight, There) and isinstance(runner.geometry.inv_freq, There)
    stats = llm.stats().selection
    assert CASES[name].selection is None or stats[CASES[name].selection].decode_rows > 0


def test_segments_are_reused_on_a_gpu(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (
        '{"verified": true, "min_match": 32, "min_reusable": 48, "min_gain": -1, "reject_above": 10, "shadow_share": 0, '
        '"heal": false}'
    )
    settings = {"backend": "torch", "kvshare_options": options, "segment_memory": "4MiB", "kv_memory": "1MiB"}
    document, (before, after) = prompts(3)[2], ([7] * 20, [9] * 31)
    one = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=0)

    def shared(llm: LLM) -> list[tuple[list[int], list[float]]]:
        kv = KVOptions(reuse="approx", reuse_options={"policy": "query"})
        llm.generate([before + document], one, kv=kv)
        found = llm.generate([after + document + [11] * 8], one, kv=kv)
        assert found[0].usage is not None and found[0].usage.reused_tokens > 0
        return told(found)

    wanted = shared(make_llm(**settings))
    with simulated_gpu(monkeypatch):
        same(shared(make_llm(device="cuda", **settings)), wanted)


def test_tensors_of_two_places_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_gpu(monkeypatch):
        there = torch.arange(4, device=GPU)
        assert isinstance(there, There) and (there + 1).tolist() == [1, 2, 3, 4]
        for wrong in (lambda: there + torch.arange(4), lambda: there[torch.tensor([1, 2])]):
            with pytest.raises(AssertionError, match="of tensors there and here"):
                wrong()
        with pytest.raises(RuntimeError, match="not supported"):
            there.numpy()


def test_what_the_host_writes_is_there_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    near = Mirror(4, torch.int32, torch.device("cpu"))
    near.host[:2] = 3
    assert near.front(2).tolist() == [3, 3] and near.front(4).data_ptr() == near.host.ctypes.data
    with simulated_gpu(monkeypatch):
        far = Mirror((4, 2), torch.int64, GPU)
        first = far.front(3)
        far.host[:3] = 5
        assert first.tolist() == [[0, 0]] * 3, "nothing is copied before it is asked for"
        assert far.front(2).tolist() == [[5, 5]] * 2 and first.tolist() == [[5, 5]] * 2 + [[0, 0]]


def test_the_host_writes_no_array_that_is_still_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that does what is queued late. Two steps may be queued; a third waits for the first one's copy alone."""
    with simulated_gpu(monkeypatch, late=True):
        far, read = Mirror(3, torch.int64, GPU), []
        for step in range(6):
            far.host[:2] = step + 1
            queued = len(STREAM.queue)
            read.append(far.front(2).clone())  # what a kernel of this step sees
            assert len(STREAM.queue) == queued + 2, "nobody waits for a step that has just been queued"
            assert step < 2 or queued == 3, "a step waits for the copy of the one before the last, and not for its kernels"
        assert [seen.tolist() for seen in read] == [[step + 1] * 2 for step in range(6)]


def test_values_that_are_brought_back_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_gpu(monkeypatch, late=True):
        there = torch.zeros(2, device=GPU)
        there += 1
        coming = Download(there)
        there += 1
        assert len(STREAM.queue) > 2 and coming._values.tolist() == [0, 0], "it is only on its way"
        assert coming.read() == [1, 1] and len(STREAM.queue) == 1, "what is queued behind it goes on"
        assert there.tolist() == [2, 2]
    assert Download(torch.tensor([3])).read() == [3]


def test_a_device_that_is_not_there_is_told(make_llm: MakeLLM) -> None:
    if torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(ConfigError, match=r"device is cuda, but torch .* here; use --device cpu"):
        settle("cuda")
    assert settle("cpu").device == settle("auto").device == torch.device("cpu")
    with pytest.raises(ConfigError, match="use --device cpu"):
        make_llm(device="cuda")
    with pytest.raises(ConfigError, match="device is 'tpu'; allowed: auto, cpu, cuda"):
        make_llm(device="tpu")
