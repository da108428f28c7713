"""What reuse says it cost, and what it leaves to compute: never more rows in a step than its buffers hold."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from kvloom.engine import LLM, KVOptions, SamplingParams
from kvloom.engine.client import OTHERS
from kvloom.engine.reuse.kvshare.report import MOST_TENANTS, TenantTokens
from kvloom.engine.reuse.kvshare.share import KVShare

MakeLLM = Callable[..., LLM]
ONE = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


def text(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 300) for _ in range(length)]


@pytest.mark.parametrize("options", [{"max_stale": 0}, {"adaptive": True}, {"adaptive": True, "max_stale": 0.1}, {"ratio": 1}])
@pytest.mark.parametrize("reject", [0, 10])
def test_reuse_never_gives_rows_to_a_step(make_llm: MakeLLM, options: dict[str, Any], reject: float) -> None:
    """A donor T[:150], then other tokens + T[70:150] + T[:70]: what must be computed is more than reuse alone would leave."""
    share = (
        f'{{"verified": true, "min_match": 32, "min_reusable": 48, "min_gain": -1, "reject_above": {reject}, "heal": false}}'
    )
    llm = make_llm(kvshare_options=share, segment_memory="64MiB", max_batched_tokens=48, max_num_seqs=4)
    rows, works = [], []
    run, prepare = llm.core.runner.run, llm.core.feature(KVShare).begin

    def watch(plan: Any, fed: Any) -> Any:
        rows.append(plan.rows)
        return run(plan, fed)

    def ask(*args: Any) -> float:
        works.append(prepare(*args))
        return works[-1]

    llm.core.runner.run, llm.core.feature(KVShare).begin = watch, ask  # type: ignore[method-assign]
    shared = text(1, 150)
    kv = KVOptions(reuse="approx", reuse_options=options)
    llm.generate([shared], ONE, kv=kv)
    found = llm.generate([[*text(2, 20), *shared[70:], *shared[:70], *text(i, 20)] for i in range(3, 6)], ONE, kv=kv)
    assert all(len(one.tokens) == 2 for one in found) and llm.stats().internal_errors == 0
    assert max(rows) <= 48 and min(works) >= 0 and max(works) > 0
    computed = sum(one.usage.recomputed_tokens for one in found if one.usage)
    assert computed > 0 and (options != {"max_stale": 0} or all(one.usage and one.usage.reused_tokens == 0 for one in found))


def test_tenants_that_were_here_last_are_counted_apart() -> None:
    tenants = TenantTokens()
    for i in range(3 * MOST_TENANTS):
        tenants.add(f"t{i}", Counter(prefix=1, fresh=2))
        tenants.add("regular", Counter(prefix=1))
    assert len(tenants) <= MOST_TENANTS + 1
    assert tenants["regular"] == {"prefix": 3 * MOST_TENANTS} and tenants[f"t{3 * MOST_TENANTS - 1}"] == {
        "prefix": 1,
        "fresh": 2,
    }
    assert "t0" not in tenants and tenants[OTHERS]["fresh"] > 4 * MOST_TENANTS - 10
    total = sum((counts for counts in tenants.values()), Counter[str]())
    assert total == Counter(prefix=6 * MOST_TENANTS, fresh=6 * MOST_TENANTS)
