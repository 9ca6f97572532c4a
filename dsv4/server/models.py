"""GET /models and /models/{id}: one response shape for both OpenAI's and Anthropic's SDKs."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from dsv4.server.errors import RequestError
from dsv4.server.hosted_limits import MAX_TOKENS
from dsv4.server.model_names import without_context_suffix
from dsv4.server.openapi import operation
from dsv4.server.paths import ANTHROPIC_BASES, OPENAI_BASES, under
from dsv4.server.schemas import Model, ModelList
from dsv4.server.served_models import ServedModel
from dsv4.server.service import ChatService

PATHS = under((*OPENAI_BASES, "/anthropic/v1"), "/models")
_ANTHROPIC = under(ANTHROPIC_BASES, "/models/")


def models_router(service: ChatService) -> APIRouter:
    router = APIRouter()
    created = int(time.time())
    models = service.models

    def describe(name: str, served: ServedModel) -> dict[str, Any]:
        context = served.conversation.max_model_len
        return {
            "id": name,
            "object": "model",
            "type": "model",
            "owned_by": "dsv4",
            "root": served.name,
            "name": name,
            "display_name": name,
            "created": created,
            "created_at": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "context_window": context,
            "max_output_tokens": min(MAX_TOKENS, context),
            "input_modalities": ["text"],
            "output_modalities": ["text"],
            "effort": {"supported_levels": ["low", "high", "max"], "default_level": "high"},
        }

    async def list_models() -> dict[str, Any]:
        """All names: those of the served models first; `root` of the others says which model answers."""
        names = models.names
        return {
            "object": "list",
            "data": [describe(name, models.find(name)) for name in names],
            "has_more": False,
            "first_id": names[0],
            "last_id": names[-1],
        }

    async def get_model(request: Request, name: str) -> dict[str, Any]:
        """A model by any name that requests to the same base address may use, which may have slashes."""
        if not name:
            return await list_models()
        try:
            served = service.find(name, claude=request.url.path.startswith(_ANTHROPIC))
        except RequestError as error:
            message = f"There is no model {name!r}; the models are {', '.join(models.names)}."
            raise RequestError(404, message) from error
        return describe(without_context_suffix(name), served)

    for path in PATHS:
        router.add_api_route(path, list_models, methods=["GET"], **operation(None, ModelList, tag="models"))
        router.add_api_route(path + "/{name:path}", get_model, methods=["GET"], **operation(None, Model, tag="models"))
    return router
