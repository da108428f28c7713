"""The API's own description (/openapi.json, /docs): answers as they are, errors by their statuses, and the key. FastAPI would
promise 422 and its own shape of errors, and knows nothing of answers that are written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from kvloom.server.auth import OPEN_PATHS
from kvloom.server.messages.errors import OVERLOADED, PATH
from kvloom.server.schema import answers, message_answers, response_answers

_TEXT = {"type": "string"}
_TEXT_OR_NULL = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_ERROR_FIELDS = {"message": _TEXT, "type": _TEXT, "param": _TEXT_OR_NULL, "code": _TEXT_OR_NULL}
ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": list(_ERROR_FIELDS), "properties": _ERROR_FIELDS}},
}
MESSAGE_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"const": "error"},
        "error": {"type": "object", "required": ["type", "message"], "properties": {"type": _TEXT, "message": _TEXT}},
        "request_id": _TEXT,
    },
}
ERRORS = {
    "400": "Bad request: `param` names the field",
    "401": "No key, or one that is not known here",
    "403": "Not for this caller: for the operator, or from a host or page that is not let in",
    "404": "No such model",
    "408": "The request did not come in time",
    "413": "The body is too large",
    "415": "The body is no JSON, or is compressed",
    "429": "Too much waits; Retry-After says when to come again",
    "431": "The headers are too large",
    "500": "The server failed",
    "503": "The engine is gone, the server ends, or it has too many connections",
}
"""By status, of every operation: most come from what stands in front of all routes."""
_WITH_BODY = frozenset({"408", "413", "415"})
_BEFORE = frozenset({"408"})
"""Said before it is known which path is asked."""
_REF = "#/components/schemas/"


class Described(NamedTuple):
    """What an operation answers with 200."""

    whole: type[answers.Answer] | None = None
    """None for an empty body, or another `media`."""
    event: type[answers.Answer] | None = None
    """Of a stream, where one may be asked for."""
    media: str = ""
    """Where it is no JSON."""


ANSWERS: Mapping[tuple[str, str], Described] = {
    ("post", "/v1/chat/completions"): Described(answers.ChatCompletion, answers.ChatChunk),
    ("post", "/v1/completions"): Described(answers.Completion, answers.Completion),
    ("post", "/v1/messages"): Described(message_answers.MessageAnswer, message_answers.MessageEvent),
    ("post", "/v1/messages/count_tokens"): Described(message_answers.TokenCount),
    ("post", "/v1/responses"): Described(response_answers.ModelResponse, response_answers.ResponseEvent),
    ("post", "/v1/responses/input_tokens"): Described(response_answers.InputTokens),
    ("get", "/v1/responses/{response_id}"): Described(response_answers.ModelResponse),
    ("delete", "/v1/responses/{response_id}"): Described(response_answers.ResponseDeleted),
    ("get", "/v1/responses/{response_id}/input_items"): Described(response_answers.ResponseItems),
    ("get", "/v1/models"): Described(answers.ModelList),
    ("get", "/v1/models/{name}"): Described(answers.ModelCard),
    ("post", "/tokenize"): Described(answers.Tokenized),
    ("post", "/detokenize"): Described(answers.Detokenized),
    ("get", "/tokenizer_info"): Described(answers.TokenizerInfo),
    ("get", "/v1/kv"): Described(answers.KVState),
    ("post", "/v1/kv/segments"): Described(answers.Segments),
    ("delete", "/v1/kv/segments"): Described(answers.SegmentsDeleted),
    ("post", "/v1/kv/explain"): Described(answers.Explanation),
    ("get", "/v1/kv/explain"): Described(answers.Explanation),
    ("post", "/v1/kv/reset"): Described(answers.Reset),
    ("get", "/load"): Described(answers.Load),
    ("get", "/version"): Described(answers.Version),
    ("get", "/metrics"): Described(media="text/plain"),
    **{(method, path): Described() for path in OPEN_PATHS for method in ("get", "post")},
}


def install(app: FastAPI) -> None:
    """Make `app` describe itself; the description is made once, when it is first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI documents it


def _describe(app: FastAPI) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = schema.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas |= {"Error": ERROR_SCHEMA, "MessageError": MESSAGE_ERROR_SCHEMA, **_models()}
    components["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "A key of --api-key or --admin-key"}
    }
    options = app.state.context.options
    schema["security"] = [{"key": []}] if options.asks_for_keys else [{}, {"key": []}]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            _answer(operation, ANSWERS.get((method, path)), of_messages=path.startswith(PATH))
            if path in OPEN_PATHS:
                operation["security"] = []
    return schema


def _answer(operation: dict[str, Any], described: Described | None, *, of_messages: bool) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    body = "requestBody" in operation
    errors = {status: text for status, text in ERRORS.items() if body or status not in _WITH_BODY}
    if of_messages:
        errors[str(OVERLOADED)] = errors.pop("503")
    responses |= {
        status: _error(text, "MessageError" if of_messages and status not in _BEFORE else "Error")
        for status, text in errors.items()
    }
    if described is not None:
        content = {}
        if described.whole is not None:
            content["application/json"] = {"schema": {"$ref": _REF + described.whole.__name__}}
        if described.event is not None:
            text = f"Lines `data: ` with a {described.event.__name__} each, or an Error; at last `data: [DONE]`"
            if of_messages:
                text = f"Named events, each with a {described.event.__name__}, or a MessageError at the end"
            content["text/event-stream"] = {"schema": {"type": "string", "description": text}}
        if described.media:
            content[described.media] = {"schema": {"type": "string"}}
        responses["200"] = {"description": "Successful Response", **({"content": content} if content else {})}


def _error(text: str, schema: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": {"$ref": _REF + schema}}}}


def _models() -> dict[str, Any]:
    """Schemas of all answers, by name."""
    used = {model for described in ANSWERS.values() for model in (described.whole, described.event) if model is not None}
    pairs: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (model, "validation") for model in sorted(used, key=lambda model: model.__name__)
    ]
    made = models_json_schema(pairs, ref_template=_REF + "{model}")[1]
    return dict(made["$defs"])
