"""POST /tokenize and /detokenize, GET /tokenizer_info."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from kvloom.server.context import context_of
from kvloom.server.schema.tokens import DetokenizeBody, TokenizeBody

router = APIRouter()


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request) -> Response:
    """Tokens of a prompt, or of a conversation through the chat template."""
    context = context_of(request)
    context.check_model(body.model)
    if body.messages is not None:
        tokens = (await context.prompts.chat(body.conversation(body.messages))).tokens
    else:
        tokens = await context.prompts.text(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    texts = await context.prompts.spelled(tokens) if body.return_token_strs else None
    longest = context.client.model.max_model_len
    # A response of its own: FastAPI would look at every token in Python.
    return JSONResponse({"count": len(tokens), "max_model_len": longest, "tokens": tokens, "token_strs": texts})


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request) -> dict[str, str]:
    """Text of tokens, special ones included."""
    context = context_of(request)
    context.check_model(body.model)
    context.prompts.check(body.tokens, "tokens")
    return {"prompt": await context.prompts.decode(body.tokens, skip_special_tokens=False)}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """What a client needs to write prompts that this model reads, under the names of tokenizer_config.json, as in vLLM."""
    context = context_of(request)
    tokenizer = context.client.tokenizer
    bos, eos = tokenizer.bos_id, next(iter(tokenizer.eos_ids), None)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.special_text(bos) or None,
        "eos_token": tokenizer.special_text(eos) or None,
        "model_max_length": context.client.model.max_model_len,
        "chat_template": tokenizer.chat_template,
    }
