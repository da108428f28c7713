"""What methods remember of requests: bounded, counted from the tensors, taken by those that run and need it, given back."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError, InvalidRequestError
from kvloom.engine.requests.request import KVOptions, Request
from kvloom.engine.requests.state import NO_STATE, StateMemory
from kvloom.engine.selection.lists import KeptLists
from kvloom.kernels.interface import NO_LIST
from tests.selection.conftest import greedy, logprobs_of

Make = Callable[..., LLM]


def text(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 300) for _ in range(length)]


def recycled(budget: int) -> KVOptions:
    return KVOptions(selection="recycled", budget=budget)


def run(llm: LLM, jobs: list[tuple[list[int], KVOptions]], tokens: int) -> tuple[list[Request], int]:
    """All jobs in one batch. Returns the requests and the most bytes of state there were."""
    requests = [Request(id=f"job {i}", prompt=prompt, sampling=greedy(tokens), kv=kv) for i, (prompt, kv) in enumerate(jobs)]
    for request in requests:
        llm.core.add(request)
    most = 0
    while llm.core.busy:
        llm.core.step()
        llm.core.check()
        most = max(most, llm.stats().selection_bytes)
    return requests, most


def test_many_budgets_stay_within_the_bound(make_llm: Make) -> None:
    """140 selectors with records of their own size: requests wait for each other's state, and all finish."""
    bound = 40_000
    llm = make_llm(threads=1, selection_memory=bound)
    requests, most = run(llm, [(text(60, i), recycled(16 + i % 40)) for i in range(140)], 4)
    assert all(request.generated == 4 for request in requests)
    assert bound // 2 < most <= bound, "many at once, but never too many"
    assert llm.stats().selection_bytes == 0, "selectors without requests hold nothing"


def test_requests_that_stay_below_their_budget_need_none(make_llm: Make) -> None:
    llm = make_llm(threads=1, selection_memory=0)
    _, most = run(llm, [(text(2, i), recycled(16 + i)) for i in range(140)], 4)
    assert most == 0


def test_short_requests_beside_long_ones(make_llm: Make) -> None:
    """Rows without state stand in one batch with rows that have some."""
    for name, kv in (
        ("recycled", recycled(24)),
        ("token_select", KVOptions(selection="token_select", budget=24)),
        ("razor_view", KVOptions(selection="razor_view", options={"sinks": 4, "min_window": 20, "window_divisor": 100})),
    ):
        llm, prompts = make_llm(threads=1, reuse="off"), [text(90, 1), text(6, 2), text(70, 3), text(5, 4)]
        together = logprobs_of(llm, prompts, 12, kv)
        for prompt, found in zip(prompts, together):
            assert logprobs_of(llm, [prompt], 12, kv)[0] == pytest.approx(found, abs=1e-5), name


def test_what_can_never_fit_is_refused(make_llm: Make) -> None:
    llm = make_llm(threads=1, selection_memory=1000)
    allowed = r"takes \d+ bytes, and this server has 1000 .*of at most \d+ fits"
    with pytest.raises(InvalidRequestError, match=allowed) as error:
        llm.generate([text(100)], greedy(4), kv=recycled(90))
    largest = int(str(error.value).split("of at most ")[1].split()[0])
    llm.generate([text(100)], greedy(4), kv=recycled(largest))
    with pytest.raises(InvalidRequestError, match=r"which need none"):
        llm.generate([text(100)], greedy(4), kv=recycled(largest + 1))
    llm.generate([text(80)], greedy(4), kv=recycled(90))  # never exceeds its budget
    with pytest.raises(ConfigError, match="selection_memory"):
        make_llm(threads=1, selection_memory=-1)


def test_aborted_and_preempted_requests_give_it_back(make_llm: Make) -> None:
    llm = make_llm(threads=1, kv_memory=16 * 16 * 2 * 2 * 16 * 4 * 3, max_model_len=200)
    core: Any = llm.core
    requests = [Request(id=f"r{i}", prompt=text(60, i), sampling=greedy(60), kv=recycled(24)) for i in range(8)]
    for request in requests:
        core.add(request)
    for step in range(90):
        core.step()
        core.check()
        if step % 30 == 29:
            core.abort(requests[step // 30].id)
            core.check()
    assert llm.stats().preemptions > 0
    while core.busy:
        core.step()
    assert llm.stats().selection_bytes == 0


class Words:
    """A record, and a keeper that has it and nothing else."""

    budget = 0

    def __init__(self, words: int) -> None:
        self.words, self.records = words, (self,)
        self.closings: list[str] = []

    def opened(self, request: Request, words: torch.Tensor) -> None:
        assert len(words) == self.words
        words.fill_(int(request.id))

    def closed(self, request: Request) -> None:
        self.closings.append(request.id)


def test_records_move_together_with_their_contents() -> None:
    memory, small, large = StateMemory(4 * 100), Words(10), Words(25)
    array = memory.words.data_ptr()

    def job(i: int, keeper: Words) -> Request:
        request: Any = Request(id=str(i), prompt=[1], sampling=greedy(1))
        request.selector, request.token_limit = keeper, 2
        assert memory.fits(request)
        memory.open(request)
        return request

    requests = [job(i, small) for i in range(10)]
    memory.check(requests)
    assert not memory.fits(requests[0]) and memory.fits(requests[0], without=requests[3:4])
    for request in requests[::2]:
        memory.close(request)
    assert small.closings == ["0", "2", "4", "6", "8"] and memory.held == 4 * 50
    late = [job(20, large), job(21, large)]  # in 50 words that lie nowhere together
    memory.check([*requests[1::2], *late])
    for keeper, group in ((small, requests[1::2]), (large, late)):
        for request, at in zip(group, memory.at(keeper, group)):
            assert memory.words[at : at + keeper.words].tolist() == [int(request.id)] * keeper.words
    assert memory.at(small, requests[:2]).tolist()[0] == NO_STATE
    assert memory.words.data_ptr() == array and memory.held == 4 * 100


def test_a_new_record_has_no_lists() -> None:
    lists = KeptLists((3, 3), width=5, sinks=2, query=(4, 4))
    words = torch.arange(lists.words, dtype=torch.int32)
    lists.opened(Request(id="0", prompt=[1], sampling=greedy(1)), words)
    for layer in range(2):
        own = lists.of_layer(words, layer)
        assert own[0] == NO_LIST
        assert [own[at : at + 2].tolist() for at in lists.offsets(torch.zeros(1, dtype=torch.int32), 3)[0]] == [[0, 1]] * 3


def test_small_cells_of_long_prompts_take_little_work_space(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of a prompt a query of its own: scored piece by piece, with the same lists."""
    kv = KVOptions(selection="token_select", budget=32, options={"prefill_budget": 16, "chunk": 1})
    prompt, found, space = text(300), [], []
    for most in (1 << 22, 4096):
        monkeypatch.setattr("kvloom.engine.selection.token_select.MOST_LOGITS", most)
        llm = make_llm(threads=1, max_batched_tokens=400)
        found.append(logprobs_of(llm, [prompt], 6, kv))
        space.append(llm.core.runner._scratch._buffers["logits"].nbytes)
    assert found[0] == found[1]
    assert space[0] > 1 << 20 and space[1] <= 4096 * 4 * 5 // 4
