"""POST /tokenize and /detokenize, in vLLM's shapes: prompts and conversations to token ids, ids to text."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, SkipValidation
from starlette.requests import Request
from starlette.responses import JSONResponse

from dsv4.server.chat_completions import CHAT
from dsv4.server.errors import RequestError
from dsv4.server.foreign_fields import REFUSED, refuse_template
from dsv4.server.openapi import operation
from dsv4.server.pydantic_refusals import read_json_object, validated, wrong_type
from dsv4.server.served_models import ServedModel
from dsv4.server.service import ChatService
from dsv4.server.unchecked_json import are_integers
from dsv4.server.users import key_of
from dsv4.server.wishes import invalid, refuse_wishes

PATHS = ("/tokenize", "/v1/tokenize")
REVERSE_PATHS = ("/detokenize", "/v1/detokenize")
_CONTINUE = "continue_final_message"


class TokenizeBody(BaseModel):
    """A prompt, or messages with the further fields of a Chat Completions request, such as `tools`."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = Field(None, description="Default: the first model")
    prompt: str | None = Field(None, description="Text")
    add_special_tokens: bool | None = Field(None, description="Begin a prompt of text with the begin-of-sentence token")
    messages: list[Any] | None = Field(None, description="Messages as in Chat Completions")
    return_token_strs: bool | None = Field(None, description="Return the text of each token too")
    add_generation_prompt: bool | None = Field(None, description="true: the prompt ends where the answer begins")


class TokenizeAnswer(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    tokens: SkipValidation[list[int]] = Field(description="Token ids, as many as the context has at most")


class DetokenizeAnswer(BaseModel):
    prompt: str


def tokenization_router(service: ChatService) -> APIRouter:
    router = APIRouter()

    async def tokenize_request(request: Request) -> JSONResponse:
        work = partial(tokenize, service, key=key_of(request.scope) or None)
        async with service.bodies.read(request) as body:
            answer = await service.threads.run(work, body)
        return JSONResponse(answer.model_dump())

    async def detokenize_request(request: Request) -> JSONResponse:
        async with service.bodies.read(request) as body:
            answer = await service.threads.run(partial(detokenize, service), body)
        return JSONResponse(answer.model_dump())

    shown = operation(TokenizeBody, TokenizeAnswer, tag="tokens")
    for path in PATHS:
        router.add_api_route(path, tokenize_request, methods=["POST"], **shown)
    shown = operation(DetokenizeBody, DetokenizeAnswer, tag="tokens")
    for path in REVERSE_PATHS:
        router.add_api_route(path, detokenize_request, methods=["POST"], **shown)
    return router


def tokenize(service: ChatService, body: bytes, key: str | None = None) -> TokenizeAnswer:
    """Token ids of a request's prompt, of any length: what a chat of the same key reads.

    RequestError 400 names what is wrong.
    """
    request = read_json_object(body)
    fields = validated(TokenizeBody, request)
    served = service.find(fields.model)
    if (fields.prompt is None) == (fields.messages is None):
        raise RequestError(400, "Give either prompt or messages", param="prompt")
    refuse_template(request)
    refuse_wishes(request, {_CONTINUE: REFUSED[CHAT.name][_CONTINUE]})
    if fields.prompt is not None:
        tokens = served.conversation.prompts.tokenizer.encode(fields.prompt)
        if fields.add_special_tokens is not False:
            tokens.insert(0, served.engine.llm.config.bos_token_id)
    else:
        chat = CHAT.read(json.dumps(request | {"model": fields.model or served.name}).encode(), service.options)
        tokens = chat.prompt_token_ids(service.conversation(chat, key))
    texts = [_text(served, token) for token in tokens] if fields.return_token_strs else None
    limit = served.conversation.max_model_len
    return TokenizeAnswer(count=len(tokens), max_model_len=limit, tokens=tokens, token_strs=texts)


def detokenize(service: ChatService, body: bytes) -> DetokenizeAnswer:
    """Text of a request's token ids, special tokens as they are spelled. RequestError 400 names what is wrong."""
    fields = validated(DetokenizeBody, read_json_object(body))
    served = service.find(fields.model)
    tokenizer, most = served.conversation.prompts.tokenizer, served.conversation.max_model_len
    if not are_integers(fields.tokens):
        raise wrong_type("tokens", fields.tokens, "a list of token ids, each a valid integer")
    if len(fields.tokens) > most:
        raise RequestError(400, f"tokens has {len(fields.tokens)} elements; allowed: {most}", param="tokens")
    for place, token in enumerate(fields.tokens):
        if not 0 <= token < tokenizer.vocab_size:
            raise invalid(f"tokens[{place}]", token, f"token ids in [0, {tokenizer.vocab_size - 1}]")
    return DetokenizeAnswer(prompt=tokenizer.decode(fields.tokens))


def _text(served: ServedModel, token: int) -> str:
    return served.conversation.prompts.tokenizer.decode([token])
