"""Which form of a message's content a chat template reads: a string, a list of text parts, or either.

A template that loops over parts drops a string without a word, and one that writes the content as it is shows a list as Python
would. So the template is asked: a short conversation is rendered in either form, for each role, and a form is read if the text
comes out and the dress of a part does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from kvloom.engine.errors import InvalidRequestError

_WORDS = ("kvloomprobe", "kvloomsecond")
_TYPES = ("text", "input_text", "output_text")


class Form(NamedTuple):
    """What is read of one role's messages."""

    string: bool
    parts: bool


class ContentForms(NamedTuple):
    """What a template reads, by role; other roles are read as the user's."""

    by_role: Mapping[str, Form]

    def shaped(self, role: str, content: str | Sequence[Mapping[str, Any]] | None) -> Any:
        """The content in a form that is read: as it was given, if that is one."""
        form = self.by_role.get(role, self.by_role["user"])
        if content is None:
            return None
        if isinstance(content, str):
            return content if form.string or not form.parts else [_part(content)]
        texts = [part["text"] for part in content]
        return [_part(text) for text in texts] if form.parts else "\n".join(texts)


def is_part(part: Any) -> bool:
    """Whether it is a text part, by OpenAI's names."""
    return isinstance(part, Mapping) and part.get("type") in _TYPES and isinstance(part.get("text"), str)


def find_forms(render: Callable[[Sequence[Mapping[str, Any]]], str]) -> ContentForms:
    """Ask a template. `render` raises InvalidRequestError for messages that it refuses."""
    user = _form(render, "user", Form(True, False))
    others = {role: _form(render, role, user) for role in ("system", "assistant")}
    return ContentForms({"user": user, **others})


def _form(render: Callable[[Sequence[Mapping[str, Any]]], str], role: str, user: Form) -> Form:
    """What is read of a role. A role that the template refuses in either form is read as the user's."""
    found = Form(_reads(render, role, _WORDS[0], user), _reads(render, role, [_part(word) for word in _WORDS], user))
    return found if any(found) else user


def _reads(render: Callable[[Sequence[Mapping[str, Any]]], str], role: str, content: Any, user: Form) -> bool:
    asked: dict[str, Any] = {"role": role, "content": content}
    other = {"role": "user", "content": "x" if user.string or not user.parts else [_part("x")]}
    try:
        text = render({"user": [asked], "system": [asked, other], "assistant": [other, asked]}[role])
    except InvalidRequestError:
        return False
    words = _WORDS[: 1 if isinstance(content, str) else 2]
    return all(word in text for word in words) and not any(f"{mark}{_WORDS[0]}{mark}" in text for mark in "'\"")


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
