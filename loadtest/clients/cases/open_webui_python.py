"""What Open WebUI's backend sends, by its own source (open_webui/routers/openai.py and tasks.py): the list of models within ten
seconds, chats that are streamed with what its settings add, and the calls behind the scenes, which are not."""

import asyncio
import json

import aiohttp
from report import KEY, MODEL, QUESTION, TOOL_CHOICE, URL, WEATHER, require, run

HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
USER = {"role": "user", "content": "Say hello."}
HISTORY = "<chat_history>\nUSER: Say hello.\nASSISTANT: Hello!\n</chat_history>"
TASKS = {
    "title": 'Generate a concise title. JSON format: { "title": "your concise title here" }',
    "tags": 'Generate 1-3 broad tags. JSON format: { "tags": ["tag1", "tag2", "tag3"] }',
    "follow_ups": 'Suggest 3-5 follow-up questions. JSON format: { "follow_ups": ["Question 1?", "Question 2?"] }',
}


async def models():
    limit = aiohttp.ClientTimeout(total=10)
    async with (
        aiohttp.ClientSession(timeout=limit, trust_env=True) as session,
        session.get(f"{URL}/models", headers=HEADERS) as reply,
    ):
        require(reply.status == 200, f"status {reply.status}")
        listed = await reply.json()
    require(MODEL in [model["id"] for model in listed["data"]], "the model is not listed")


async def ask(payload):
    """The chunks of a stream, or the body."""
    data, url = json.dumps(payload), f"{URL}/chat/completions"
    async with (
        aiohttp.ClientSession(trust_env=True) as session,
        session.post(url, data=data, headers=HEADERS, allow_redirects=False) as reply,
    ):
        if reply.status != 200:
            raise AssertionError(f"status {reply.status}: {(await reply.text())[:200]}")
        if "text/event-stream" not in reply.headers.get("Content-Type", ""):
            return await reply.json()
        lines = [line.decode().strip() async for line in reply.content]
    events = [line.removeprefix("data:").strip() for line in lines if line]
    require(events[-1] == "[DONE]", "the stream has no end")
    return [json.loads(event) for event in events[:-1]]


def text():
    for task, prompt in TASKS.items():
        content = f"### Task:\n{prompt}\n### Chat History:\n{HISTORY}"
        said = {"model": MODEL, "messages": [{"role": "user", "content": content}], "stream": False, "max_tokens": 1000}
        reply = asyncio.run(ask(said))
        require(reply["choices"][0]["message"]["content"], f"no {task}")


def stream():
    asyncio.run(models())
    system = {"role": "system", "content": "User context:\n\nBe polite."}
    settings = {
        "temperature": 0.8, "top_p": 0.9, "min_p": 0.05, "top_k": 40, "repeat_penalty": 1, "frequency_penalty": 0,
        "presence_penalty": 0, "seed": 1, "stop": ["</s>"], "logit_bias": {}, "max_tokens": 128,
    }  # fmt: skip
    for more in ({}, {"stream_options": {"include_usage": True}}, settings):
        parts = {"role": "user", "content": [{"type": "text", "text": "Say hello."}]}
        chunks = asyncio.run(ask({"stream": True, "model": MODEL, "messages": [system, parts], **more}))
        text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        require(text, "the answer is empty")
        require(("stream_options" in more) == bool(chunks[-1].get("usage")), "usage is told unasked, or not")


def tools_streamed():
    """Its native way to call functions: the pieces of a call, its result, the answer."""
    said = {"stream": True, "model": MODEL, "max_tokens": 128, "tools": [WEATHER], "tool_choice": TOOL_CHOICE}
    user = {"role": "user", "content": QUESTION}
    calls = {}
    for chunk in asyncio.run(ask({**said, "messages": [user]})):
        for delta in chunk["choices"][0]["delta"].get("tool_calls") or []:
            call = calls.setdefault(delta["index"], {**delta, "function": {"name": "", "arguments": ""}})
            for key, value in delta["function"].items():
                call["function"][key] += value or ""
    require(calls and json.loads(calls[0]["function"]["arguments"])["city"], "no city")
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "Rain."} for call in calls.values()]
    assistant = {"role": "assistant", "content": "", "tool_calls": list(calls.values())}
    chunks = asyncio.run(ask({**said, "tool_choice": "none", "messages": [user, assistant, *results]}))
    require("".join(c["choices"][0]["delta"].get("content") or "" for c in chunks), "no answer after the result")


run({"text": text, "stream": stream, "tools streamed": tools_streamed})
