"""Random responses through a whole server with a real engine and a small store: no 500, no hang, no leak, nothing of others'.

    python -m kvloom.loadtest.fuzz.responses [--minutes M | --requests N] [--seed S]

Bodies are mostly of a right form, and what the model says is forced on it: calls, thoughts and crumbs of them. Conversations go
on by ids of their own, of others, deleted and made-up; streams are cut at any event. What must hold: every answer is 200, 400
or 404 in its one shape (429 where too much waits); a stream's numbers have no gap, and it ends as it should; what is stored is
what was answered; a key sees its own responses alone; afterwards the store's counts fit, and the engine holds nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvloom.engine.config import EngineConfig
from kvloom.engine.thread.client import ThreadEngineClient
from kvloom.loadtest.fuzz.asgi import Reply, ask
from kvloom.loadtest.fuzz.chats import WORDS, answer, value
from kvloom.loadtest.fuzz.engines import write_model
from kvloom.server.app import create_app
from kvloom.server.options import ServerOptions

KEYS = ("first", "second")
AT_ONCE = 8
OPTIONS = ServerOptions(api_key=KEYS, response_store_size=64 * 1024, response_store_count=12)
ROUND = 400
"""Requests to one engine."""
LONGEST = 1024
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}{{ m.role }}:"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments }}</tool_call>{% endfor %}\n{% endfor %}"
)
ODD: tuple[Any, ...] = (
    float("nan"), "\ud800", {"a": float("inf")}, {"\ud800": ["\ud800"]},
    [{"type": "function", "name": "look", "parameters": {"type": "object", "x": "\ud800"}}],
    {"type": "function", "name": "look", "x": float("nan")},
    {"format": {"type": "json_schema", "schema": {"default": float("nan")}}},
)  # fmt: skip
"""What JSON cannot hold, and Python's reads."""
PYTHON = ("Traceback", "Error(", "<class", "object at 0x", "NoneType", "site-packages", "pydantic")
OUTER = ("input", "tools", "tool_choice", "text", "reasoning", "include", "metadata", "stream_options", "kv", "truncation",
         "top_logprobs", "max_output_tokens", "previous_response_id", "instructions", "store", "stream", "background", "n",
         "chat_template_kwargs", "prompt_cache_options", "temperature", "top_k", "stop", "unheard_of")  # fmt: skip


class Fuzzer:
    """One server, and what is known of its responses."""

    def __init__(self, app: Any, client: ThreadEngineClient, draw: random.Random) -> None:
        self.app, self.client, self.draw = app, client, draw
        self.ends: Counter[str] = Counter()
        self.made: dict[str, tuple[str, dict[str, Any]]] = {}
        """Response id -> its key, and it."""
        self.items: dict[str, list[str]] = {key: ["msg_none"] for key in KEYS}
        """Of each key, ids of the last ones."""

    async def run(self, requests: int) -> None:
        """So many requests, several at once. Raises AssertionError."""
        left = requests

        async def worker() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await self.step()

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(worker())
        self.app.state.context.responses.check()

    async def step(self) -> None:
        """One request, and what must hold of its answer."""
        key, roll = self.draw.choice(KEYS), self.draw.random()
        if roll < 0.7:
            await self._create(key)
        elif roll < 0.75:
            reply = await self._ask(key, "POST", "/input_tokens", self._body(key))
            assert reply.status != 200 or reply.json()["input_tokens"] > 0
        else:
            await self._look(key, roll)

    async def _ask(self, key: str, method: str, path: str, body: Any = None, leave_after: int | None = None) -> Reply:
        reply = await ask(self.app, method, "/v1/responses" + path, body, headers={"authorization": f"Bearer {key}"},
                          leave_after=leave_after)  # fmt: skip
        self.ends["cut" if reply.cut else str(reply.status)] += 1
        if reply.cut:
            return reply
        assert reply.status in (200, 400, 404, 429), (reply.status, reply.body[:300], body)
        if reply.status != 200:
            error = reply.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"], error
            assert not any(word in error["message"] for word in PYTHON), (error, body)
        return reply

    async def _create(self, key: str) -> None:
        body, cut = self._body(key), None
        if self.draw.random() < 0.3:
            cut, body["stream"] = self.draw.randrange(24), True
        reply = await self._ask(key, "POST", "", body, cut)
        if reply.cut or reply.status != 200:
            return
        if "text/event-stream" in reply.headers["content-type"]:
            response = finished(reply.body.decode())
            if response is None:
                return
        else:
            response = reply.json()
        assert response["status"] in ("completed", "incomplete") and response["usage"]["output_tokens"] >= 0
        self.ends.update(item["type"] for item in response["output"])
        self.items[key] += [item["id"] for item in response["output"]]
        del self.items[key][:-32]
        if response["store"]:
            self.made[response["id"]] = (key, response)
            while len(self.made) > 64:
                del self.made[next(iter(self.made))]

    async def _look(self, key: str, roll: float) -> None:
        """Retrieve, list, delete or cancel something."""
        name = self._response_id(key)
        owner, known = self.made.get(name, ("", None))
        if roll < 0.85:
            reply = await self._ask(key, "GET", f"/{name}")
            assert reply.status != 200 or (owner == key and reply.json() == known), (name, owner, key)
        elif roll < 0.92:
            limit, order = self.draw.randrange(0, 104), self.draw.choice(("asc", "desc", "desc", "up"))
            after = f"&after={self.draw.choice(self.items[key])}" if self.draw.random() < 0.3 else ""
            reply = await self._ask(key, "GET", f"/{name}/input_items?limit={limit}&order={order}{after}")
            assert reply.status != 200 or (owner == key and len(reply.json()["data"]) <= limit)
        elif roll < 0.97:
            reply = await self._ask(key, "DELETE", f"/{name}")
            assert reply.status != 200 or owner == key
            if reply.status == 200:
                self.made.pop(name, None)
                assert (await self._ask(key, "GET", f"/{name}")).status == 404
        else:
            assert (await self._ask(key, "POST", f"/{name}/cancel")).status in (400, 404)

    def _response_id(self, key: str) -> str:
        """Mostly one of this key's."""
        own = [name for name, (owner, _) in self.made.items() if owner == key]
        if own and self.draw.random() < 0.8:
            return self.draw.choice(own[-12:])
        return self.draw.choice([*self.made, "resp_none", secrets.token_hex(4)])

    def _item(self, key: str) -> Any:
        draw, text = self.draw, self.draw.choice(WORDS)
        content = draw.choice((text, [{"type": draw.choice(("input_text", "output_text")), "text": text}]))
        made: dict[str, Any] = draw.choice((
            {"role": draw.choice(("user", "system", "developer", "assistant")), "content": content},
            {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": draw.choice(("{}", text))},
            {"type": "function_call_output", "call_id": "call_1", "output": content},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]},
            {"type": "item_reference", "id": draw.choice(self.items[key if draw.random() < 0.9 else draw.choice(KEYS)][-8:])},
            {"type": "message", "role": "user", "id": "msg_twice", "content": text},
        ))  # fmt: skip
        if draw.random() < 0.03:
            made[draw.choice(("type", "role", "content", "id", "call_id"))] = value(draw)
        return made

    def _body(self, key: str) -> dict[str, Any]:
        """A request, mostly of a right form."""
        draw = self.draw
        schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}}
        tools = [{"type": "function", "name": name, "parameters": schema}
                 for name in draw.sample(("look", "list_all"), draw.randrange(3))]  # fmt: skip
        tokens = self.client.tokenizer.encode(said(draw), add_special_tokens=False)
        more: dict[str, Any] = {
            "instructions": draw.choice(WORDS), "previous_response_id": self._response_id(key), "tools": tools,
            "tool_choice": draw.choice(("auto", "none", "required", {"type": "function", "name": "look"}, {
                "type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "look"}]})),
            "parallel_tool_calls": False, "store": draw.random() < 0.8, "stream": True, "truncation": "auto",
            "include": ["message.output_text.logprobs"], "metadata": {"a": draw.choice(WORDS)}, "include_reasoning": False,
            "text": {"format": draw.choice(({"type": "json_object"}, {"type": "json_schema", "name": "x", "schema": {
                "type": "object", "properties": {"a": {"enum": ["b", 1]}}, "required": ["a"]}}))},
            "kv": draw.choice(({"reuse": "off"}, {"explain": True}, {"selection": "dense"})), "cache_salt": "s", "seed": 7,
            "stop": draw.choice(WORDS) or "x", "temperature": draw.choice((0, 1.5)), "top_k": 3,
        }  # fmt: skip
        given = draw.choice((draw.choice(WORDS), [self._item(key) for _ in range(draw.randint(1, 6))]))
        body = {"input": given, "max_output_tokens": draw.choice((1, 8, 24, len(tokens) + 8)),
                **dict(draw.sample(list(more.items()), draw.randrange(8)))}  # fmt: skip
        if tools and draw.random() < 0.5:
            body["tools"] = tools
        if tokens and draw.random() < 0.6 and "text" not in body and body.get("tool_choice", "auto") in ("auto", "none"):
            body["forced_tokens"] = tokens
            body["max_output_tokens"] = len(tokens) + draw.randrange(4)
        if draw.random() < 0.1:
            body[draw.choice(OUTER)] = draw.choice((value(draw), value(draw), *ODD))
        return body


def said(draw: random.Random) -> str:
    """What the model is made to say: thoughts, text and calls, cut anywhere, or crumbs of them."""
    call = json.dumps({"name": draw.choice(("look", "list_all", "x")), "arguments": {"city": draw.choice(WORDS)}})
    parts = draw.choices(("<think>Hm.</think>", "I look. ", f"<tool_call>{call}</tool_call>", "\n", draw.choice(WORDS)), k=4)
    text = draw.choice(("".join(parts), "<think>Hm.</think>" + "".join(parts), answer(draw)))[:200]
    return text[: draw.randint(1, len(text))] if text and draw.random() < 0.3 else text


def finished(text: str) -> dict[str, Any] | None:
    """The response that a stream ends with; None where it failed. Raises AssertionError where it is not as it should be."""
    blocks = text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""], text[-300:]
    events = [json.loads(block.partition("\ndata: ")[2]) for block in blocks[:-2]]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    names = [event["type"] for event in events]
    assert names[:2] == ["response.created", "response.in_progress"] and names.count(
        "response.output_item.added"
    ) == names.count("response.output_item.done")
    last = events[-1]
    if last["type"] == "response.failed":
        return None
    assert last["type"] == f"response.{last['response']['status']}", last["type"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == last["response"]["output"]
    response: dict[str, Any] = last["response"]
    return response


def check(client: ThreadEngineClient) -> None:
    """End an engine, and look whether it holds anything. Raises AssertionError."""
    client.close()
    core = client._core
    core.check()
    stats = core.stats()
    held = {"running": stats.running, "waiting": stats.waiting, "blocks": sum(group.in_use for group in stats.groups)}
    assert not any(held.values()), f"nothing runs, but something is still held: {held}"
    assert not stats.internal_errors, f"{stats.internal_errors} errors of the engine's own; the log has them"


def model(folder: Path) -> None:
    """A random model with a template and a context for conversations."""
    write_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": LONGEST}))
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**told, "chat_template": TEMPLATE}))


async def fuzz(folder: Path, seed: int, requests: int) -> Counter[str]:
    """One round; how requests ended."""
    settings = {"device": "cpu", "dtype": "fp32", "threads": 1, "block_size": 16, "kv_memory": 1024 * 1024, "max_num_seqs": 6}
    client = ThreadEngineClient.start(EngineConfig.from_flat({"model": str(folder), **settings}))
    app = create_app(client, OPTIONS)
    fuzzer = Fuzzer(app, client, random.Random(seed))
    try:
        async with app.router.lifespan_context(app):
            await asyncio.wait_for(fuzzer.run(requests), 600)
            while (await client.stats()).running:  # those whose clients left
                await asyncio.sleep(0.01)
    finally:
        check(client)
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert not others, others
    return fuzzer.ends


def main(argv: Sequence[str] | None = None) -> int:
    """Run; prints how requests ended, and the seed of each round."""
    made = argparse.ArgumentParser(prog="python -m kvloom.loadtest.fuzz.responses", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--requests", type=int, default=2000, help="end after so many requests (default: %(default)s)")
    made.add_argument("--minutes", type=float, help="end after so many minutes instead")
    made.add_argument("--seed", type=int, default=0, help="of the first round")
    args = made.parse_args(argv)
    until, done, seed = time.monotonic() + 60 * (args.minutes or 0), 0, args.seed
    with tempfile.TemporaryDirectory() as folder:
        model(Path(folder))
        while time.monotonic() < until if args.minutes else done < args.requests:
            count = ROUND if args.minutes else min(ROUND, args.requests - done)
            ends = asyncio.run(fuzz(Path(folder), seed, count))
            print(f"seed {seed}: " + ", ".join(f"{count} {end}" for end, count in sorted(ends.items())), flush=True)
            done, seed = done + count, seed + 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
