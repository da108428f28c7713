"""tenants: several tenants, one of which sends many times as much as each other one. Is the service of the others held?"""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvloom.loadtest.client.record import Job
from kvloom.loadtest.workloads.base import LONGEST, Workload, require
from kvloom.loadtest.workloads.corpus import TextSource


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantsOptions:
    """Of all requests, the noisy tenant sends NOISE / (TENANTS - 1 + NOISE), each quiet one 1 / (TENANTS - 1 + NOISE)."""

    tenants: int = 4
    """Tenants, named noisy, quiet1, quiet2, ..."""
    noise: float = 8.0
    """Requests of the noisy tenant per request of a quiet one."""
    input_len: int = 1024
    """Tokens of a prompt."""
    prefix_len: int = 128
    """How many of them are the tenant's own system prompt, the same in each of its prompts."""
    output_len: int = 64
    """Tokens of an answer."""

    def __post_init__(self) -> None:
        require(self, 2, 1000, "tenants")
        require(self, 1, 1000, "noise")
        require(self, 2, LONGEST, "input_len")
        require(self, 0, self.input_len - 1, "prefix_len")
        require(self, 1, LONGEST, "output_len")


def build(options: TenantsOptions, text: TextSource, seed: int, count: int) -> list[Job]:
    names = ["noisy", *(f"quiet{i}" for i in range(1, options.tenants))]
    weights = [options.noise, *([1.0] * (options.tenants - 1))]
    reader = text.reader(f"tenants {seed}")
    prefixes = {name: reader.tokens(options.prefix_len) for name in names}
    rng = random.Random(f"tenants {seed}")
    jobs = []
    for _ in range(count):
        tenant = rng.choices(names, weights)[0]
        prompt = prefixes[tenant] + reader.tokens(options.input_len - options.prefix_len)
        label = "noisy" if tenant == "noisy" else "quiet"
        jobs.append(Job(prompt=prompt, output_tokens=options.output_len, tenant=tenant, label=label))
    return jobs


TENANTS = Workload(
    name="tenants",
    help="several tenants with long prompts, one of them far louder than the others",
    options=TenantsOptions,
    make=build,
)
