"""POST /chat/completions: DeepSeek's Chat Completions API.

JSON mode and a required or named tool call are asked of the model in its prompt and parsed from its answer; no grammar
holds the model to them. Thinking with a required tool call is refused, as the hosted service does.
"""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from dsv4.server.delivery import Delivery
from dsv4.server.requests import read_body
from dsv4.server.service import CHAT, ChatService, Protocol


def chat_router(service: ChatService, delivery: Delivery) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    @router.post("/chat/completions")
    @router.post("/beta/chat/completions")
    @router.post("/beta/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        return await answer(service, CHAT, request, delivery)

    return router


async def answer(service: ChatService, protocol: Protocol, request: Request, delivery: Delivery) -> Response:
    """Checks a request and starts its answer, streamed or whole. Raises RequestError before anything is generated."""
    service.engine.check()
    service.engine.check_room()
    job = await service.threads.run(partial(service.prepare, protocol), await read_body(request))
    return delivery.answer(service, job)
