"""create_app: the ASGI application with every route, over one engine or several."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from dsv4.conversation.said_turns import MAX_BYTES, SaidTurns
from dsv4.engine.interface import Engine
from dsv4.server import formats, openapi
from dsv4.server.auth import ApiKeyMiddleware
from dsv4.server.balance import balance_router
from dsv4.server.delivery import Delivery
from dsv4.server.drain import Drain, DrainMiddleware
from dsv4.server.endpoint import format_router
from dsv4.server.error_responses import install_error_handlers
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


def create_app(
    engine: Engine | Sequence[Engine],
    *,
    model_name: str | None = None,
    aliases: Sequence[str] = (),
    api_keys: Sequence[str] = (),
    retired_models: bool = False,
    thinking: bool = True,
    share_prefixes: str = "all",
    keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
    origins: OriginPolicy | None = None,
    drain: Drain | None = None,
    responses: ResponseStore | None = None,
    ledger: Ledger | None = None,
    key_limits: KeyLimits | None = None,
    turn_memory_bytes: int = MAX_BYTES,
    log_prompts: bool = False,
) -> FastAPI:
    """Create the server's ASGI application.

    `engine`: one for each model. `model_name`: of the first model (default: the engine's); `aliases`: further names of
    it; `retired_models`: names that the hosted service has retired are known too. With `api_keys` every path except the
    page and /health needs one of the keys. `thinking`: the default for requests that do not set it. `share_prefixes`:
    who shares stored prefixes ("all", "key", "user"). `origins`: the allowed web pages (default: the policy of a server
    on 127.0.0.1). `drain`: lets the caller shut the server down. `responses`: the store of the Responses API (default:
    in memory). `ledger`: keeps every request's usage. The caller closes engines, store and ledger. `key_limits`: of
    every API key that has none of its own. `turn_memory_bytes`: bound on the turns that are remembered, see
    conversation/said_turns.py. `log_prompts`: they are logged, at level INFO. There are no documentation routes: their
    pages load code from other hosts.
    """
    app = FastAPI(title="dsv4", docs_url=None, redoc_url=None, openapi_url=openapi.PATH)
    drain = drain or Drain()
    own_limits = {str(key): key.limits for key in api_keys if isinstance(key, ApiKey)}
    limiter = KeyLimiter(key_limits or KeyLimits(), own_limits)
    engines = engine if isinstance(engine, Sequence) else [engine]
    said = SaidTurns(turn_memory_bytes)
    served = [ServedModel.of(known, None if i else model_name, said) for i, known in enumerate(engines)]
    models = ServedModels(served, aliases, retired_models)
    service = ChatService(models, thinking, share_prefixes, ledger, limiter, log_prompts)
    delivery = Delivery(keep_alive_seconds, drain)
    install_error_handlers(app)
    # Middleware added last runs first.
    if api_keys:
        app.add_middleware(KeyLimitMiddleware, limiter=limiter)
        app.add_middleware(ApiKeyMiddleware, api_keys=[check_key(key, "api_keys") for key in api_keys])
    app.add_middleware(DrainMiddleware, drain=drain)
    policy = origins or OriginPolicy(needs_key=bool(api_keys))
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
    app.include_router(responses_router(service, delivery, responses or ResponseStore()))
    app.include_router(models_router(service))
    app.include_router(balance_router(ledger))
    app.include_router(tokenization_router(service))
    app.include_router(health_router(models, drain))
    app.include_router(metrics_router({model.name: model.engine.metrics for model in models}))
    app.router.routes.extend(chat_routes())
    openapi.install_openapi(app)
    return app
