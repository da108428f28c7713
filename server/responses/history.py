"""What a request continues: its own items, behind those of the stored response that it names."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from kvloom.engine.errors import InvalidRequestError, OverloadedError
from kvloom.server.context import ServerContext, context_of, owner_of
from kvloom.server.errors import NotStoredError
from kvloom.server.limits import LONGEST_TURN
from kvloom.server.responses.store import Entry, Owner, Record, listed
from kvloom.server.schema.items import STORED, Item, ItemReference, messages_of
from kvloom.server.schema.responses import ResponsesBody
from kvloom.server.sse import unless_gone


@dataclass(frozen=True, slots=True)
class History:
    """The items of one request, in order."""

    context: ServerContext
    owner: Owner
    body: ResponsesBody
    parent: Record | None
    """The response that is continued."""
    before: Sequence[Entry]
    """All items up to its end."""
    given: Sequence[Item | Entry]
    """Those of the request: its own, and stored ones that it refers to."""

    @classmethod
    def of(cls, request: Request, body: ResponsesBody) -> History:
        """The items of a request. Raises NotStoredError for what its key has not stored, and InvalidRequestError where all of
        them are more than a body may be: whoever sends them at once may send no more."""
        context, owner = context_of(request), owner_of(request)
        store, name = context.responses, body.previous_response_id
        parent = None if name is None else store.find(owner, name)
        if name is not None and parent is None:
            raise _missing("response", name, "previous_response_id", "previous_response_not_found", 400)
        before = [] if parent is None else parent.conversation()
        given: list[Item | Entry] = []
        for index, item in enumerate(body.input):
            entry = store.find_item(owner, item.id) if isinstance(item, ItemReference) else None
            if isinstance(item, ItemReference) and entry is None:
                raise _missing("item", item.id, f"input[{index}].id", "item_not_found")
            given.append(entry or item)
        found = cls(context, owner, body, parent, before, given)
        size, most = sum(len(entry.data) for entry in found.stored), context.options.max_body
        if size > most:
            raise InvalidRequestError(
                f"the stored items of the conversation have {size} bytes; allowed: {most}, as in a body; begin a new one",
                "input" if parent is None else "previous_response_id",
            )
        return found

    @property
    def stored(self) -> list[Entry]:
        """The items that are read from the store."""
        return [*self.before, *(item for item in self.given if isinstance(item, Entry))]

    async def messages(self, request: Request) -> list[dict[str, Any]]:
        """The conversation. Instructions are those of this request: earlier ones were of earlier requests.

        Reading what is stored takes time from everybody, as reading a long body does, and waits for its turn like one. Raises
        OverloadedError where that would be too long, and ClientGoneError.
        """
        data = listed(self.stored)
        wait = self.context.bodies.turn(self.owner.tenant, data)
        if wait == math.inf:
            raise OverloadedError("too many long conversations wait to be read; try again later", LONGEST_TURN)
        if wait > 0:
            await unless_gone(request.receive, asyncio.sleep(wait))
        read = iter(STORED.validate_json(data))
        before = [next(read) for _ in self.before]
        own = [next(read) if isinstance(item, Entry) else item for item in self.given]
        system = [] if self.body.instructions is None else [{"role": "system", "content": self.body.instructions}]
        return system + messages_of([*before, *own])

    def keep(self, response: dict[str, Any]) -> bool:
        """Store the response to it; whether it was."""
        items, made = list[Entry](), list[str]()
        for item in self.given:
            items.append(item if isinstance(item, Entry) else Entry.of(item.listed()))
            if not isinstance(item, Entry) and item.id is None:
                made.append(items[-1].id)
        return self.context.responses.put(self.owner, response, items, made, self.parent, self.before)


def _missing(kind: str, name: str, param: str, code: str, status: int = 404) -> NotStoredError:
    return NotStoredError(f"no {kind} {name[:80]!r} is stored for this key; send the items themselves", param, code, status)
