"""GET /inspect/ID and /inspect/ID/POSITION: what the model attended to and which experts ran, for a recent answer.

ID is the answer's own, as in `id` of Chat Completions. The first names the answer's tokens, the second traces one:
POSITION counts from the prompt's first token, and the trace is of the computation that read the token there and chose
the next one. Traces are computed anew by `AsyncEngine.trace`, one at a time; requests go on meanwhile.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dsv4.config import COMPRESSION_KINDS, WINDOW
from dsv4.engine.interface import MAX_TRACED_TOKENS
from dsv4.model.token_trace import LayerTrace, TokenTrace
from dsv4.server.delivery import Delivery, JsonWhenReady
from dsv4.server.errors import RequestError, retry_after
from dsv4.server.key_limits import BUSY_SECONDS
from dsv4.server.openapi import operation
from dsv4.server.recent_answers import RecentAnswer
from dsv4.server.schemas import Inspection, TracedToken
from dsv4.server.served_models import ServedModel
from dsv4.server.service import ChatService
from dsv4.server.unchecked_json import Json
from dsv4.server.users import key_of
from dsv4.tokenizer import Tokenizer

DIGITS = 6  # of weights and scores
MAX_TRACES = 4  # that wait or run: an engine computes one at a time


class Traces:
    """The clients whose traces wait or run. Belongs to one event loop."""

    def __init__(self) -> None:
        self._clients: set[str] = set()

    @contextlib.contextmanager
    def place(self, client: str) -> Generator[None, None, None]:
        """Context of a client's trace. RequestError 429 if another of its traces is open, 503 if too many are."""
        if client in self._clients:
            message = "A token is being traced for you. Please wait for its trace to end."
            raise RequestError(429, message, headers=retry_after(BUSY_SECONDS))
        if len(self._clients) >= MAX_TRACES:
            message = f"{MAX_TRACES} tokens are being traced, which is the most at a time"
            raise RequestError(503, message, headers=retry_after(BUSY_SECONDS))
        self._clients.add(client)
        try:
            yield
        finally:
            self._clients.remove(client)


def inspection_router(service: ChatService, delivery: Delivery) -> APIRouter:
    router = APIRouter()
    traces = Traces()

    def find(request: Request, answer_id: str) -> RecentAnswer:
        answer = service.recent.find(answer_id, key_of(request.scope))
        if answer is None:
            raise RequestError(404, f"The server no longer has the tokens of answer {answer_id!r}; ask again")
        if answer.num_tokens > MAX_TRACED_TOKENS:
            message = f"Prompt and answer have {answer.num_tokens} tokens; the inspector takes {MAX_TRACED_TOKENS}"
            raise RequestError(400, message)
        return answer

    @router.get("/inspect/{answer_id}", **operation(None, Inspection, tag="inspector"))
    async def inspect(request: Request, answer_id: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        """The answer's tokens, the model's shape, and drafts."""
        answer = find(request, answer_id)
        return JSONResponse(_summary(service.models.find(answer.model), answer_id, answer))

    @router.get("/inspect/{answer_id}/{position}", **operation(None, TracedToken, tag="inspector"))
    async def inspect_token(  # pyright: ignore[reportUnusedFunction]
        request: Request, answer_id: str, position: str
    ) -> Response:
        """The trace of one token."""
        answer = find(request, answer_id)
        if not position.isdecimal() or int(position) >= answer.num_tokens:
            raise RequestError(400, f"position is {position!r}; allowed: 0 to {answer.num_tokens - 1}")
        served = service.models.find(answer.model)
        token_ids = [*answer.prompt, *answer.answer][: int(position) + 1]

        async def trace() -> str:
            with traces.place(_client(request)):
                if service.limiter is not None and (key := key_of(request.scope)):
                    service.limiter.take(key, len(token_ids))  # as those of a prompt
                try:
                    found = await served.engine.trace(token_ids)
                except ValueError as error:
                    raise RequestError(400, str(error)) from error
            return json.dumps(_trace(found, served.conversation.vocabulary.tokenizer), separators=(",", ":"))

        return JsonWhenReady(trace, delivery)

    return router


def _client(request: Request) -> str:
    """Whose trace it is: the key's, or without keys that of the client's address."""
    return key_of(request.scope) or (request.client.host if request.client is not None else "")


def _summary(served: ServedModel, answer_id: str, answer: RecentAnswer) -> Json:
    config = served.engine.llm.config
    tokenizer = served.conversation.vocabulary.tokenizer
    ratios = config.compress_ratios[: config.num_hidden_layers]
    return {
        "id": answer_id,
        "prompt_tokens": len(answer.prompt),
        "cached_tokens": answer.cached_tokens,
        "answer_tokens": len(answer.answer),
        "pieces": pieces(tokenizer, [*answer.prompt, *answer.answer]),
        "window": WINDOW,
        "layers": [COMPRESSION_KINDS[ratio].name for ratio in ratios],
        "index_topk": config.index_topk,
        "num_experts": config.n_routed_experts,
        "experts_per_token": config.num_experts_per_tok,
        "accepted_drafts": answer.accepted,
        "num_draft_tokens": answer.num_draft_tokens,
        "num_accepted_tokens": len(answer.accepted),
    }


def pieces(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str]:
    """Text of each token; a character of several tokens stands at its last."""
    stream = tokenizer.decode_stream()
    return [stream.push(token) if token < tokenizer.vocab_size else "" for token in token_ids]


def _trace(trace: TokenTrace, tokenizer: Tokenizer) -> Json:
    return {
        "position": trace.position,
        "layers": [_layer(layer) for layer in trace.layers],
        "next_tokens": [
            {"id": token, "text": "".join(pieces(tokenizer, [token])), "probability": round(value, DIGITS)}
            for token, value in trace.next_tokens
        ],
        "cache_bytes": trace.cache_bytes,
    }


def _layer(layer: LayerTrace) -> Json:
    """A layer, its entries by column."""
    entries: dict[str, list[Any]] = {
        "index": [entry.index for entry in layer.entries],
        "start": [entry.start for entry in layer.entries],
        "stop": [entry.stop for entry in layer.entries],
        "weight": [round(entry.weight, DIGITS) for entry in layer.entries],
        "score": [None if entry.score is None else round(entry.score, DIGITS) for entry in layer.entries],
    }
    return {
        "kind": layer.kind,
        "window_start": layer.window_start,
        "window": [round(weight, DIGITS) for weight in layer.window],
        "entries": entries,
        "num_visible": layer.num_visible,
        "sink": round(layer.sink, DIGITS),
        "experts": layer.experts,
        "expert_weights": [round(weight, DIGITS) for weight in layer.expert_weights],
        "hashed": layer.hashed,
    }
