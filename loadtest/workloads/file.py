"""file: prompts of one's own, from a file.

JSONL, one request a line:

    {"prompt": "text, or token ids", "output_len": 64}
    {"messages": [{"role": "user", "content": "..."}], "output_len": 64}

or ShareGPT's JSON, an array of talks of which the first question is sent, to be answered at the length of its own reply:

    [{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}]
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvloom.engine.bounds import bounded
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.client.record import Job
from kvloom.loadtest.workloads.base import LONGEST, Options, workload
from kvloom.loadtest.workloads.corpus import TextSource

LARGEST = 1 << 30
"""Bytes of a file that is read whole."""
LENGTHS = ("output_len", "output_tokens", "max_tokens")
"""Keys of a line that say how long its answer is to be; the first that is there counts."""
EXAMPLE = '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions(Options):
    """A file with fewer prompts than are sent is gone through again."""

    file: str = ""
    """JSONL with a prompt or messages on each line, or ShareGPT's JSON."""
    output_len: int | None = bounded(None, 1, LONGEST)
    """Tokens of an answer, instead of what the file says; 64 where it says nothing."""
    shuffle: bool = True
    """In an order that the seed decides, so that stages differ; switched off, in the file's order."""


class Entry(NamedTuple):
    """One request of a file."""

    prompt: str | tuple[int, ...]
    messages: tuple[Mapping[str, Any], ...] = ()
    output_len: int | None = None
    reply: str = ""
    """What was answered once; as many tokens are asked for."""


@workload(
    "file",
    FileOptions,
    "prompts of your own from --file: JSONL with a prompt or messages on each line, or ShareGPT's JSON",
    endless=False,
)
def file(options: FileOptions, text: TextSource, seed: int, count: int) -> list[Job]:
    if not options.file:
        raise ConfigError("the workload file needs --file PROMPTS.jsonl")
    entries = read(Path(options.file))
    if options.shuffle:
        random.Random(f"file {seed}").shuffle(entries)
    return [
        Job(prompt=entry.prompt, messages=entry.messages, output_tokens=_length(entry, options, text))
        for entry in itertools.islice(itertools.cycle(entries), count)
    ]


def _length(entry: Entry, options: FileOptions, text: TextSource) -> int:
    replied = len(text.encode(entry.reply)) if entry.reply else None
    return options.output_len or entry.output_len or replied or 64


def read(path: Path) -> list[Entry]:
    """All requests of a file, in its order. Raises ConfigError naming the line and what is wrong with it."""
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes; allowed: {LARGEST} or less")
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the prompts in {path} cannot be read ({error})") from None
    entries = []
    for where, value in _values(path, content):
        try:
            entries.append(_entry(value))
        except ValueError as error:
            raise ConfigError(f"{path}, {where}: {error}; expected {EXAMPLE}") from None
    if not entries:
        raise ConfigError(f"{path} holds no prompts; expected {EXAMPLE}")
    return entries


def _values(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    """JSON values with where they stand. Raises ConfigError."""
    if content.lstrip()[:1] == "[":
        try:
            yield from ((f"entry {i}", value) for i, value in enumerate(json.loads(content), 1))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} begins as a JSON array and is none ({error})") from None
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}, line {number}: no JSON ({error}); expected {EXAMPLE}") from None
            yield f"line {number}", value


def _entry(value: Any) -> Entry:
    """Raises ValueError saying what is wrong."""
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    length = next((value[name] for name in LENGTHS if value.get(name) is not None), None)
    if length is not None and not (type(length) is int and 1 <= length <= LONGEST):
        raise ValueError(f"the length of the answer is {json.dumps(length)[:40]}, not a whole number from 1 to {LONGEST}")
    if "conversations" in value:
        return _talk(value["conversations"], length)
    if "messages" in value:
        return _messages(value["messages"], length)
    prompt = value.get("prompt")
    if isinstance(prompt, list) and prompt and all(type(token) is int and token >= 0 for token in prompt):
        return Entry(tuple(prompt), output_len=length)
    if not (isinstance(prompt, str) and prompt):
        raise ValueError("there is neither a prompt (text or token ids) nor messages nor conversations")
    return Entry(prompt, output_len=length)


def _messages(messages: Any, length: int | None) -> Entry:
    """A talk for the chat endpoint; its text counts as the prompt."""
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)):
        raise ValueError("messages is no array of objects with a role")
    said = (m["content"] for m in messages if isinstance(m.get("content"), str))
    return Entry("\n\n".join(said), tuple(messages), length)


def _talk(turns: Any, length: int | None) -> Entry:
    """The first question of a talk, and the reply to it."""
    if not (isinstance(turns, list) and all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns)):
        raise ValueError("conversations is no array of objects with a value")
    if not turns or not turns[0]["value"]:
        raise ValueError("conversations holds no question")
    return Entry(turns[0]["value"], output_len=length, reply=turns[1]["value"] if len(turns) > 1 else "")
