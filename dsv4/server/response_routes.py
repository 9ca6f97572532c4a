"""Routes of the Responses API: POST for an answer or a token count, and stored responses to read, list and delete."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from anyio import to_thread
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from dsv4.server.delivery import Delivery
from dsv4.server.endpoint import answer, token_count
from dsv4.server.errors import RequestError
from dsv4.server.openapi import operation
from dsv4.server.response_schemas import (
    DeletedResponse,
    InputItems,
    InputTokensAnswer,
    InputTokensBody,
    ResponseAnswer,
    ResponsesBody,
)
from dsv4.server.response_store import NotStoredError, OwnResponses, ResponseStore
from dsv4.server.responses import PATHS, Responses
from dsv4.server.service import ChatService
from dsv4.server.unchecked_json import Json
from dsv4.server.users import key_of
from dsv4.server.wishes import invalid, unavailable

_MAX_LISTED = 100
_TAG = "responses"
T = TypeVar("T")


def responses_router(service: ChatService, delivery: Delivery, store: ResponseStore) -> APIRouter:
    router = APIRouter()

    def own(request: Request) -> OwnResponses:
        """The stored responses of the request's API key."""
        key = key_of(request.scope)
        return OwnResponses(store, hashlib.sha256(key.encode()).hexdigest() if key else "")

    async def create(request: Request) -> Response:
        return await answer(service, Responses(own(request)), request, delivery)

    async def count_tokens(request: Request) -> Response:
        return await token_count(service, Responses(own(request)), request)

    async def retrieve(request: Request, response_id: str) -> dict[str, Any]:
        if request.query_params.get("stream", "false") != "false":
            raise unavailable("stream", "a stored response is sent as a whole")
        return (await _stored(own(request).get, response_id)).response

    async def delete(request: Request, response_id: str) -> dict[str, Any]:
        await _stored(own(request).delete, response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    async def cancel(request: Request, response_id: str) -> Response:
        """Only responses that run in the background could be: others end with their connection."""
        await _stored(own(request).get, response_id)
        raise RequestError(400, "Cannot cancel a response that is complete", param="response_id")

    async def input_items(request: Request, response_id: str) -> dict[str, Any]:
        """Items that the response answers, those of the responses before it included."""
        return _page(await _stored(own(request).input_items, response_id), request.query_params)

    add = router.add_api_route
    for path in PATHS:
        one = f"{path}/{{response_id}}"
        add(path, create, methods=["POST"], **operation(ResponsesBody, ResponseAnswer, streams=True, tag=_TAG))
        shown = operation(InputTokensBody, InputTokensAnswer, tag=_TAG)
        add(f"{path}/input_tokens", count_tokens, methods=["POST"], **shown)
        add(one, retrieve, methods=["GET"], **operation(None, ResponseAnswer, tag=_TAG))
        add(one, delete, methods=["DELETE"], **operation(None, DeletedResponse, tag=_TAG))
        add(f"{one}/cancel", cancel, methods=["POST"], **operation(None, ResponseAnswer, tag=_TAG))
        add(f"{one}/input_items", input_items, methods=["GET"], **operation(None, InputItems, tag=_TAG))
    return router


async def _stored(work: Callable[[str], T], response_id: str) -> T:
    """Result of `work` on a stored response. RequestError 404 if there is none."""
    try:
        return await to_thread.run_sync(work, response_id)
    except NotStoredError as error:
        raise RequestError(404, f"Response with id '{error.response_id}' not found", param="response_id") from error


def _page(items: list[Json], query: Mapping[str, str]) -> dict[str, Any]:
    """The part of a list that `limit`, `order` and `after` ask for. RequestError for other values of them."""
    limit, order, after = query.get("limit", "20"), query.get("order", "desc"), query.get("after")
    if not limit.isdecimal() or not 1 <= int(limit) <= _MAX_LISTED:
        raise invalid("limit", limit, f"integers from 1 to {_MAX_LISTED}")
    if order not in ("asc", "desc"):
        raise invalid("order", order, "asc and desc")
    found = items if order == "asc" else items[::-1]
    if after is not None:
        places = [index for index, item in enumerate(found) if item.get("id") == after]
        if not places:
            raise invalid("after", after, "ids of the list's items")
        found = found[places[0] + 1 :]
    page = found[: int(limit)]
    ids = [item.get("id") for item in page] or [None]
    return {
        "object": "list",
        "data": page,
        "first_id": ids[0],
        "last_id": ids[-1],
        "has_more": len(found) > len(page),
    }
