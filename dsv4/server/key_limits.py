"""Limits per API key: requests at a time, and tokens per minute. Who is over them is answered 429 with Retry-After."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv4.server.error_responses import error_response
from dsv4.server.errors import RequestError, retry_after
from dsv4.server.users import key_of

# POST requests that compute nothing with a model: editors count tokens dozens of times at once.
_FREE = ("/count_tokens", "/input_tokens", "/tokenize", "/detokenize", "/cancel")
BUSY_SECONDS = 1.0  # after which a key with all its requests open may try again


@dataclass(frozen=True)
class KeyLimits:
    """None: no limit."""

    max_requests: int | None = None  # at a time
    tokens_per_minute: int | None = None  # of prompts and answers together

    def __post_init__(self) -> None:
        for name in ("max_requests", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} of an API key is {value}; allowed: 1 or more")


@dataclass
class _Account:
    limits: KeyLimits
    num_requests: int = 0
    tokens: float = 0.0  # that may still be used; below 0 after an answer that took more
    counted_at: float = field(default_factory=time.monotonic)


class KeyLimiter:
    """Accounts of the keys. Safe from any thread.

    A key has a minute's tokens at most, which come back evenly. A request is let in while there are any; its tokens are
    taken as they are known, those of its prompt first: an answer is never cut off.
    """

    def __init__(
        self, limits: KeyLimits, own: Mapping[str, KeyLimits], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`own`: limits of single keys, each instead of the same one of `limits`."""
        self._limits, self._own, self._clock = limits, own, clock
        self._accounts: dict[str, _Account] = {}
        self._lock = threading.Lock()

    def enter(self, key: str) -> None:
        """Begins a request of a key. RequestError 429 if the key is over a limit."""
        with self._lock:
            account = self._account(key)
            most, rate = account.limits.max_requests, account.limits.tokens_per_minute
            if most is not None and account.num_requests >= most:
                raise RequestError(
                    429,
                    f"Your current concurrency is {account.num_requests + 1}, which exceeds your concurrency limit of"
                    f" {most}. Please wait for one of your requests to end.",
                    headers=retry_after(BUSY_SECONDS),
                )
            if rate is not None and account.tokens <= 0:
                raise RequestError(
                    429,
                    f"Rate limit reached: your key may use {rate} tokens per minute. Please slow down.",
                    headers=retry_after((1 - account.tokens) * 60 / rate),
                )
            account.num_requests += 1

    def leave(self, key: str) -> None:
        """Ends a request that `enter` has let in."""
        with self._lock:
            self._accounts[key].num_requests -= 1

    def take(self, key: str, tokens: int) -> None:
        """Takes tokens that a request of the key has used."""
        with self._lock:
            self._account(key).tokens -= tokens

    def _account(self, key: str) -> _Account:
        now = self._clock()
        account = self._accounts.get(key)
        if account is None:
            own = self._own.get(key, KeyLimits())
            limits = KeyLimits(
                own.max_requests or self._limits.max_requests, own.tokens_per_minute or self._limits.tokens_per_minute
            )
            account = self._accounts[key] = _Account(limits, tokens=limits.tokens_per_minute or 0, counted_at=now)
        rate = account.limits.tokens_per_minute
        if rate is not None:
            account.tokens = min(float(rate), account.tokens + (now - account.counted_at) * rate / 60)
        account.counted_at = now
        return account


class KeyLimitMiddleware:
    """Counts the open requests of each key that compute: POST, and traces. Runs behind the check of keys."""

    def __init__(self, app: ASGIApp, limiter: KeyLimiter) -> None:
        self.app = app
        self.limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = key_of(scope) if scope["type"] == "http" and _computes(scope) else ""
        if not key:
            await self.app(scope, receive, send)
            return
        try:
            self.limiter.enter(key)
        except RequestError as refused:
            await error_response(refused, scope["path"])(scope, receive, send)
            return
        with contextlib.ExitStack() as request:
            request.callback(self.limiter.leave, key)

            async def send_and_leave(message: Message) -> None:
                # Before the last part: a client that has its answer may ask again at once.
                if message["type"] == "http.response.body" and not message.get("more_body", False):
                    request.close()
                await send(message)

            await self.app(scope, receive, send_and_leave)


def _computes(scope: Scope) -> bool:
    """True for a POST request but those that are free, and for one to /inspect/ID/POSITION."""
    path: str = scope["path"]
    if scope["method"] == "POST":
        return not path.endswith(_FREE)
    return path.startswith("/inspect/") and path.count("/") > 2
