"""RazorAttention, evict mode: against a plain torch model with per-head masks, and what memory really comes back."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.calibration import RazorCalibration
from kvloom.engine.errors import ConfigError, InvalidRequestError
from kvloom.engine.requests.request import KVOptions
from kvloom.engine.retention.razor import divide, window_blocks
from kvloom.engine.retention.window import Window
from kvloom.engine.scheduling import StepPlan
from kvloom.engine.step.runner import StepResult

LAYERS, HEADS, GROUP, DIM = 3, 2, 2, 16
INDUCTION = ((0.1, 0.9), (0.8, 0.2), (0.3, 0.4))
RETRIEVAL = {(0, 1), (1, 0)}
"""With an induction share of a third and an echo share of one head that is among them."""
OPTIONS = '{"induction_share": 0.33, "sinks": 3, "min_window": 24, "window_divisor": 4}'
WINDOW = Window(3, 24, 4)


@pytest.fixture(autouse=True)
def calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(model_key: str) -> RazorCalibration:
        echo = tuple(tuple(float((layer, head) == (0, 1)) for head in range(HEADS)) for layer in range(LAYERS))
        return RazorCalibration(model_key=model_key, model="tiny", induction=INDUCTION, echo=echo)

    for module in ("kvloom.engine.retention.window", "kvloom.engine.startup.capacity"):
        monkeypatch.setattr(f"{module}.find_razor", find)


@pytest.fixture
def razor(make_llm: Callable[..., LLM]) -> Callable[..., LLM]:
    return lambda **config: make_llm(**{"retention": "razor", "retention_options": OPTIONS, **config})


def forced(tokens: list[int], text: list[int], **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=len(text), temperature=0, forced_tokens=tuple(text), logprobs=0, **more)


def text(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def scores(llm: LLM, prompt: list[int], after: list[int]) -> list[float]:
    (result,) = llm.generate([prompt], forced(prompt, after))
    return [entry.logprob for entry in result.logprobs]


class Oracle:
    """A small Llama in plain fp64 torch. Rows beyond the prompt see, in local heads, sinks, window and compensation."""

    layers, retrieval = LAYERS, RETRIEVAL

    def __init__(self, folder: Path, block_size: int, *, compensation: bool) -> None:
        self.weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.block_size, self.compensation = block_size, compensation

    def scores(self, prompt: list[int], after: list[int]) -> list[float]:
        """Log-probabilities of the tokens after the prompt, each as a decode row."""
        self.k = [torch.zeros(0, HEADS, DIM, dtype=torch.float64) for _ in range(self.layers)]
        self.v = [torch.zeros(0, HEADS, DIM, dtype=torch.float64) for _ in range(self.layers)]
        logits = self.rows(prompt, [0] * len(prompt))[-1:]
        found = []
        for i, token in enumerate(after):
            found.append(float(torch.log_softmax(logits, -1)[0, token]))
            n = len(prompt) + i + 1
            logits = self.rows([token], [int(WINDOW.begin(np.array([n]), self.block_size)[0])])
        return found

    def rows(self, tokens: list[int], begins: list[int]) -> Tensor:
        w = self.weights
        x = w["model.embed_tokens.weight"][tokens]
        first = len(self.k[0])
        for layer in range(self.layers):
            p = f"model.layers.{layer}."
            h = self.norm(x, w[p + "input_layernorm.weight"])
            q, k, v = ((h @ w[p + f"self_attn.{name}_proj.weight"].T).view(len(tokens), -1, DIM) for name in ("q", "k", "v"))
            positions = torch.arange(first, first + len(tokens))
            q, k = self.rotate(q, positions), self.rotate(k, positions)
            self.k[layer], self.v[layer] = torch.cat([self.k[layer], k]), torch.cat([self.v[layer], v])
            self.q, self.first = q, first
            out = torch.stack([self.attend(layer, row, first + r + 1, begins[r]) for r, row in enumerate(q)])
            x = x + out.flatten(1) @ w[p + "self_attn.o_proj.weight"].T
            h = self.norm(x, w[p + "post_attention_layernorm.weight"])
            gate, up = (h @ w[p + f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
            x = x + (torch.nn.functional.silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T
        head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        return self.norm(x, w["model.norm.weight"]) @ head.T

    def sees(self, layer: int, q: Tensor, n: int) -> dict[int, list[int]]:
        """Positions by retrieval head, where those are not all."""
        return {}

    def attend(self, layer: int, q: Tensor, n: int, begin: int) -> Tensor:
        out, sees = [], self.sees(layer, q, n)
        for h in range(HEADS * GROUP):
            k, v = self.k[layer][:n, h // GROUP], self.v[layer][:n, h // GROUP]
            logits = k @ q[h] * DIM**-0.5
            if h // GROUP in sees:
                logits, v = logits[sees[h // GROUP]], v[sees[h // GROUP]]
            elif begin and (layer, h // GROUP) not in self.retrieval:
                dropped, kept = slice(WINDOW.sinks, begin), [*range(WINDOW.sinks), *range(begin, n)]
                mean = logits[dropped].mean() + math.log(begin - WINDOW.sinks)  # q . mean(k) is the mean of q . k
                logits, values = logits[kept], v[kept]
                if self.compensation:
                    logits, values = torch.cat([logits, mean[None]]), torch.cat([values, v[dropped].mean(0)[None]])
                v = values
            out.append(torch.softmax(logits, 0) @ v)
        return torch.stack(out)

    @staticmethod
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    @staticmethod
    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        angle = positions[:, None].double() * 10000.0 ** (-torch.arange(0, DIM, 2).double() / DIM)
        cos, sin = (torch.cat([f(angle)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
        half = torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1)
        return x * cos + half * sin


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("compensation", [True, False])
def test_rows_see_what_the_paper_says(tiny: Path, razor: Callable[..., LLM], backend: str, compensation: bool) -> None:
    options = OPTIONS.replace("}", f', "compensation": {str(compensation).lower()}}}')
    llm = razor(backend=backend, retention_options=options, max_batched_tokens=70)
    prompt, after = text(90), text(60, 1)
    expected = Oracle(tiny, 16, compensation=compensation).scores(prompt, after)
    assert scores(llm, prompt, after) == pytest.approx(expected, abs=2e-4)
    dense = Oracle(tiny, 10**6, compensation=compensation).scores(prompt, after)
    assert max(abs(a - b) for a, b in zip(expected, dense)) > 1e-2, "dropping tokens changed nothing"


def test_nothing_dropped_is_dense(make_llm: Callable[..., LLM], razor: Callable[..., LLM]) -> None:
    prompt, after = text(90), text(60, 1)
    wide = razor(retention_options=OPTIONS.replace("24", "200"))
    assert scores(wide, prompt, after) == pytest.approx(scores(make_llm(), prompt, after), abs=1e-5)


def test_how_a_prompt_is_cut_does_not_show(razor: Callable[..., LLM]) -> None:
    prompt, after = text(120), text(30, 1)
    assert scores(razor(max_batched_tokens=1024), prompt, after) == scores(razor(max_batched_tokens=40), prompt, after)


def test_a_mixed_batch_equals_each_alone(razor: Callable[..., LLM]) -> None:
    jobs = [(text(n, n), text(40, n + 1)) for n in (20, 90, 150, 33)]
    alone = [scores(razor(reuse="off"), *job) for job in jobs]
    llm = razor(reuse="off", max_batched_tokens=100)
    results = llm.generate([p for p, _ in jobs], [forced(p, a) for p, a in jobs])
    together = [[entry.logprob for entry in result.logprobs] for result in results]
    for a, b in zip(alone, together):
        assert a == pytest.approx(b, abs=1e-5)


def test_memory_comes_back_as_the_formula_says(razor: Callable[..., LLM]) -> None:
    llm = razor(reuse="off")
    cache = llm.core.cache
    held: list[tuple[int, int]] = []

    def observe(request: Any, logits: Tensor) -> None:
        if request.generated > 1:  # blocks were given back after the step before
            held.append((len(request.tokens), cache.groups[1].pool.in_use))

    llm.core.observer = observe
    llm.generate([text(200)], forced([], text(100, 1)))
    assert len(held) > 90
    for n, blocks in held:
        assert blocks == window_blocks(n, 16, WINDOW)
    n, blocks = held[-1]
    whole = -(-n // 16)
    assert (whole, blocks) == (19, 6), "a block of sinks, and five that hold a window of 75"
    stats = llm.stats()
    assert [group.name for group in stats.groups] == ["retrieval", "local"]
    assert stats.groups[0].in_use == stats.groups[1].in_use == 0


def test_a_prompts_beginning_is_used_again_as_far_as_both_groups_hold_it(razor: Callable[..., LLM]) -> None:
    llm = razor()
    prompt, after = text(160), text(20, 1)
    first = scores(llm, prompt, after)
    (again,) = llm.generate([prompt], forced(prompt, after))
    assert again.usage is not None and again.usage.cached_tokens == 144
    assert [entry.logprob for entry in again.logprobs] == pytest.approx(first, abs=1e-5)
    llm.core.cache.groups[1].pool.evict(4)
    (shorter,) = llm.generate([prompt], forced(prompt, after))
    assert shorter.usage is not None and shorter.usage.cached_tokens < 144
    assert [entry.logprob for entry in shorter.logprobs] == pytest.approx(first, abs=1e-5)


def test_generated_tokens_are_not_published(razor: Callable[..., LLM]) -> None:
    llm = razor()
    prompt, after = text(100), text(64, 1)
    llm.generate([prompt], forced(prompt, after))
    (turn,) = llm.generate([prompt + after + text(5, 2)], forced(prompt, [5]))
    assert turn.usage is not None and turn.usage.cached_tokens == 96, "only the prompt's own KV is exact"


def test_preempted_requests_come_back(razor: Callable[..., LLM]) -> None:
    tight = razor(kv_memory=36 * 16 * 2 * 2 * 16 * 4 * 3, max_model_len=256, reuse="off")
    jobs = [text(100, n) for n in range(6)]
    results = tight.generate(jobs, SamplingParams(max_tokens=120, temperature=0, ignore_eos=True))
    assert tight.core.stats().preemptions > 0
    assert all(len(result.tokens) == 120 for result in results)


def test_more_requests_fit_into_the_same_memory(
    make_llm: Callable[..., LLM], razor: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = 5 * 32 * 16 * 2 * 2 * 16 * 4 * 3  # five dense requests of 512 tokens
    most = []
    for make in (make_llm, razor):
        llm = make(kv_memory=memory, reuse="off")
        running: list[int] = []
        runner, run = llm.core.runner, llm.core.runner.run

        def counted(plan: StepPlan, fed: Any, run: Any = run, running: list[int] = running) -> StepResult:
            running.append(sum(chunk.request.generated > 0 for chunk in plan.chunks))
            return run(plan, fed)

        monkeypatch.setattr(runner, "run", counted)
        llm.generate([text(440, n) for n in range(12)], SamplingParams(max_tokens=64, temperature=0, ignore_eos=True))
        assert llm.stats().preemptions == 0
        most.append(max(running))
    assert most[0] <= 5 and most[1] >= 1.5 * most[0], most


def test_division_leaves_room_for_a_prompt() -> None:
    window, memory = Window(4, 256, 5), 1 << 30
    blocks = divide(memory, 8192, 16, (3584 * 16, 19456 * 16), window)
    whole, part = 512, window_blocks(8192, 16, window)
    requests = blocks.retrieval // whole
    assert blocks.retrieval * 3584 * 16 + blocks.local * 19456 * 16 <= memory
    assert (requests - 1) * part + whole <= blocks.local
    assert divide(1 << 20, 8192, 16, (3584 * 16, 19456 * 16), window) == (2, 2), "less than one request: equal parts"


def test_settings_that_cannot_work_are_refused_by_name(
    make_llm: Callable[..., LLM], razor: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, word in (
        ('{"window_divisor": 0}', "window_divisor"),
        ('{"depth": 1}', "depth"),
        ("[1]", "JSON object"),
        ("{", "not JSON"),
        ('{"induction_share": 1.0}', "6 of 6"),
        ('{"heads": "some"}', "heads"),
        ('{"sinks": "x"}', "sinks"),
    ):
        with pytest.raises(ConfigError, match=word):
            razor(retention_options=options)
    with pytest.raises(ConfigError, match="razor_view, but this server's --retention"):
        razor(selection="razor_view")
    with pytest.raises(ConfigError, match="retention_options"):
        make_llm(retention_options=OPTIONS)
    llm = razor()
    for kv in (
        KVOptions(selection="razor_view"),
        KVOptions(selection="tidal_decode", options={"correct_every": 8}),
        KVOptions(selection="token_select", budget=64, options={"positions": "reindexed"}),
    ):
        with pytest.raises(InvalidRequestError, match=f"{kv.selection}, but this server's --retention keeps"):
            llm.generate([text(5)], kv=kv)
    monkeypatch.setattr("kvloom.engine.retention.window.find_razor", lambda model_key: None)
    with pytest.raises(ConfigError, match="kvloom calibrate razor"):
        razor()


def test_random_heads_are_as_many(razor: Callable[..., LLM]) -> None:
    llm = razor(retention_options=OPTIONS.replace("}", ', "heads": "random", "seed": 3}'))
    assert llm.core.runner._retention is not None
    assert llm.core.runner._retention.classes.count == len(RETRIEVAL)
    assert set(llm.core.runner._retention.classes.heads) != RETRIEVAL


@pytest.mark.parametrize("compensation", ["true", "false"])
def test_captured_steps_give_the_bits_of_calls_made_one_by_one(razor: Callable[..., LLM], compensation: str) -> None:
    """Two groups, with something folded or not: steps are captured whole."""
    found = []
    for captures in (True, False):
        options = OPTIONS.replace("}", f', "compensation": {compensation}' + "}")
        llm = razor(weights="int8", dtype="bf16", retention_options=options, max_batched_tokens=48)
        decoder = llm.core.runner.decoder
        assert decoder._most == "full"
        decoder._most = "full" if captures else "none"
        found.append([scores(llm, text(length, length), text(80, 1)) for length in (20, 100, 41)])
        modes = {key.mode for key in decoder._graphs}
        assert modes == ({"full"} if captures else set())
    assert found[0] == found[1]


def test_state_that_leaves_no_room_is_refused(razor: Callable[..., LLM]) -> None:
    """What razor remembers of a request comes first; a method may have the rest."""
    with pytest.raises(ConfigError, match="retention razor remembers 512"):  # 4 heads, 2 * 16 sums
        razor(selection_memory=500)
    llm = razor(selection_memory=1000)
    with pytest.raises(InvalidRequestError, match=r"this server has 488 .*of at most \d+ fits") as error:
        llm.generate([text(100)], forced([], [5]), kv=KVOptions(selection="recycled", budget=90))
    largest = int(str(error.value).split("of at most ")[1].split()[0])
    llm.generate([text(100)], forced([], [5]), kv=KVOptions(selection="recycled", budget=largest))
    llm.core.check()
