"""HijackKV, read from the KV itself: whatever a tenant reuses of another's was computed behind the neutral prose and the very
tokens that its own prompt has there, wherever and however often the attacker put its words.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvloom.engine import LLM, KVOptions, SamplingParams
from kvloom.engine.requests.request import Request
from kvloom.engine.reuse.kvshare.matching import Match, Piece, Run
from kvloom.engine.reuse.kvshare.scan import gather
from kvloom.engine.reuse.kvshare.share import KVShare

MakeLLM = Callable[..., LLM]
OPTIONS = (
    '{"verified": true, "min_match": 32, "min_reusable": 32, "min_gain": -1, "reject_above": 10, "shadow_share": 0, '
    '"heal": false}'
)
TENANTS = "tenants: {mallory: {group: g}, mallet: {group: g}, victim: {group: g}, honest: {group: g}}"
ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
NUMBERS = itertools.count()


def words(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 300) for _ in range(length)]


SPECIAL = 1
POPULAR, EVIL = words(1, 260), words(66, 90)
PLACEMENTS = {
    "in front": [*EVIL, *POPULAR],
    "a few words in front": [*EVIL[:3], *POPULAR],
    "inside": [*POPULAR[:130], *EVIL, *POPULAR[130:]],
    "one token changed": [*POPULAR[:100], 2 + POPULAR[100] % 7, *POPULAR[101:]],
    "between two copies": [*POPULAR[:120], *EVIL, *POPULAR[:120]],
    "copies behind each other": [*POPULAR[:120], *POPULAR[:120], *POPULAR[60:160]],
    "from its middle": POPULAR[70:],
    "cut elsewhere": [*EVIL[:40], *POPULAR[17:]],
    "behind a special token": [*EVIL, SPECIAL, *POPULAR],
    "itself, then words": [*POPULAR[:150], *EVIL],
}

FROM_THE_START = {"itself, then words": 150, "inside": 130, "one token changed": 100, "between two copies": 120,
                  "copies behind each other": 120, "from its middle": 190}  # fmt: skip
"""Tokens of the popular text that what is planted begins with: as many may be reused, and no more."""


@pytest.fixture
def llm(make_llm: MakeLLM, tmp_path: Path) -> LLM:
    file = tmp_path / "tenants.yaml"
    file.write_text(TENANTS)
    return make_llm(kvshare_options=OPTIONS, segment_memory="64MiB", tenants=str(file))


def upload(llm: LLM, tenant: str, text: list[int]) -> None:
    request = Request(id=f"u{next(NUMBERS)}", prompt=tuple(text), sampling=ONE, kv=KVOptions(segment="group"), tenant=tenant)
    llm._run([request])


def ask(llm: LLM, tenant: str, prompt: list[int], share: str = "none") -> dict[str, Any]:
    """A request that reuses as much as it can; what it says of itself."""
    kv = KVOptions(
        reuse="approx", share=share, explain=True, reuse_options={"policy": "boundary", "ratio": 0.0, "max_stale": 1.0}
    )
    request = Request(
        id=f"r{next(NUMBERS)}", prompt=tuple(prompt), sampling=ONE, kv=kv, tenant=tenant, arrival=float(next(NUMBERS))
    )
    (result,) = llm._run([request])
    assert result.usage is not None
    return dict(result.usage.explanation)


def see(llm: LLM, text: list[int]) -> None:
    """Two prompts that share a text, from two tenants of the group, and the idle engine's work after them."""
    for tenant, seed in (("mallory", 501), ("mallet", 502)):
        ask(
            llm, tenant, [*words(seed, 20), SPECIAL, *text, SPECIAL, *words(seed + 2, 20)], share="group"
        )  # cut as an upload is
    llm.settle()


def plant(llm: LLM, way: str, text: list[int]) -> None:
    upload(llm, "mallory", text) if way == "upload" else see(llm, text)


@pytest.fixture(scope="module")
def alone() -> dict[tuple[int, ...], tuple[Tensor, Tensor]]:
    """KV of texts right behind the prose, computed for the test."""
    return {}


def computed_alone(llm: LLM, text: list[int], known: dict[tuple[int, ...], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """K and V of [prose + text], the text's rows: [layers, len, heads, dim], keys rotated for where they stand there."""
    if tuple(text) not in known:
        sink = list(llm.core.feature(KVShare)._donors._sink)
        request = Request(id=f"f{next(NUMBERS)}", prompt=(*sink, *text), sampling=ONE, kv=KVOptions(reuse="off"))
        llm.core.add(request)
        kept: list[tuple[Tensor, Tensor]] = []
        llm.core.observer = lambda seen, logits: kept.append(rows_of(llm, seen, len(sink), len(sink) + len(text)))
        while llm.core.busy:
            llm.core.step()
        llm.core.observer = None
        known[tuple(text)] = kept[0]
    return known[tuple(text)]


def rows_of(llm: LLM, request: Request, first: int, last: int) -> tuple[Tensor, Tensor]:
    """K and V that a running request holds at positions [first, last)."""
    cache, table = llm.core.cache, llm.core._scheduler.table(request)
    at = np.arange(first, last)
    blocks = np.array(table.blocks)
    slots = torch.from_numpy(blocks[at // cache.block_size] * cache.block_size + at % cache.block_size)
    return tuple(torch.stack([gather(part, slots) for part in parts]) for parts in zip(*cache.storage.layers))  # type: ignore[return-value]


def turned(llm: LLM, keys: Tensor, shift: int) -> Tensor:
    """Keys rotated on by so many positions, in plain arithmetic. keys: [..., dim]"""
    angle = shift * llm.core.runner.decoder.rotary.inv_freq.double()
    half = keys.shape[-1] // 2
    a, b = keys[..., :half].double(), keys[..., half:].double()
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def check_reuse(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, prompt: list[int], known: dict[tuple[int, ...], tuple[Tensor, Tensor]]
) -> int:
    """The victim asks; every row that it takes from others is compared with a computation of the prose and the victim's own
    tokens. Returns how many rows there were."""
    share, compared = llm.core.feature(KVShare), 0
    original = share.settle

    def watched(request: Request) -> None:
        nonlocal compared
        match = share._looking[request][0].match
        match.check(np.array(prompt, np.int32))
        original(request)
        for run in match.runs if request.repair is not None else ():
            if not run.domain.shared:
                continue
            held = rows_of(llm, request, run.start, run.stop)
            keys, values = computed_alone_outside(llm, prompt[run.start : run.stop], known)
            shift = run.start - len(share._donors._sink)
            assert float((held[0].double() - turned(llm, keys, shift)).abs().max()) < 2e-3, "keys of another context"
            assert float((held[1] - values).abs().max()) < 1e-3, "values of another context"
            compared += run.length

    monkeypatch.setattr(share, "settle", watched)
    ask(llm, "victim", prompt)
    monkeypatch.setattr(share, "settle", original)
    return compared


def computed_alone_outside(
    llm: LLM, text: list[int], known: dict[tuple[int, ...], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """A prefix of one of the texts that were computed for the test: attention is causal, so its rows are the text's."""
    whole = next(name for name in known if list(name[: len(text)]) == text)
    k, v = known[whole]
    return k[:, : len(text)], v[:, : len(text)]


@pytest.mark.parametrize("way", ["upload", "sightings"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_hijack(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, alone: dict[tuple[int, ...], tuple[Tensor, Tensor]], way: str, name: str
) -> None:
    prompt = [*words(7, 23), *POPULAR, *words(8, 30)]
    plant(llm, way, PLACEMENTS[name])
    for at in starts(llm, prompt):
        computed_alone(llm, prompt[at : 23 + len(POPULAR)], alone)
    rows = check_reuse(llm, monkeypatch, prompt, alone)
    if way == "sightings" and name == "behind a special token":  # two texts, each compiled alone: the popular one is its own
        assert rows > 200
    else:
        assert rows == FROM_THE_START.get(name, 0)
    llm.core.check()
    llm.core.feature(KVShare).store.check()


def starts(llm: LLM, prompt: list[int]) -> list[int]:
    """Where runs of others begin in a prompt."""
    found = llm.core.feature(KVShare).look(prompt, 0, "victim", "")["runs"]
    return [run["start"] for run in found if run["scope"] == "group"]  # type: ignore[index]


def test_an_honest_upload_is_found_beside_an_attackers(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, alone: dict[tuple[int, ...], tuple[Tensor, Tensor]]
) -> None:
    for text in PLACEMENTS.values():
        upload(llm, "mallory", text)
    for seed in range(12):  # crowds every place that a fingerprint or a first window leads to
        upload(llm, "mallet", [*POPULAR[: 20 + seed], *words(seed, 40)])
        upload(llm, "mallet", [*words(seed, 20), *POPULAR])
    upload(llm, "honest", POPULAR)
    prompt = [*words(7, 23), *POPULAR, *words(8, 30)]
    computed_alone(llm, POPULAR, alone)
    assert check_reuse(llm, monkeypatch, prompt, alone) == len(POPULAR)
    llm.core.purge("mallory")
    llm.core.purge("mallet")  # what the honest one left stays
    assert check_reuse(llm, monkeypatch, prompt, alone) == len(POPULAR)


def test_ones_own_donor_is_preferred_at_equal_length(llm: LLM) -> None:
    ask(llm, "victim", POPULAR + words(9, 16), share="tenant")
    upload(llm, "honest", POPULAR)
    told = llm.core.feature(KVShare).look([*words(7, 23), *POPULAR, *words(8, 30)], 0, "victim", "")
    assert [run["scope"] for run in told["runs"]] == ["tenant"]  # type: ignore[index,union-attr]


def test_a_chain_is_used_from_its_beginning_or_not_at_all(llm: LLM) -> None:
    upload(llm, "mallory", PLACEMENTS["in front"])
    share = llm.core.feature(KVShare)
    prompt = np.array(PLACEMENTS["in front"], np.int32)
    (run,) = share._search(prompt.astype(np.int64), 0, share.scopes.named("victim", ""), share.options.repair).runs
    assert run.start == 0 and run.stop > 300 and run.domain.shared
    assert run.within(1, run.stop) is None and run.within(0, 200) is not None
    Match((run,), (), ()).check(prompt)
    first, *rest = run.pieces
    for pieces in (rest, [first._replace(source=1, target=1, length=first.length - 1), *rest], [first, *rest[1:]]):
        with pytest.raises(AssertionError):
            Run(tuple(pieces)).check(prompt)
    alike = Piece(first.segment, 0, len(EVIL), 1)
    with pytest.raises(AssertionError):
        Run((alike, *rest)).check(prompt)


def test_what_deviates_for_one_tenant_stays_for_others(make_llm: MakeLLM, tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text(TENANTS)
    llm = make_llm(kvshare_options=OPTIONS.replace('"reject_above": 10', '"reject_above": 1e-6'), tenants=str(file))
    upload(llm, "honest", POPULAR)
    held = len(llm.core.feature(KVShare).store)
    for seed in range(5):
        kv = KVOptions(reuse="approx", share="none", reuse_options={"policy": "blend", "ratio": 0.1})
        prompt = (*words(seed + 30, 23), *POPULAR, *words(seed, 9))
        llm._run([Request(id=f"x{seed}", prompt=prompt, sampling=ONE, kv=kv, tenant="mallory")])
    assert llm.stats().share.rejected_runs >= 5 and len(llm.core.feature(KVShare).store) == held
