"""A short run of the fuzzer of messages, and proof that it would see what goes wrong; `make fuzz` runs more."""

import asyncio
import json

import pytest

from kvloom.loadtest.fuzz import messages
from kvloom.loadtest.fuzz.fuzzer import FuzzError
from kvloom.loadtest.fuzz.in_process import serving
from kvloom.loadtest.fuzz.message_streams import message_of
from kvloom.server.messages import replies


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("messages")
    messages.write(found)
    return found


def test_random_messages(folder):
    ends = asyncio.run(messages.run(folder, seed=3, requests=120))
    assert ends.total() == 120 and ends["left"] > 10 and ends["400"] > 10 and ends["max_tokens"] + ends["end_turn"] > 10


def test_a_wrong_count_is_seen(folder, monkeypatch):
    real = replies.usage_body
    monkeypatch.setattr(replies, "usage_body", lambda usage: {**real(usage), "input_tokens": 1})
    with pytest.raises(FuzzError, match="is counted"):
        asyncio.run(messages.run(folder, seed=3, requests=48))


def test_max_tokens_beyond_the_context_ends_with_it(folder):
    """Claude Code asks for 32,000 tokens, whatever the context."""

    async def ask():
        said = {"messages": [{"role": "user", "content": "x" * 1900}], "max_tokens": 10**6, "ignore_eos": True}
        async with serving(messages.engine(folder)) as application:
            return (await application.post("/v1/messages", json.dumps(said).encode())).json()

    message = asyncio.run(ask())
    usage = message["usage"]
    assert message["stop_reason"] == "model_context_window_exceeded"
    assert sum(count for name, count in usage.items() if name.endswith("put_tokens")) == messages.LONGEST


@pytest.mark.parametrize("name", ["content_block_start", "content_block_stop", "message_delta", "message_stop"])
def test_a_missing_event_is_seen(name):
    events = [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    data = {
        "message_start": '"message":{"content":[],"stop_reason":null,"usage":{}}',
        "content_block_start": '"index":0,"content_block":{"type":"text","text":""}',
        "content_block_delta": '"index":0,"delta":{"type":"text_delta","text":"a"}',
        "content_block_stop": '"index":0',
        "message_delta": '"delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":1}',
    }

    def written(events):
        return "".join(
            f'event: {name}\ndata: {{"type":"{name}"{"," if name in data else ""}{data.get(name, "")}}}\n\n' for name in events
        )

    assert message_of(written(events))["content"] == [{"type": "text", "text": "a"}]
    with pytest.raises((AssertionError, KeyError, IndexError)):
        message_of(written([event for event in events if event != name]))
