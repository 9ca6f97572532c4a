"""GET /user/balance: DeepSeek's account balance, so that clients which look at it go on.

There is no account here. The balance is a fixed grant less what the key's recorded requests would have cost, so that
clients which watch the balance show the cost; without a ledger it is the grant.
"""

from __future__ import annotations

import logging
from typing import Any

from anyio import to_thread
from fastapi import APIRouter
from starlette.requests import Request

from dsv4.server.openapi import operation
from dsv4.server.paths import OPENAI_BASES, under
from dsv4.server.schemas import Balance
from dsv4.server.users import key_of
from dsv4.usage.ledger import Ledger
from dsv4.usage.records import masked

GRANT_USD = 1_000_000.0
PATHS = under(OPENAI_BASES, "/user/balance")

logger = logging.getLogger("dsv4.server")


def balance_router(ledger: Ledger | None) -> APIRouter:
    router = APIRouter()

    async def balance(request: Request) -> dict[str, Any]:
        if ledger is None:
            return _balance(0.0)
        try:
            key = masked(key_of(request.scope))
            count, cost = await to_thread.run_sync(ledger.totals, key)
        except Exception as error:  # each database has errors of its own; the balance is no reason to fail a client
            logger.warning("the usage database cannot be read: %s", error)
            return _balance(0.0)
        usage = {"api_key": key, "requests": count, "cost_usd": f"{cost:.6f}"}
        return {**_balance(cost), "usage": {**usage, "dropped_records": ledger.num_dropped}}

    for path in PATHS:
        router.add_api_route(path, balance, methods=["GET"], **operation(None, Balance, tag="account"))
    return router


def _balance(cost: float) -> dict[str, Any]:
    left = f"{max(0.0, GRANT_USD - cost):.2f}"
    info = {"currency": "USD", "total_balance": left, "granted_balance": left, "topped_up_balance": "0.00"}
    return {"is_available": True, "balance_infos": [info]}
