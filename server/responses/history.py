"""What a request continues: its own items, behind those of the stored response that it names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvloom.server.errors import NotStoredError
from kvloom.server.responses.store import Owner, Record, ResponseStore
from kvloom.server.schema.items import STORED, ItemReference, messages_of
from kvloom.server.schema.responses import ResponsesBody


@dataclass(frozen=True, slots=True)
class History:
    """The items of one request."""

    store: ResponseStore
    owner: Owner
    body: ResponsesBody
    parent: Record | None
    """The response that is continued."""
    before: Sequence[dict[str, Any]]
    """All items up to its end."""
    items: Sequence[dict[str, Any]]
    """Those of the request, as they are listed."""
    made: Sequence[str]
    """Ids of those that had none."""

    @classmethod
    def of(cls, store: ResponseStore, owner: Owner, body: ResponsesBody) -> History:
        """The items of a request. Raises NotStoredError for what its owner has not stored."""
        parent = None
        if body.previous_response_id is not None:
            parent = store.find(owner, body.previous_response_id)
            if parent is None:
                raise _missing("response", body.previous_response_id, "previous_response_id", "previous_response_not_found")
        items, made = list[dict[str, Any]](), list[str]()
        for index, item in enumerate(body.input):
            if isinstance(item, ItemReference):
                found = store.find_item(owner, item.id)
                if found is None:
                    raise _missing("item", item.id, f"input[{index}].id", "item_not_found")
                items.append(found)
            else:
                items.append(item.listed())
                if item.id is None:
                    made.append(items[-1]["id"])
        return cls(store, owner, body, parent, [] if parent is None else parent.conversation(), items, made)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation. Instructions are those of this request: earlier ones were of earlier requests."""
        system = [] if self.body.instructions is None else [{"role": "system", "content": self.body.instructions}]
        return system + messages_of(STORED.validate_python([*self.before, *self.items]))

    def keep(self, response: dict[str, Any]) -> bool:
        """Store the response to it; whether it was."""
        return self.store.put(self.owner, response, self.items, self.made, self.parent, self.before)


def _missing(kind: str, name: str, param: str, code: str) -> NotStoredError:
    return NotStoredError(f"no {kind} {name[:80]!r} is stored for this key; send the items themselves", param, code)
