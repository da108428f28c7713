"""Paths of other servers' APIs that are not served here, and what to use instead. They are 501, as in vLLM and llama.cpp, and
clients are told not to try again; a path that nobody knows is 404. Either says what is served."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from starlette.routing import BaseRoute
from starlette.types import Scope

from kvloom.server.methods import methods_of

HEADERS = {"X-Should-Retry": "false"}
"""OpenAI's and Anthropic's clients try 5xx again unless they are told not to."""
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")

_CHATS, _TEXT = "use /v1/chat/completions", "use /v1/completions"
_ONLY_TEXT = "the model here reads and writes text only"
_NOTHING_STORED = "files, jobs and conversations are not stored here"
UNSERVED: Mapping[str, str] = {
    "/v1/embeddings": "the model here generates text and makes no embeddings",
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score", "/pooling", "/classify"),
                    "the model here generates text and scores none"),
    **dict.fromkeys(("/v1/audio", "/v1/images", "/v1/videos", "/v1/realtime"), _ONLY_TEXT),
    "/v1/moderations": "there is no model for moderation",
    **dict.fromkeys(("/v1/files", "/v1/uploads", "/v1/batches", "/v1/fine_tuning", "/v1/vector_stores", "/v1/containers",
                     "/v1/assistants", "/v1/threads", "/v1/conversations"), _NOTHING_STORED),
    **dict.fromkeys(("/v1/edits", "/api/chat"), _CHATS),
    **dict.fromkeys(("/v1/engines", "/generate", "/completion", "/infill", "/api/generate", "/inference/v1/generate"), _TEXT),
    "/v1/complete": "use /v1/messages",
    "/v1/messages/batches": "jobs are not stored here; use /v1/messages for each request",
    "/v1/responses/compact": "nothing is compacted; use truncation in /v1/responses",
}  # fmt: skip
"""Path, with all beneath it -> why not, or what instead."""


class Unserved(NamedTuple):
    """What is told of a path."""

    status: int
    message: str
    code: str | None = None


def unserved(routes: Iterable[BaseRoute], scope: Scope) -> Unserved:
    """Why a path that has no route is not served."""
    routes, path = list(routes), scope["path"]
    served = [name for name in GENERATING if "POST" in methods_of(routes, {**scope, "path": name})]
    rest = f"served here: POST {', '.join(served)}; /docs lists the others"
    for prefix, why in UNSERVED.items():
        if path == prefix or path.startswith(prefix + "/"):
            return Unserved(501, f"{prefix} is not served: {why}; {rest}", "not_served")
    return Unserved(404, f"no such path: {scope['method']} {path[:200]}; {rest}")
