"""Routes of a wire format: POST for an answer, streamed or whole, and POST for a token count."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dsv4.server.delivery import Delivery
from dsv4.server.requests import read_body
from dsv4.server.service import ChatService
from dsv4.server.users import key_of
from dsv4.server.wire_format import WireFormat


def format_router(wire_format: WireFormat, service: ChatService, delivery: Delivery) -> APIRouter:
    router = APIRouter()

    async def answer_request(request: Request) -> Response:
        return await answer(service, wire_format, request, delivery)

    async def count_tokens(request: Request) -> Response:
        return await token_count(service, wire_format, request)

    for path in wire_format.paths:
        router.add_api_route(path, answer_request, methods=["POST"])
    for path in wire_format.count_tokens_paths:
        router.add_api_route(path, count_tokens, methods=["POST"])
    return router


async def answer(service: ChatService, wire_format: WireFormat, request: Request, delivery: Delivery) -> Response:
    """Checks a request and starts its answer, streamed or whole. Raises RequestError before anything is generated."""
    service.engine.check()
    service.engine.check_room()
    prepare = partial(service.prepare, wire_format, key=key_of(request.scope) or None)
    job = await service.threads.run(prepare, await read_body(request))
    return delivery.answer(service, job)


async def token_count(service: ChatService, wire_format: WireFormat, request: Request) -> Response:
    """Renders and tokenizes only: it never waits for the engine."""
    count = await service.threads.run(partial(service.count_tokens, wire_format), await read_body(request))
    return JSONResponse(wire_format.token_count(count))
