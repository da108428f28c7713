"""The fields that Anthropic's client defines for messages, and those of chats that people try there: what becomes of each.

python -m kvloom.server.schema.message_known     prints the table of docs/messages.md
"""

from __future__ import annotations

import textwrap

from kvloom.server.schema.chat import ChatBody
from kvloom.server.schema.fields import standing
from kvloom.server.schema.message_fields import MESSAGE_HINTS, MESSAGE_UNSUPPORTED
from kvloom.server.schema.messages import MessagesBody

VERSION = "anthropic 2.14.0"
SOURCE = "MessageCreateParams of types/message_create_params.py and types/beta/message_create_params.py, and those before them"
_NAMES = (
    "billing_policy cache_control compaction container context_management diagnostics fallback_credit_token fallbacks "
    "inference_geo max_tokens mcp_servers messages metadata model output_config output_format service_tier speed "
    "stop_sequences stream system temperature thinking thread tool_choice tools top_k top_p"
)
ANTHROPIC = frozenset(_NAMES.split())


def fields() -> dict[str, str]:
    """Field -> what it is here, of all that Anthropic's client or a chat here defines."""
    names = sorted(ANTHROPIC | ChatBody.model_fields.keys())
    return {name: standing(name, MessagesBody) or "unknown" for name in names}


def table() -> str:
    """The tables in Markdown: of Anthropic's fields, and of those of chats."""
    found = fields()
    rows = {name: f"| `{name}` | {kind} | {_note(name, kind)} |\n" for name, kind in found.items()}
    anthropic = "".join(row for name, row in rows.items() if name in ANTHROPIC)
    refused = "".join(row for name, row in rows.items() if name not in ANTHROPIC and found[name] == "refused")
    own = ", ".join(f"`{name}`" for name, kind in found.items() if kind == "served" and name not in ANTHROPIC)
    told = textwrap.fill(f"Of chats' fields these are served as there: {own}. Not served:", 128, break_on_hyphens=False)
    return f"{_HEAD}{anthropic}\n{told}\n\n{_HEAD}{refused}"


_HEAD = "| field | | |\n|---|---|---|\n"


def _note(name: str, kind: str) -> str:
    return MESSAGE_HINTS[name] if kind == "hint" else MESSAGE_UNSUPPORTED[name].advice if kind == "refused" else ""


if __name__ == "__main__":
    print(table(), end="")
