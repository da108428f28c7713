"""The whole house: `kvloom serve` as a process, real clients over a socket, and what happens when they misbehave."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

from kvloom.engine import LLM, SamplingParams

MakeLLM = Callable[..., LLM]
SETTINGS = (
    "--dtype",
    "fp32",
    "--kv-memory",
    "1MiB",
    "--max-model-len",
    "200",
    "--max-num-seqs",
    "16",
    "--max-batched-tokens",
    "64",
)


def serve(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """A server process and its URL, healthy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "kvloom.server.cli", "serve", *arguments, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            if httpx.get(url + "/health", timeout=5).status_code == 200:
                return process, url
        except httpx.TransportError:
            time.sleep(0.1)
        assert process.poll() is None, process.communicate()[0]
    process.kill()
    raise AssertionError(f"not healthy: {process.communicate()[0]}")


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[str]:
    process, url = serve(str(tiny), "--served-model-name", "tiny", *SETTINGS)
    yield url
    assert httpx.get(url + "/health", timeout=5).status_code == 200, "a test broke the server"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    assert process.stdout is not None
    assert "Traceback" not in process.stdout.read()


def in_use(url: str) -> int:
    return sum(group["in_use"] for group in httpx.get(url + "/v1/kv", timeout=5).json()["blocks"].values())


def test_a_storm_of_streams_and_disconnects(server: str, make_llm: MakeLLM) -> None:
    source = random.Random(1)
    system = [source.randrange(3, 300) for _ in range(40)]
    prompts = [
        system[: source.randint(0, 40)] + [source.randrange(3, 300) for _ in range(source.randint(1, 60))] for _ in range(64)
    ]
    leave = [source.choice([None, None, 0, 1, 7]) for _ in prompts]
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    llm = make_llm(kv_memory="2MiB")
    alone = [llm.generate(prompt, sampling)[0].text for prompt in prompts]

    async def one(client: AsyncOpenAI, prompt: list[int], limit: int | None) -> str | None:
        stream = await client.completions.create(model="tiny", prompt=prompt, max_tokens=40, temperature=0, stream=True,
                                                 extra_body={"ignore_eos": True})  # fmt: skip
        text, seen = "", 0
        async for chunk in stream:
            text += chunk.choices[0].text
            seen += 1
            if limit is not None and seen > limit:
                await stream.close()
                return None
        return text

    async def storm() -> list[str | None]:
        async with AsyncOpenAI(base_url=server + "/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, prompt, limit) for prompt, limit in zip(prompts, leave)))

    for text, limit, expected in zip(asyncio.run(storm()), leave, alone):
        assert text == (None if limit is not None else expected)
    for _ in range(200):
        if in_use(server) == 0:
            break
        time.sleep(0.02)
    assert in_use(server) == 0
    time.sleep(1.3)  # idle: the engine proves that no block is lost, and dies if one is
    assert httpx.get(server + "/health", timeout=5).status_code == 200
    metrics = httpx.get(server + "/metrics", timeout=5).text
    assert 'finished_reason="abort"' in metrics


def test_chat_completions_and_usage(server: str) -> None:
    client = OpenAI(base_url=server + "/v1", api_key="none", max_retries=0)
    talk: Any = [{"role": "user", "content": "a question that is long enough to fill more than one block of the cache, surely"}]
    for attempt in range(2):
        reply = client.chat.completions.create(model="tiny", messages=talk, max_tokens=5, extra_body={"ignore_eos": True})
        assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
        assert reply.usage.completion_tokens == 5
        assert (reply.usage.prompt_tokens_details.cached_tokens or 0) >= 16 * attempt


def test_bad_input_is_refused_and_the_server_stays_up(server: str) -> None:
    client = OpenAI(base_url=server + "/v1", api_key="none", max_retries=0)
    with pytest.raises(NotFoundError, match="no-such-model"):
        client.completions.create(model="no-such-model", prompt="x")
    with pytest.raises(BadRequestError, match="200"):
        client.completions.create(model="tiny", prompt=[5] * 300, max_tokens=1)
    with pytest.raises(BadRequestError, match="allowed: 0 to"):
        client.completions.create(model="tiny", prompt=[10**6], max_tokens=1)
    with pytest.raises(BadRequestError, match="psychic"):
        client.completions.create(model="tiny", prompt=[5], max_tokens=1, extra_body={"kv": {"selection": "psychic"}})
    with pytest.raises(BadRequestError, match="--scheduler priority"):
        client.completions.create(model="tiny", prompt=[5], max_tokens=1, extra_body={"priority": 3})
    huge = httpx.post(server + "/v1/completions", content=b"x" * 10_000_000, timeout=20)
    assert huge.status_code == 413 and huge.json()["error"]["message"]
    broken = httpx.post(
        server + "/v1/completions", content=b'{"model": ', headers={"Content-Type": "application/json"}, timeout=20
    )
    assert broken.status_code == 400 and broken.json()["error"]["message"]


@pytest.mark.parametrize(
    ("damage", "word"),
    [("truncate", "truncated|incomplete|damaged|size"), ("architecture", "BertModel"), ("empty", "neither safetensors nor")],
)
def test_broken_models_end_in_one_clear_line(tiny: Path, tmp_path: Path, damage: str, word: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if damage != "empty":
        for file in tiny.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    if damage == "truncate":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    if damage == "architecture":
        config = folder / "config.json"
        config.write_text(config.read_text().replace("LlamaForCausalLM", "BertModel"))
    command = [sys.executable, "-m", "kvloom.server.cli", "serve", str(folder), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert re.search(word, done.stderr), done.stderr


def test_metrics_carry_the_names_of_the_field(server: str) -> None:
    httpx.post(
        server + "/v1/completions", json={"model": "tiny", "prompt": [5, 6], "max_tokens": 3, "ignore_eos": True}, timeout=20
    )
    text = httpx.get(server + "/metrics", timeout=5).text
    for name in (
        "time_to_first_token_seconds_count",
        "request_queue_time_seconds_sum",
        "prompt_tokens_total",
        "num_requests_running",
    ):
        line = next(line for line in text.splitlines() if line.startswith(f"kvloom:{name}{{"))
        assert float(line.split()[-1]) >= (0 if name in ("num_requests_running", "request_queue_time_seconds_sum") else 1)


def test_selection_per_request(server: str) -> None:
    client = OpenAI(base_url=server + "/v1", api_key="none", max_retries=0)
    prompt = [(7 * i) % 290 + 3 for i in range(100)]
    common: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0}
    dense = client.completions.create(**common, extra_body={"ignore_eos": True, "kv": {}})
    window = {"selection": "sink_window", "budget": 32, "sink_window": {"sinks": 8}}
    sparse = client.completions.create(**common, extra_body={"ignore_eos": True, "kv": window})
    drafted = client.completions.create(**common, extra_body={"ignore_eos": True, "kv": {**window, "draft": True}})
    usages = [reply.usage.model_dump()["kv"] for reply in (dense, sparse, drafted) if reply.usage is not None]
    assert usages[0]["attended_tokens"] == usages[0]["held_tokens"] == usages[1]["held_tokens"] == sum(range(101, 112))
    assert usages[1]["attended_tokens"] == 11 * 32
    assert 0 < usages[2]["drafted_tokens"] >= usages[2]["accepted_tokens"]
    assert drafted.choices[0].text == dense.choices[0].text
    metrics = httpx.get(server + "/metrics", timeout=5).text
    assert re.search(r'kvloom:selection_attended_total\{.*method="sink_window".*\} [1-9]', metrics)
    assert re.search(r"kvloom:spec_decode_num_draft_tokens_total\{.*\} [1-9]", metrics)
    assert httpx.get(server + "/v1/kv", timeout=5).json()["selection"]["sink_window"]["attended_share"] < 0.5
    for kv, message in (
        ({"selection": "nearest"}, "allowed: dense, sink_window"),
        ({"selection": "sink_window", "budget": 0}, "kv.budget is 0; allowed: 1 to 200"),
        ({"selection": "sink_window", "budget": 201}, "kv.budget is 201"),
        ({"budget": 64}, "the selection is dense"),
        ({"sink_window": {"sinks": -1}}, "kv.sink_window.sinks is -1"),
        ({"sink_window": {"window": 4}}, "kv.sink_window.window is not an option"),
    ):
        with pytest.raises(BadRequestError, match=message):
            client.completions.create(**common, extra_body={"kv": kv})


def test_bad_selection_defaults_end_at_start_up(tiny: Path) -> None:
    for arguments, message in (
        (["--selection", "nearest"], "selection is 'nearest'; allowed: dense, sink_window"),
        (["--selection", "sink_window", "--budget", "0"], "budget is 0"),
        (["--selection", "sink_window", "--selection-options", "{"], "is not JSON"),
        (["--draft"], "the selection is dense"),
    ):
        command = [sys.executable, "-m", "kvloom.server.cli", "serve", str(tiny), *SETTINGS, *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 2, ended.stderr
        assert message in ended.stderr and "Traceback" not in ended.stderr
