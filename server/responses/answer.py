"""A response as it comes: its events in a stream, and the whole of it, which are the same items.

    response.created, response.in_progress                       with the first token
    response.output_item.added                                   for each item, then
        response.content_part.added                              text and thoughts
        response.output_text.delta ... .done                     text
        response.reasoning_text.delta ... .done                  thoughts
        response.function_call_arguments.delta ... .done         calls
        response.content_part.done                               text and thoughts
    response.output_item.done
    response.completed, or .incomplete                           with the whole response; then [DONE]
    error, response.failed                                       instead, where generation failed

Every event has its number, and bears its type as the name of the server-sent event as well.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from kvloom.engine.requests.request import TokenLogprob
from kvloom.server.answers.events import CallArguments, CallStart, Content, Event, Reasoning
from kvloom.server.errors import wire_error
from kvloom.server.field_names import renamed
from kvloom.server.logprobs import chat_logprobs
from kvloom.server.pieces import Choice, Finish, Part, Piece
from kvloom.server.respond import Job
from kvloom.server.schema.items import new_item_id
from kvloom.server.schema.responses import ResponsesBody
from kvloom.server.sse import DONE
from kvloom.server.usage import UsageTotals

Keep = Callable[[dict[str, Any]], bool]
"""Stores a response; whether it was."""

_KINDS = {Content: "message", Reasoning: "reasoning", CallStart: "function_call"}
_NAMES = {Content: "output_text", Reasoning: "reasoning_text", CallStart: "function_call_arguments"}
_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


class ResponseWriter:
    """Writes one response. `write`, `end` and `error` make its stream, `whole` its body."""

    def __init__(self, body: ResponsesBody, job: Job, keep: Keep) -> None:
        """keep: what stores the response once it is finished."""
        self._body, self._job, self._keep = body, job, keep
        self._choice = Choice()
        self._ids: list[str] = []
        """Of items, by their place."""
        self._number = 0
        self._written: list[str] = []
        """Events that go out with the piece at hand."""
        self._open = False
        """Whether the last item has begun and not ended."""
        self._told = 0
        """Log-probabilities of the open item that deltas have told."""

    def write(self, piece: Piece) -> bytes:
        """The events of one piece. The first one opens the stream, whatever it holds."""
        if not self._number:
            for kind in ("created", "in_progress"):
                self._event(f"response.{kind}", response=self._response("in_progress", []))
        self._choice.add(piece)
        for event in piece.events:
            self._take(event)
        if piece.finish_reason is not None:
            _complete(self._choice)
            self._close()
            if len(self._choice.parts) > len(self._ids):
                self._begin(len(self._ids))
                self._close()
        return self._flush()

    def end(self) -> bytes:
        """The event that ends a stream."""
        response = self._finished(self._choice)
        self._event(f"response.{response['status']}", response=response)
        return self._flush() + DONE

    def error(self, error: Exception) -> bytes:
        """What ends a stream that failed. What there is of the response is not stored."""
        told = wire_error(renamed(error, self._body.names))
        self._event("error", code=told.code, message=told.message, param=told.param)
        output = [self._item(self._choice, index) for index in range(len(self._ids))]
        problem = {"code": _CODES.get(told.status, "server_error"), "message": told.message}
        self._event("response.failed", response={**self._response("failed", output), "error": problem, "store": False})
        return self._flush() + DONE

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The response, at once."""
        _complete(choices[0])
        return self._finished(choices[0])

    def _take(self, event: Event) -> None:
        if isinstance(event, CallArguments):
            self._event("response.function_call_arguments.delta", **self._where(), delta=event.text)
            return
        at = len(self._ids) - 1
        if isinstance(event, CallStart) or not self._open or self._choice.parts[at].kind is not type(event):
            self._close()
            at = self._begin(at + 1)
        if isinstance(event, Content | Reasoning):
            fresh = self._choice.parts[at].logprobs[self._told :]
            self._told += len(fresh)
            more = {"logprobs": self._logprobs(fresh)} if isinstance(event, Content) else {}
            where = self._where(content=True)
            self._event(f"response.{_NAMES[type(event)]}.delta", **where, delta=event.text, **more)

    def _begin(self, index: int) -> int:
        """Open an item."""
        part = self._choice.parts[index]
        self._ids.append(new_item_id(_KINDS[part.kind]))
        self._open, self._told = True, 0
        empty = self._item_of(index, Part(part.kind, id=part.id, name=part.name), "in_progress")
        if part.kind is not CallStart:
            empty["content"] = []
        self._event("response.output_item.added", output_index=index, item=empty)
        if part.kind is not CallStart:
            self._event("response.content_part.added", **self._where(content=True), part=self._content(Part(part.kind)))
        return index

    def _close(self) -> None:
        """End the open item, if there is one."""
        if not self._open:
            return
        self._open = False
        index = len(self._ids) - 1
        part, item = self._choice.parts[index], self._item(self._choice, index)
        name = f"response.{_NAMES[part.kind]}.done"
        if part.kind is CallStart:
            self._event(name, **self._where(), name=part.name, arguments=part.text)
        else:
            where = self._where(content=True)
            more = {"logprobs": self._logprobs(part.logprobs)} if part.kind is Content else {}
            self._event(name, **where, text=part.text, **more)
            self._event("response.content_part.done", **where, part=self._content(part))
        self._event("response.output_item.done", output_index=index, item=item)

    def _where(self, *, content: bool = False) -> dict[str, Any]:
        """Where a part of the open item stands."""
        where = {"item_id": self._ids[-1], "output_index": len(self._ids) - 1}
        return {**where, "content_index": 0} if content else where

    def _event(self, kind: str, **fields: Any) -> None:
        data = json.dumps({"type": kind, "sequence_number": self._number, **fields}, separators=(",", ":"))
        self._written.append(f"event: {kind}\ndata: {data}\n\n")
        self._number += 1

    def _flush(self) -> bytes:
        data, self._written = "".join(self._written).encode(), []
        return data

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        if not logprobs or not self._body.logprobs:
            return []
        top = len(self._body.logprob_token_ids) or self._body.top_logprobs
        tokenizer, as_ids = self._job.context.client.tokenizer, self._body.return_tokens_as_token_ids
        found: list[dict[str, Any]] = chat_logprobs(tokenizer, logprobs, top, as_ids=as_ids)["content"]
        return found

    def _content(self, part: Part) -> dict[str, Any]:
        if part.kind is Reasoning:
            return {"type": "reasoning_text", "text": part.text}
        return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": self._logprobs(part.logprobs)}

    def _item(self, choice: Choice, index: int) -> dict[str, Any]:
        """An item as it is at its end."""
        whole = index < len(choice.parts) - 1 or _whole(choice.parts[index], choice.finish_reason)
        return self._item_of(index, choice.parts[index], "completed" if whole else "incomplete")

    def _item_of(self, index: int, part: Part, status: str) -> dict[str, Any]:
        head = {"id": self._ids[index], "type": _KINDS[part.kind], "status": status}
        if part.kind is CallStart:
            return {**head, "call_id": part.id, "name": part.name, "arguments": part.text}
        if part.kind is Reasoning:
            return {**head, "summary": [], "content": [self._content(part)], "encrypted_content": None}
        return {**head, "role": "assistant", "content": [self._content(part)]}

    def _finished(self, choice: Choice) -> dict[str, Any]:
        """The response, and into the store with it."""
        for part in choice.parts[len(self._ids) :]:
            self._ids.append(new_item_id(_KINDS[part.kind]))
        output = [self._item(choice, index) for index in range(len(choice.parts))]
        cut = choice.finish_reason == "length"
        response = self._response("incomplete" if cut else "completed", output)
        if cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = int(time.time())
        response["usage"] = usage_of(self._job.usage)
        if self._body.store:
            response["store"] = True
            response["store"] = self._keep(response)
        return response

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        body, job = self._body, self._job
        sampling, form = job.work.sampling, body.format
        return {
            "id": job.envelope.id,
            "object": "response",
            "created_at": job.envelope.created,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            **body.echoed,
            "metadata": body.metadata,
            "model": job.envelope.model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
            "service_tier": "default",
            "store": body.store,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"} if form is None else form.told(), "verbosity": "medium"},
            "tool_choice": body.tool_choice if isinstance(body.tool_choice, str) else body.tool_choice.told(),
            "tools": [tool.told() for tool in body.tools],
            "top_logprobs": body.top_logprobs,
            "top_p": sampling.top_p,
            "truncation": body.truncation,
            "usage": None,
        }


def usage_of(usage: UsageTotals) -> dict[str, Any]:
    """Token counts under the names that responses have for them."""
    body = usage.body()
    reasoning = body.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
    told = {
        "input_tokens": body["prompt_tokens"],
        "input_tokens_details": body["prompt_tokens_details"],
        "output_tokens": body["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": body["total_tokens"],
    }
    return {**told, "kv": body["kv"]} if "kv" in body else told


def _complete(choice: Choice) -> None:
    """An answer that ended without a word is a message without text: clients look for one."""
    if choice.finish_reason != "length" and all(part.kind is Reasoning for part in choice.parts):
        choice.parts.append(Part(Content))


def _whole(part: Part, finish: Finish | None) -> bool:
    """Whether the last part of an answer that ended so is whole."""
    return finish == "tool_calls" if part.kind is CallStart else finish not in ("length", None)
