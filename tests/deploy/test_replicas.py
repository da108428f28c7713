"""Two engines behind one server, with a Ray of their own: what clients see of it, above all when one is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("ray", reason="needs kvloom[ray]: make replicas-check")

from kvloom.engine import LLM, SamplingParams

MakeLLM = Callable[..., LLM]
TENANTS = """
tenants:
  alice: {api_keys: [alice-key]}
  bob: {api_keys: [bob-key]}
  carol: {api_keys: [carol-key], weight: 3}
  dave: {api_keys: [dave-key], weight: 1, cache_bytes: 480KiB}
"""
BLOCK = 12288
"""Bytes of a block of the tiny model in fp32."""
SETTINGS = (
    "--dtype",
    "fp32",
    "--kv-memory",
    "16MiB",
    "--max-num-seqs",
    "4",
    "--served-model-name",
    "tiny",
    "--admin-key",
    "admin-key",
    "--kvshare-options",
    '{"verified": true, "min_match": 32, "min_reusable": 32}',
)
ALICE, BOB = {"Authorization": "Bearer alice-key"}, {"Authorization": "Bearer bob-key"}
ADMIN = {"Authorization": "Bearer admin-key"}
TOKENS = 400
WAYS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 7, "top_p": 0.9, "repetition_penalty": 1.1},
    {"temperature": 0.9, "seed": 3, "stop": ["never seen in here"], "logprobs": 2},
    {"temperature": 0.8, "seed": 4, "kv": {"selection": "token_select", "budget": 64}},
    {"temperature": 0, "structured_outputs": {"regex": "[a-z ]{500,800}"}},
]


class Server:
    """A server with replicas, as a process."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = (folder / "log").open("w+")
        command = [sys.executable, "-m", "kvloom.server.cli", "serve", *arguments, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, text=True)
        limits = httpx.Limits(max_connections=200)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120, limits=limits)
        self.until(self.healthy, 90)

    def healthy(self) -> bool:
        assert self.process.poll() is None, self.text()
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def until(self, holds: Callable[[], object], seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, self.text()
            time.sleep(0.1)

    def text(self) -> str:
        self.log.seek(0)
        return self.log.read()[-8000:]

    def replicas(self) -> list[int]:
        """Process ids."""
        listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
        rows = [line.split(None, 2) for line in listed[1:]]
        mine = {str(self.process.pid)}
        for _ in range(3):
            mine |= {pid for pid, parent, _ in rows if parent in mine}
        return [int(pid) for pid, _, args in rows if pid in mine and args.startswith("ray::ServeReplica")]

    def both(self) -> bool:
        """Whether two replicas take requests."""
        return len(self.client.get("/v1/kv", headers=ADMIN).json()["replicas"]) == 2

    def kill_busy(self) -> None:
        """SIGKILL for the replica that computes."""
        os.kill(self.busy(), signal.SIGKILL)

    def busy(self) -> int:
        """The replica that computes."""

        def used(pid: int) -> int:
            return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))

        before = {pid: used(pid) for pid in self.replicas()}
        time.sleep(0.04)
        return max(before, key=lambda pid: used(pid) - before[pid])

    def stream(self, body: dict[str, Any], at: int = 0, act: Callable[[], None] | None = None,
               who: dict[str, str] | None = None) -> dict[str, Any]:  # fmt: skip
        """The whole of a streamed completion; at so many tokens `act` is called."""
        whole: dict[str, Any] = {"tokens": [], "text": "", "logprobs": [], "finish": None}
        asked = {"prompt": "hello world", "max_tokens": TOKENS, "ignore_eos": True, "stream": True, "return_token_ids": True,
                 "stream_options": {"include_usage": True}, "kv": {}, **body}  # fmt: skip
        with self.client.stream("POST", "/v1/completions", json=asked, headers=who or ALICE) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                assert "error" not in event, event
                for choice in event["choices"]:
                    whole["tokens"] += choice.get("token_ids") or []
                    whole["text"] += choice["text"]
                    whole["logprobs"] += (choice.get("logprobs") or {}).get("token_logprobs", [])
                    whole["finish"] = choice["finish_reason"] or whole["finish"]
                whole["usage"] = event.get("usage") or whole.get("usage")
                if act is not None and len(whole["tokens"]) >= at:
                    act()
                    act = None
        return whole

    def figures(self) -> dict[str, float]:
        """/metrics, without labels: added up."""
        found: dict[str, float] = {}
        for line in self.client.get("/metrics", headers=ADMIN).text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name.partition("{")[0]] = found.get(name.partition("{")[0], 0) + float(value)
        return found

    def end(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=30) == 0, self.text()
        assert not self.replicas()
        return self.text()


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("replicas")
    (folder / "tenants.yaml").write_text(TENANTS)
    made = Server(folder, str(tiny), "--replicas", "2", "--tenants", str(folder / "tenants.yaml"), *SETTINGS)
    yield made
    made.end()


def test_answers_are_those_of_one_engine(server: Server, make_llm: MakeLLM) -> None:
    llm = make_llm(dtype="fp32")
    prompts = [llm.tokenizer.encode(text) for text in ("hello world", "the quick brown fox", "the lazy dog")]
    params = SamplingParams(max_tokens=20, temperature=0.8, seed=5, ignore_eos=True)
    expected = [list(result.tokens) for result in llm.generate(prompts, params)]
    body = {"prompt": prompts, "max_tokens": 20, "temperature": 0.8, "seed": 5, "ignore_eos": True, "return_token_ids": True}
    answer = server.client.post("/v1/completions", json=body, headers=ALICE)
    assert answer.status_code == 200, answer.text
    assert [choice["token_ids"] for choice in answer.json()["choices"]] == expected


@pytest.mark.parametrize("way", WAYS, ids=lambda way: ",".join(way))
def test_a_stream_outlives_its_replica(server: Server, way: dict[str, Any]) -> None:
    undisturbed = server.stream(way)
    for _ in range(3):  # the answer may be over before the kill
        server.until(server.both)
        found = server.stream(way, at=20, act=server.kill_busy)
        if "resumed" in found["usage"]["kv"]:
            break
    assert found["usage"]["kv"].pop("resumed") == "exact"
    for name in ("tokens", "text", "finish"):
        assert found[name] == undisturbed[name], name
    assert found["logprobs"] == pytest.approx(undisturbed["logprobs"], abs=1e-4)
    assert found["usage"]["completion_tokens"] == len(undisturbed["tokens"]) > 300


def test_a_stream_with_approximate_reuse_ends_and_says_so(server: Server) -> None:
    passage = [5 + 7 * i % 300 for i in range(150)]
    for begin in ([11, 12, 13], [21, 22, 23]):
        body = {"kv": {"reuse": "approx", "kvshare": {"ratio": 0.2}}, "prompt": [*begin, *passage, 9, 8], "temperature": 0}
        server.until(server.both)
        found = server.stream({**body, "max_tokens": 300}, at=20, act=server.kill_busy if begin[0] == 21 else None)
    assert len(found["tokens"]) == 300 and found["usage"]["kv"]["resumed"] == "approximate"


def test_a_hung_replica_is_given_up(server: Server) -> None:
    server.until(server.both)
    undisturbed = server.stream({"temperature": 0})
    stopped: list[int] = []

    def stop() -> None:
        stopped.append(server.busy())
        os.kill(stopped[0], signal.SIGSTOP)

    try:
        found = server.stream({"temperature": 0}, at=20, act=stop)
        assert found["tokens"] == undisturbed["tokens"] and found["usage"]["kv"]["resumed"] == "exact"
        assert server.stream({"temperature": 0})["tokens"] == undisturbed["tokens"], "and nothing goes there"
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def test_what_is_counted_is_what_clients_got(server: Server) -> None:
    server.until(server.both)
    before = server.figures()
    bodies = [{"prompt": [7 + i] * 40, "temperature": 0, "max_tokens": 300} for i in range(4)]
    got = [server.stream(body, 20, server.kill_busy if i == 2 else None) for i, body in enumerate(bodies)]
    after = server.figures()
    names = ("prompt_tokens_total", "generation_tokens_total", "request_success_total", "request_prompt_tokens_sum")
    counted = {name: after[f"kvloom:{name}"] - before[f"kvloom:{name}"] for name in names}
    tokens = sum(len(one["tokens"]) for one in got)
    assert counted == {"prompt_tokens_total": 160, "generation_tokens_total": tokens, "request_success_total": 4,
                       "request_prompt_tokens_sum": 160}  # fmt: skip
    for name, value in before.items():  # nothing that is counted falls when an engine dies
        assert not name.endswith("_total") or after[name] >= value, name
    server.until(lambda: server.figures()["kvloom:replicas_lost_total"] == before["kvloom:replicas_lost_total"] + 1)
    server.until(server.both)
    after = server.figures()
    assert after["kvloom:replicas_up"] == after["kvloom:replicas_wanted"] == 2
    resumed, routed = (
        after[f"kvloom:{name}_total"] - before[f"kvloom:{name}_total"] for name in ("requests_resumed", "routed")
    )
    assert routed == 4 + resumed and resumed in (0, 1)  # the answer may have been over before the kill
    held = server.client.get("/v1/kv", headers=ADMIN).json()
    assert all(group["in_use"] == 0 and group["free"] + group["cached"] == group["total"] for group in held["blocks"].values())


def test_an_upload_is_on_every_replica_also_on_one_that_comes_later(server: Server) -> None:
    server.until(server.both)
    passage = [3 + 11 * i % 300 for i in range(200)]
    stored = server.client.post("/v1/kv/segments", json={"tokens": passage, "scope": "tenant"}, headers=BOB).json()
    assert stored["tokens"] > 150

    def held() -> int:
        return int(server.client.get("/v1/kv", headers=BOB).json()["tenants"]["bob"]["segment_bytes"])

    on_both, body = held(), {"prompt": [7, 8, *passage, 9, 6], "max_tokens": 300, "temperature": 0, "kv": {"reuse": "approx"}}
    first = server.stream({**body, "max_tokens": 1}, who=BOB)["usage"]["kv"]
    assert first["reused_tokens"] + first["recomputed_tokens"] > 100
    found = server.stream(body, at=20, act=server.kill_busy, who=BOB)["usage"]["kv"]
    assert "resumed" in found and found["reused_tokens"] + found["recomputed_tokens"] > 100, "the other has it, too"
    server.client.delete("/v1/kv/segments", headers=BOB)  # what the request itself left, too
    server.until(server.both)
    server.client.post("/v1/kv/segments", json={"tokens": passage, "scope": "tenant"}, headers=BOB)
    os.kill(server.replicas()[0], signal.SIGKILL)
    server.until(lambda: not server.both())
    server.until(server.both)
    server.until(lambda: held() == on_both)
    assert server.client.delete("/v1/kv/segments", headers=BOB).json()["deleted"] == 2 * stored["segments"]
    assert held() == 0


def test_a_quota_holds_over_both(server: Server) -> None:
    server.until(server.both)
    dave = {"Authorization": "Bearer dave-key"}
    for i in range(24):
        body = {"prompt": [5 + (i * 13 + 7 * j) % 300 for j in range(160)], "max_tokens": 2, "temperature": 0}
        assert server.client.post("/v1/completions", json=body, headers=dave).status_code == 200
    held = server.client.get("/v1/kv", headers=dave).json()["tenants"]["dave"]
    assert 20 < held["cached_blocks"] <= 480 * 1024 // BLOCK, "more than one replica's part, and no more than the whole"


def test_weights_hold_over_both(server: Server) -> None:
    server.until(server.both)
    ended: list[str] = []

    def ask(name: str, number: int) -> None:
        body = {"prompt": [5 + (len(name) + number * 17 + 3 * j) % 300 for j in range(64)], "max_tokens": 32,
                "ignore_eos": True, "temperature": 0}  # fmt: skip
        answer = server.client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {name}-key"})
        assert answer.status_code == 200, answer.text
        ended.append(name)

    with ThreadPoolExecutor(128) as pool:
        slots = {"prompt": "hello", "max_tokens": 480, "ignore_eos": True, "n": 4}  # somebody has all slots until all wait
        blockers = [pool.submit(server.client.post, "/v1/completions", json=slots, headers=ALICE) for _ in range(32)]
        list(pool.map(lambda i: ask(("carol", "dave")[i % 2], i), range(96)))
        assert all(blocker.result().status_code == 200 for blocker in blockers)
    behind = [i for i, name in enumerate(ended) if name == "carol"][35]  # both wait: 36 without weights, one engine 19
    assert 8 <= ended[:behind].count("dave") <= 28, " ".join(name[0] for name in ended)


def test_errors_are_those_of_one_engine(server: Server) -> None:
    asked: list[tuple[dict[str, Any], int, str]] = [
        ({"prompt": [5] * 600}, 400, "prompt"), ({"prompt": "hello", "temperature": -1}, 400, "temperature"),
        ({"prompt": "hello", "kv": {"selection": "token_select", "budget": 1}}, 400, "kv.budget"),
        ({"prompt": "hello", "structured_outputs": {"regex": "("}}, 400, "structured_outputs.regex"),
    ]  # fmt: skip
    for body, status, param in asked:
        answer = server.client.post("/v1/completions", json={"max_tokens": 4, **body}, headers=ALICE)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_who_leaves_ends_the_request_there(server: Server) -> None:
    body = {"prompt": "hello", "max_tokens": 450, "ignore_eos": True, "stream": True, "n": 4}
    with server.client.stream("POST", "/v1/completions", json=body, headers=ALICE) as response:
        next(response.iter_lines())
    server.until(lambda: server.client.get("/v1/kv", headers=ADMIN).json()["requests"]["running"] == 0)


def test_a_reset_reaches_both(server: Server) -> None:
    server.until(server.both)
    for i in range(6):
        server.stream({"prompt": [5 + (11 * i + 3 * j) % 300 for j in range(100)], "max_tokens": 2})
    blocks = [group["cached"] for group in server.client.get("/v1/kv", headers=ADMIN).json()["blocks"].values()]
    told = server.client.post("/v1/kv/reset", headers=ADMIN).json()
    assert told["blocks"] >= sum(blocks) > 30
    server.until(
        lambda: not any(group["cached"] for group in server.client.get("/v1/kv", headers=ADMIN).json()["blocks"].values())
    )


def test_explain_names_the_replica_where_the_prompt_would_go(server: Server) -> None:
    prompt = [5 + 3 * i % 300 for i in range(256)]
    server.stream({"prompt": prompt, "max_tokens": 2})
    told = [server.client.post("/v1/kv/explain", json={"prompt": prompt}, headers=ALICE).json() for _ in range(4)]
    assert len({one["replica"] for one in told}) == 1 and told[0]["cached_tokens"] == 240
