"""What scripts of clients that measure servers share: fixed requests, and what the server itself counted of them."""

from __future__ import annotations

import os
import re
import subprocess
import urllib.request
from collections.abc import Sequence
from contextlib import contextmanager
from typing import NamedTuple

from report import KEY, URL, require

SERVER, TOKENIZER = URL.removesuffix("/v1"), os.environ.get("KVLOOM_TOKENIZER", "")
REQUESTS, AT_ONCE, OUTPUT = 8, 4, 16
PROMPTS = [f"Name river number {i} of the world, and the sea where it ends. {'And another. ' * i}" for i in range(REQUESTS)]
SECONDS = 240
"""For one run of a client."""


class Counted(NamedTuple):
    """Requests that ended, and their tokens."""

    requests: int
    prompt: int
    generated: int


def counted() -> Counted:
    """As /metrics says: of all that the server has answered."""
    asked = urllib.request.Request(f"{SERVER}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(asked, timeout=30) as reply:
        told = reply.read().decode()
    names = ("request_prompt_tokens_count", "request_prompt_tokens_sum", "request_generation_tokens_sum")
    sums = [sum(map(float, re.findall(rf"^kvloom:{name}(?:{{.*}})? (\S+)$", told, re.MULTILINE))) for name in names]
    return Counted(*map(int, sums))


@contextmanager
def compared(requests: int = REQUESTS):
    """A list for what a client counted within; what the server counted meanwhile must be the same."""
    before, found = counted(), list[Counted]()
    yield found
    served = Counted(*(later - earlier for later, earlier in zip(counted(), before)))
    require(found == [served], f"the client counted {found}, the server {served}")
    require(served.requests == requests and served.generated == requests * OUTPUT, f"the server counted {served}")


def command(words: Sequence[str], **environment: str) -> str:
    """What a command prints. Raises AssertionError with the end of it if it fails."""
    settings = {**os.environ, "OPENAI_API_KEY": KEY, **environment}
    done = subprocess.run(words, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS)
    require(done.returncode == 0, f"exit code {done.returncode}: {done.stdout[-300:]}")
    return done.stdout
