"""POST /messages and /messages/count_tokens: the Messages API, in DeepSeek's reading of it.

Model names that begin with "claude-" are answered by the served model. Web search declarations are dropped. Unknown
betas, cache marks and citations are ignored.
"""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dsv4.server.chat_completions import answer
from dsv4.server.delivery import Delivery
from dsv4.server.requests import read_body
from dsv4.server.service import MESSAGES, ChatService


def messages_router(service: ChatService, delivery: Delivery) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/messages")
    @router.post("/anthropic/v1/messages")
    @router.post("/anthropic/messages")
    async def messages(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        return await answer(service, MESSAGES, request, delivery)

    @router.post("/v1/messages/count_tokens")
    @router.post("/anthropic/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Renders and tokenises only: it never waits for the engine."""
        count = await service.threads.run(partial(service.count_tokens, MESSAGES), await read_body(request))
        return JSONResponse({"input_tokens": count})

    return router
