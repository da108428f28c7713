"""Random bodies over every route of a server with a real engine: each answer has a status that clients know, an error has its
one shape, nothing of Python shows in it, and the engine stays alive."""

import json
import random

import pytest

from kvloom.engine.config import EngineConfig
from kvloom.engine.thread.client import ThreadEngineClient

REQUESTS = 300
KNOWN = {200, 204, 400, 404, 405, 413, 415, 429}
PYTHON = ("Traceback", "Error(", "<class", "float('nan')", "tensor(", "object at 0x", "NoneType", "numpy", "site-packages")
POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/kv/segments", "/v1/kv/explain",
         "/v1/kv/reset")  # fmt: skip
OTHERS = (
    "/health",
    "/ping",
    "/ready/",
    "/load",
    "/v1/kv/reset",
    "/version",
    "/v1/models",
    "/v1/models/x",
    "/metrics",
    "/v1/kv",
    "/v1/kv/explain?prompt=%ff",
    "/nothing",
)
MESSAGES = [{"role": "user", "content": "hi"}]
HALF = "\ud800"
NUMBERS = (0, 1, -1, 2, 16, 1e-40, 1e-310, -1e-40, 1e308, 5e-324, 0.5, 1.5, 100, 101, 2**31 - 1, 2**31, 2**63, -(2**63), 10**30,
           float("nan"), float("inf"), float("-inf"))  # fmt: skip
ANY = (*NUMBERS, None, True, False, "", "a", HALF, "\x00", "🦊", [], {}, [1], ["a"], [[1]], {"a": 1}, {HALF: HALF}, [None])
FIELDS = (
    "n", "max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids",
    "include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "forced_tokens", "prompt_logprobs", "stream",
    "stream_options", "kv", "cache_salt", "priority", "user", "logprobs", "top_logprobs", "echo", "best_of", "messages",
    "prompt", "tokens", "text", "texts", "scope", "model", "add_generation_prompt", "continue_final_message",
    "chat_template_kwargs", "add_special_tokens", "return_token_strs", "tools", "response_format", "guided_json",
    "extra_body", "unheard_of", "allowed_token_ids", "bad_words", "logprob_token_ids", "truncate_prompt_tokens",
    "truncation_side", "return_token_ids", "return_tokens_as_token_ids",
)  # fmt: skip


class Maker:
    """Bodies that are mostly nearly right, so that they get far before they go wrong."""

    def __init__(self, seed: int) -> None:
        self.source = random.Random(seed)

    def kv(self) -> object:
        pick = self.source.choice
        method = pick(["dense", "sink_window", "token_select", "tidal_decode", "recycled", "razor_view", "x", HALF])
        options = {pick(["sinks", "window", "budget", "stride", "prefill_budget", HALF]): pick(ANY)}
        reuse = {"reuse": pick(["off", "exact", "approx", HALF]), "share": pick(["none", "tenant", "x"]),
                 "kvshare": {pick(["policy", "ratio", "max_stale", HALF]): pick(ANY)}}  # fmt: skip
        return pick([{"selection": method, "budget": pick(NUMBERS)}, {method: options}, reuse, {"draft": True, method: {}}])

    def value(self, name: str) -> object:
        pick = self.source.choice
        near = {
            "kv": self.kv, "logit_bias": lambda: {pick(["5", "x", "319", "99999", HALF]): pick(NUMBERS)},
            "chat_template_kwargs": lambda: {pick(["x", "self", "messages", "dict", HALF]): pick([1, HALF, "a", 1e308])},
            "stop": lambda: [pick(["a", "\ufffd", HALF, "", "x" * 300])], "stop_token_ids": lambda: [pick([0, 5, 319, 320])],
            "allowed_token_ids": lambda: [pick([0, 2, 5, 319, 320, -1])], "bad_words": lambda: [pick(["a", "", "hi", HALF])],
            "logprob_token_ids": lambda: [pick([0, 319, 320])], "truncate_prompt_tokens": lambda: pick([-1, 0, 1, 9, 999]),
            "return_token_ids": lambda: True, "truncation_side": lambda: pick(["left", "right", "middle"]),
            "forced_tokens": lambda: [pick([0, 5, 319, 320, -1])], "stream": lambda: True, "echo": lambda: True,
            "stream_options": lambda: {pick(["include_usage", "x", HALF]): True},
            "prompt": lambda: pick(["🦊", [5, 6], [[5], [6]]]),
        }  # fmt: skip
        return near[name]() if name in near and self.source.random() < 0.7 else pick(ANY)

    def body(self) -> dict:
        base = self.source.choice([{"prompt": "hi 🦊"}, {"messages": MESSAGES}, {"tokens": [5, 6]}, {"text": "a" * 40}])
        names = self.source.sample(FIELDS, self.source.randint(0, 3))
        return {"max_tokens": 2, **base, **{name: self.value(name) for name in names}}

    def request(self) -> tuple[str, str, bytes]:
        if self.source.random() < 0.1:
            return self.source.choice(["GET", "HEAD", "OPTIONS", "DELETE", "PUT", "POST"]), self.source.choice(OTHERS), b""
        content = json.dumps(self.body()).encode()
        if self.source.random() < 0.05:
            content = content[: self.source.randrange(len(content))] + self.source.choice([b"", b"\xff", b"]", b"\\ud8"])
        body = json.loads(content) if _is_json(content) else {}
        fits = {"prompt": POSTS[0], "messages": POSTS[1], "tokens": POSTS[3], "text": POSTS[4]}
        path = next((fits[name] for name in body if name in fits), POSTS[0]) if self.source.random() < 0.8 else None
        return "POST", path or self.source.choice(POSTS), content


def _is_json(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except ValueError:
        return False


@pytest.fixture
def real(tiny, serving):
    config = EngineConfig.from_flat(
        {"model": str(tiny), "served_model_name": "echo-model", "dtype": "fp32", "kv_memory": "8MiB", "max_model_len": 128,
         "kvshare_options": '{"verified": true}'}
    )  # fmt: skip
    engine = ThreadEngineClient.start(config)
    try:
        yield serving(engine)
    finally:
        engine.close()


def check(reply, sent) -> None:
    """An answer that clients can read."""
    assert reply.status_code in KNOWN, (reply.status_code, reply.text, sent)
    errors = [reply.json()] if reply.status_code >= 400 and reply.request.method != "HEAD" else []
    if reply.headers.get("content-type", "").startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        errors = [event for event in map(json.loads, events[:-1]) if "error" in event]
    for error in errors:
        assert set(error["error"]) == {"message", "type", "param", "code"}, (error, sent)
        assert not any(word in json.dumps(error) for word in PYTHON), (error, sent)
        assert error["error"]["code"] not in ("internal_error", "engine_dead", "generation_failed"), (error, sent)


def test_random_requests(real):
    maker = Maker(20)
    with real.client() as client:
        for _ in range(REQUESTS):
            method, path, content = maker.request()
            reply = client.request(method, path, content=content, headers={"Content-Type": "application/json"})
            check(reply, (method, path, content))
        assert client.get("/health").status_code == 200
        good = client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 1})
        assert good.status_code == 200 and good.json()["usage"]["completion_tokens"] == 1
