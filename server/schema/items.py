"""Items, of which the input and the output of a response are made: their forms on the wire, and the chat they stand for.

message                 a turn of a user, of the system, or text of an assistant
reasoning               what an assistant thought before what follows
function_call           a call of an assistant's
function_call_output    its result
item_reference          an item that the store holds, by its id
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter, WithJsonSchema, model_validator

from kvloom.server.schema.chat_messages import MAX_MESSAGES
from kvloom.server.schema.common import StrictBody, Text
from kvloom.server.schema.problem import problem

MAX_ITEMS = 4 * MAX_MESSAGES
"""Of one request: a turn of an assistant may be several."""
MAX_ID = 1024
_UNREADABLE = "this model reads text only; allowed: input_text, output_text"

Id = Annotated[Text, Field(min_length=1, max_length=MAX_ID)]


def new_item_id(kind: str) -> str:
    """An id for an item of a kind that nobody can guess."""
    prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}[kind]
    return f"{prefix}_{uuid.uuid4().hex}"


class TextPart(StrictBody):
    """A piece of text. Part types differ in who wrote it, which the item says as well."""

    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kind = data.get("type")
        if kind == "refusal":
            return {"type": "output_text", "text": data.get("refusal")}
        if isinstance(kind, str) and kind.startswith("input_") and kind != "input_text":
            raise problem("type", f"type is {kind[:64]!r}; {_UNREADABLE}")
        return data


def _form(value: Any) -> str:
    return "<parts>" if isinstance(value, list) else "<text>"


Parts = Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)]
Content = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[Parts, Tag("<parts>")],
    Discriminator(_form),
]


def _texts(content: str | Sequence[TextPart]) -> list[str]:
    return [content] if isinstance(content, str) else [part.text for part in content]


def _for_chat(content: str | Sequence[TextPart]) -> str | list[dict[str, str]]:
    """The content of a chat's message."""
    texts = _texts(content)
    return "".join(texts) if len(texts) < 2 else [{"type": "text", "text": text} for text in texts]


class ItemBase(StrictBody, ABC):
    """What items have in common. `status` is told, and asks for nothing."""

    type: str
    id: Id | None = None

    @abstractmethod
    def written(self) -> dict[str, Any]:
        """Its own fields, as the server writes them."""

    def listed(self) -> dict[str, Any]:
        """It, as it is stored and listed: complete, and with an id."""
        return {"id": self.id or new_item_id(self.type), "type": self.type, **self.written()}


class MessageItem(ItemBase):
    """A turn."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content

    def written(self) -> dict[str, Any]:
        """See `ItemBase`."""
        assistant = self.role == "assistant"
        more: dict[str, Any] = {"annotations": []} if assistant else {}
        kind = "output_text" if assistant else "input_text"
        parts = [{"type": kind, "text": text, **more} for text in _texts(self.content)]
        return {"role": self.role, "status": "completed", "content": parts}


class FunctionCallItem(ItemBase):
    """A call."""

    type: Literal["function_call"]
    call_id: Id
    name: Text = Field(min_length=1, max_length=1024)
    arguments: Text = ""
    """JSON text."""

    def written(self) -> dict[str, Any]:
        """See `ItemBase`."""
        return {"status": "completed", "call_id": self.call_id, "name": self.name, "arguments": self.arguments}


class FunctionCallOutputItem(ItemBase):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: Id
    output: Content

    def written(self) -> dict[str, Any]:
        """See `ItemBase`."""
        given = self.output
        output = given if isinstance(given, str) else [{"type": "input_text", "text": part.text} for part in given]
        return {"status": "completed", "call_id": self.call_id, "output": output}


class ReasoningItem(ItemBase):
    """Thoughts. They are given in `content`; a client that kept the summary alone may send that."""

    type: Literal["reasoning"]
    summary: Parts = Field(default_factory=list)
    content: Parts = Field(default_factory=list)
    encrypted_content: Text | None = None

    @model_validator(mode="after")
    def _open(self) -> ReasoningItem:
        if self.encrypted_content and not (self.content or self.summary):
            raise problem(
                "encrypted_content", "encrypted_content cannot be read here; send the item's content, or leave it out"
            )
        return self

    @property
    def text(self) -> str:
        """The thoughts."""
        return "\n".join(part.text for part in self.content or self.summary)

    def written(self) -> dict[str, Any]:
        """See `ItemBase`."""
        return {
            "summary": [{"type": "summary_text", "text": part.text} for part in self.summary],
            "content": [{"type": "reasoning_text", "text": part.text} for part in self.content],
        }


class ItemReference(ItemBase):
    """An item that a stored response holds."""

    type: Literal["item_reference"] = "item_reference"
    id: Id

    def written(self) -> dict[str, Any]:
        """See `ItemBase`."""
        return {}


Item = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem | ItemReference
KINDS = ("message", "reasoning", "function_call", "function_call_output", "item_reference")


def _typed(data: Any) -> Any:
    """An item with its type, which messages and references may leave out."""
    if not isinstance(data, dict):
        return data
    kind = data.get("type") or ("item_reference" if "id" in data and not data.keys() & {"role", "content"} else "message")
    if kind not in KINDS:
        raise problem("type", f"type is {str(kind)[:64]!r}; allowed: {', '.join(KINDS)}")
    return {**data, "type": kind}


def _tag(data: Any) -> str:
    kind = data.get("type") if isinstance(data, dict) else getattr(data, "type", None)
    return f"<{kind}>" if kind in KINDS else "<message>"


InputItem = Annotated[
    Annotated[
        Annotated[MessageItem, Tag("<message>")]
        | Annotated[FunctionCallItem, Tag("<function_call>")]
        | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")]
        | Annotated[ReasoningItem, Tag("<reasoning>")]
        | Annotated[ItemReference, Tag("<item_reference>")],
        Discriminator(_tag),
    ],
    BeforeValidator(_typed),
]
Items = Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS)]
STORED: TypeAdapter[list[Item]] = TypeAdapter(list[InputItem])
"""Reads items as `listed` wrote them."""


def _input(value: Any) -> Any:
    """A text is one turn of a user's."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError("must be a text, or a list of items")
    return value


_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}
Input = Annotated[Items, BeforeValidator(_input), WithJsonSchema(_SCHEMA)]


def messages_of(items: Iterable[Item]) -> list[dict[str, Any]]:
    """The messages of a chat: thoughts, text and calls of an assistant that follow each other in that order are one turn."""
    messages: list[dict[str, Any]] = []

    def turn(*closed_by: str) -> dict[str, Any]:
        if not messages or messages[-1]["role"] != "assistant" or any(name in messages[-1] for name in closed_by):
            messages.append({"role": "assistant"})
        return messages[-1]

    for item in items:
        match item:
            case ReasoningItem():
                if item.text:
                    turn("reasoning_content", "content", "tool_calls")["reasoning_content"] = item.text
            case MessageItem(role="assistant"):
                turn("content", "tool_calls")["content"] = _for_chat(item.content)
            case MessageItem():
                messages.append({"role": item.role, "content": _for_chat(item.content)})
            case FunctionCallItem():
                function = {"name": item.name, "arguments": item.arguments}
                turn().setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
            case FunctionCallOutputItem():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _for_chat(item.output)})
    return messages
