"""create_app: the ASGI application with every route, over one engine or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from dsv4.conversation.said_turns import SaidTurns
from dsv4.engine.interface import Engine
from dsv4.server import formats, openapi
from dsv4.server.auth import ApiKeyMiddleware
from dsv4.server.balance import balance_router
from dsv4.server.config import ServerConfig
from dsv4.server.delivery import Delivery
from dsv4.server.drain import Drain, DrainMiddleware
from dsv4.server.endpoint import format_router
from dsv4.server.error_responses import UnexpectedErrorMiddleware, install_error_handlers
from dsv4.server.health import health_router
from dsv4.server.inspection import inspection_router
from dsv4.server.key_limits import KeyLimiter, KeyLimitMiddleware, KeyLimits
from dsv4.server.keys import ApiKey, check_key
from dsv4.server.metrics import metrics_router
from dsv4.server.models import models_router
from dsv4.server.origin import OriginMiddleware, OriginPolicy
from dsv4.server.request_log import RequestIdMiddleware
from dsv4.server.response_routes import responses_router
from dsv4.server.response_store import ResponseStore
from dsv4.server.served_models import ServedModel, ServedModels
from dsv4.server.service import ChatService
from dsv4.server.tokenization import tokenization_router
from dsv4.server.web import chat_routes
from dsv4.usage.ledger import Ledger

KEEP_ALIVE_SECONDS = 10.0


@dataclass(frozen=True)
class Services:
    """Services of an application beside its engines, which it does not close."""

    drain: Drain = field(default_factory=Drain)  # lets the caller shut the server down
    responses: ResponseStore | None = None  # of the Responses API; None: in memory
    ledger: Ledger | None = None  # keeps the usage of every request
    loopback: bool = True  # the listening address is one of this machine alone
    keep_alive_seconds: float = KEEP_ALIVE_SECONDS


def create_app(
    engines: Sequence[Engine], config: ServerConfig | None = None, services: Services | None = None
) -> FastAPI:
    """Create the server's ASGI application, over an engine for each model.

    Of the config it takes what follows after the connection: keys and limits, names, stores, prompts in the log. There
    are no documentation routes: their pages load code from other hosts.
    """
    app = FastAPI(title="dsv4", docs_url=None, redoc_url=None, openapi_url=openapi.PATH)
    config, services = config or ServerConfig(), services or Services()
    own_limits = {str(key): key.limits for key in config.api_keys if isinstance(key, ApiKey)}
    limits = KeyLimits(config.max_requests_per_key, config.tokens_per_minute_per_key)
    limiter = KeyLimiter(limits, own_limits)
    said = SaidTurns(config.turn_memory_bytes)
    served = [ServedModel.of(engine, said) for engine in engines]
    models = ServedModels(served, config.model_aliases, config.retired_models)
    service = ChatService(models, config.share_prefixes, services.ledger, limiter, config.log_prompts)
    delivery = Delivery(services.keep_alive_seconds, services.drain)
    responses = services.responses or ResponseStore(max_bytes=config.response_store_bytes)
    install_error_handlers(app)
    # Middleware added last runs first.
    if config.api_keys:
        app.add_middleware(KeyLimitMiddleware, limiter=limiter)
        app.add_middleware(ApiKeyMiddleware, api_keys=[check_key(key, "api_keys") for key in config.api_keys])
    app.add_middleware(DrainMiddleware, drain=services.drain)
    app.add_middleware(UnexpectedErrorMiddleware)
    policy = OriginPolicy(
        bound_host=config.host,
        loopback=services.loopback,
        needs_key=bool(config.api_keys),
        allowed_hosts=tuple(config.allowed_hosts),
        allowed_origins=tuple(config.allowed_origins),
    )
    if policy.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=policy.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "x-should-retry", "x-request-id"],
        )
    app.add_middleware(OriginMiddleware, policy=policy)
    app.add_middleware(RequestIdMiddleware)
    for wire_format in formats.FORMATS:
        app.include_router(format_router(wire_format, service, delivery))
    app.include_router(inspection_router(service, delivery))
    app.include_router(responses_router(service, delivery, responses))
    app.include_router(models_router(service))
    app.include_router(balance_router(services.ledger))
    app.include_router(tokenization_router(service))
    app.include_router(health_router(models, services.drain))
    app.include_router(metrics_router({model.name: model.engine.metrics for model in models}))
    app.router.routes.extend(chat_routes())
    openapi.install_openapi(app)
    return app
