"""Bodies of requests: the bound on all that are open together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from starlette.requests import Request
from starlette.types import Message

from dsv4.server.errors import RequestError
from dsv4.server.requests import Bodies

CHAT = "/v1/chat/completions"


def request_of(parts: Iterator[bytes]) -> Request:
    async def receive() -> Message:
        part = next(parts, None)
        return {"type": "http.request", "body": part or b"", "more_body": part is not None}

    return Request({"type": "http", "method": "POST", "path": CHAT, "headers": []}, receive)


def test_bodies_share_a_bound_and_give_their_room_back() -> None:
    async def read() -> None:
        bodies = Bodies(max_bytes=10)
        async with bodies.read(request_of(iter([b"abc", b"defg"]))) as first:
            assert first == b"abcdefg"
            with pytest.raises(RequestError, match="Open requests hold 10 bytes, of 10 at most") as refused:
                async with bodies.read(request_of(iter([b"abc", b"d"]))):
                    pass
            assert refused.value.status == 503 and refused.value.headers["Retry-After"] == "1"
            async with bodies.read(request_of(iter([b"abc"]))) as third:
                assert third == b"abc"
        for _ in range(2):
            async with bodies.read(request_of(iter([b"0123456789"]))) as last:
                assert len(last) == 10

    asyncio.run(read())


def test_the_server_counts_bodies_only_while_they_are_read(serve, model, monkeypatch) -> None:
    """Many requests after another, errors among them, and one at a time: each has the whole room."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 600}]}
    monkeypatch.setattr("dsv4.server.service.Bodies", lambda: Bodies(1000))
    with serve(model) as served:
        http = served.http()
        assert http.post(CHAT, content=b"x" * 2000).status_code == 503
        for _ in range(3):
            assert http.post("/tokenize", json={"model": "tiny", "prompt": "y" * 600}).status_code == 200
            assert http.post(CHAT, json=body | {"temperature": 9}).status_code == 400
            assert http.post(CHAT, json=body).status_code == 200
