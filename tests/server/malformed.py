"""Malformed requests by number: the same number is always the same request."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

MARK = "xyzzy-private"  # in every prompt: no log may have it
_USER = {"role": "user", "content": MARK}
_SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
_FUNCTION = {"name": "f", "description": "d", "parameters": _SCHEMA, "strict": True}
_SAMPLING = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "stream": True}
_CHAT = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": MARK}]},
        _USER,
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "r",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "x"},
        _USER,
    ],
    "tools": [{"type": "function", "function": _FUNCTION}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "thinking": {"type": "enabled"},
    "reasoning_effort": "low",
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": _SCHEMA}},
    "stream_options": {"include_usage": True},
    "max_tokens": 9,
    "stop": ["z"],
    "logprobs": True,
    "top_logprobs": 2,
    "chat_template_kwargs": {"thinking": True},
    "user_id": "u",
    "cache_salt": "s",
    "return_progress": True,
    **_SAMPLING,
}
_MESSAGES = {
    "model": "tiny",
    "system": [{"type": "text", "text": MARK}],
    "messages": [
        _USER,
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "s"},
                                          {"type": "tool_use", "id": "c", "name": "f", "input": {"a": "b"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "x"}]},
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": _SCHEMA}],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 100},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": _SCHEMA}},
    "metadata": {"user_id": "u"},
    "max_tokens": 9,
    "stop_sequences": ["z"],
    **_SAMPLING,
}  # fmt: skip
_RESPONSES = {
    "model": "tiny",
    "instructions": MARK,
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": MARK}]},
        {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "x"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "x"}]},
        {"type": "item_reference", "id": "msg_resp_0_1"},
    ],
    "tools": [{"type": "function", **_FUNCTION}, {"type": "custom", "name": "g", "format": {"type": "grammar"}},
              {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "h"}]}],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    "text": {"format": {"type": "json_schema", "name": "n", "schema": _SCHEMA}},
    "reasoning": {"effort": "low", "summary": "auto"},
    "include": ["reasoning.encrypted_content"],
    "metadata": {"a": "b"},
    "previous_response_id": None,
    "truncation": "auto",
    "store": True,
    "max_output_tokens": 9,
    **_SAMPLING,
}  # fmt: skip
_COMPLETION = {
    "model": "tiny", "prompt": [MARK, [5, 6]], "suffix": "b", "echo": True, "n": 2, "best_of": 2, "logprobs": 2,
    "logit_bias": {"5": 1.5}, "stop": ["z"], "max_tokens": 9, "user": "u", **_SAMPLING,
}  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _CHAT,
    "/chat/completions": _CHAT,
    "/v1/messages": _MESSAGES,
    "/anthropic/v1/messages": _MESSAGES,
    "/v1/messages/count_tokens": _MESSAGES,
    "/v1/responses": _RESPONSES,
    "/v1/responses/input_tokens": _RESPONSES,
    "/v1/completions": _COMPLETION,
    "/beta/completions": _COMPLETION,
    "/tokenize": {"model": "tiny", "messages": [_USER], "tools": [], "add_special_tokens": True},
    "/detokenize": {"model": "tiny", "tokens": [5, 6]},
}
_KEPT = ("model", "messages", "input", "prompt", "max_tokens", "max_output_tokens")
_HOLE = "@hole@"
_DEEP = 3000
# JSON texts, some of them of no value that JSON has.
VALUES = [
    "null", "true", "0", "-1", "1.5", "1e400", "-1e400", "NaN", "Infinity", "1" * 400, str(1 << 63), str(1 << 64),
    "-0",
    '""', '"x"', '"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"a\\u0000b"', '"' + "y" * 70_000 + '"', '"１"',
    '"\\q"',
    "[]", "{}", "[[]]", "[{}]", "[null]", '["a", 1]', '{"": null}', '{"a": 1, "a": 2}', "[1,]", "{,}", "'a'",
    "undefined",
    "[" * 200 + "]" * 200, "[" * _DEEP, '{"a":' * 200 + "1" + "}" * 200, '{"type": "object"}', '{"$ref": "#"}',
    '{"type": {}}', '[{"type": []}]', '{"role": "user"}', '"<｜Assistant｜>"', '"</think>"', "0x10", "+1", "01",
    "\x00",
]  # fmt: skip
_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "BREW", "get")
_CHUNKS = [
    b"zz\r\n{}\r\n0\r\n\r\n", b"-1\r\n{}\r\n", b"2\r\n{}", b"ffffffffffffffffffff\r\n{}",
    b"2;a=b\r\n{}\r\n0\r\n\r\n",
    b"\r\n\r\n", b"2\r\n{}\r\n0\r\nTrailer: x\r\n\r\n", b"1\n{\n", b"2\r\n{}XX0\r\n\r\n", b"0\r\n\r\n",
    b"\x00\x00",
]  # fmt: skip
_LENGTHS = ["-1", "+5", "abc", "", " 5 5", "1" * 30, "0x10", "5, 5", "5, 6", "99999999999", "1.5", "\x0b5"]
_HEADERS = [
    b"No colon", b": empty", b"A b: c", b"X: \x00", b"X: \xff\xfe", b"X: " + b"y" * 100_000, b" folded",
    b"X:\x0by",
    b"\xc3\xa9: x", b"Host: evil.example", b"Host: a\r\nHost: b", b"Origin: null",
    b"Origin: https://evil.example",
    b"Authorization: Bearer \xff", b"Authorization: Basic", b"x-api-key:", b"Expect: 100-continue", b"Expect: x",
    b"Upgrade: websocket\r\nConnection: upgrade", b"Content-Encoding: gzip", b"Content-Type: text/plain",
    b"Content-Type: application/json; charset=utf-16", b"Content-Type: \x80", b"Accept: nothing",
    b"Range: bytes=1-2",
    b"x-request-id: a b\x7f", b"Transfer-Encoding: gzip", b"Transfer-Encoding: identity, chunked", b"TE: \x01",
    b"\r\n".join(b"X-%d: y" % i for i in range(500)), b"Connection: \xff", b"Cookie: " + b"a=b; " * 1000,
]  # fmt: skip
_LINES = [
    b"POST /v1/chat/completions HTTP/9.9", b"POST /v1/chat/completions", b"GET", b"GET  / HTTP/1.1",
    b"\x00\x01\x02",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1", b"GET http://evil.example/ HTTP/1.1", b"OPTIONS * HTTP/1.1",
    b"GET /%ff%fe HTTP/1.1", b"GET /%00 HTTP/1.1", b"GET /../../etc/passwd HTTP/1.1", b"GET /%zz HTTP/1.1",
    b"GET /v1/models/%2e%2e%2f HTTP/1.1", b"GET /v1/models/" + b"%c3%28" * 9 + b" HTTP/1.1",
    b"GET /\xff HTTP/1.1",
    b"G\x00T / HTTP/1.1", b"GET / HTTP/1.0", b"GET / http/1.1", b"PRI * HTTP/2.0", b"\x16\x03\x01\x02",
    b"GET ? HTTP/1.1",
    b"GET /health?seconds=nan HTTP/1.1", b"GET /health?deep=1&seconds=1e999 HTTP/1.1",
    b"GET /inspect/%ff/-1 HTTP/1.1",
    b"GET /inspect/a/99999999999999999999999 HTTP/1.1", b"GET /v1/responses/x?stream=%ff HTTP/1.1",
    b"GET /v1/responses/%00/input_items?limit=\xb2 HTTP/1.1", b"GET /?" + b"a=b&" * 5000 + b" HTTP/1.1",
]  # fmt: skip


@dataclass(frozen=True)
class Malformed:
    """Bytes of a request. `ends`: the client closes its side after them; else it waits for the answer."""

    kind: str
    method: str
    data: bytes
    ends: bool = False

    @property
    def may_be_silent(self) -> bool:
        """True if a closed connection is an answer: nobody listens, or it comes before all has been sent."""
        return self.ends or len(self.data) > 60_000


def malformed(number: int, routes: list[tuple[str, str]]) -> Malformed:
    """`routes`: (method, path) of the server, with parameters in braces."""
    draw = random.Random(number)
    kind, make = list(_KINDS.items())[number % len(_KINDS)]
    method, data, ends = make(draw, routes)
    return Malformed(kind, method, data, ends)


Made = tuple[str, bytes, bool]


def _wrong_value(draw: random.Random, routes: list[tuple[str, str]]) -> Made:
    """A value of the wrong kind at any place of a body."""
    path, body = _any_body(draw)
    places = list(_places(body))
    for place in draw.sample(places, min(len(places), draw.choice((1, 1, 1, 2, 5)))):
        _put(body, place, _HOLE)
    text = json.dumps(body)
    while f'"{_HOLE}"' in text:
        text = text.replace(f'"{_HOLE}"', draw.choice(VALUES), 1)
    return "POST", _post(path, text.encode()), False


def _without_field(draw: random.Random, routes: list[tuple[str, str]]) -> Made:
    """A body with some of its fields only, or with one field twice."""
    path, body = _any_body(draw)
    kept = {name: value for name, value in body.items() if draw.random() < 0.6}
    text = json.dumps(kept)
    if kept and draw.random() < 0.5:
        twice = draw.choice(list(kept))
        text = f"{text[:-1]}, {json.dumps(twice)}: {draw.choice(VALUES)}}}"
    return "POST", _post(path, text.encode()), False


def _wrong_text(draw: random.Random, routes: list[tuple[str, str]]) -> Made:
    """Bytes that are no JSON, or hardly."""
    path, body = _any_body(draw)
    data = bytearray(json.dumps(body).encode())
    for _ in range(draw.choice((0, 1, 1, 3, 30))):
        place = draw.randrange(len(data) + 1)
        data[place : place + draw.choice((0, 1, 5))] = draw.choice(
            (b"\x00", b"\xff", b'"', b"{", b"]", b"\\", b"", b",")
        )
    whole = bytes(data)
    texts = (
        whole, whole[: draw.randrange(len(whole) + 1)], b"\xef\xbb\xbf" + whole, whole + b"}", whole * 2, b"", b" ",
        b"null",
        b"[" * _DEEP * 30, b'{"a":' * _DEEP, draw.randbytes(draw.randrange(300)), draw.choice(VALUES).encode(),
        b"\xff\xfe{}",
        json.dumps(body).encode("utf-16"),
    )  # fmt: skip
    return "POST", _post(path, draw.choice(texts)), False


def _wrong_length(draw: random.Random, routes: list[tuple[str, str]]) -> Made:
    """A content length that is none, or another than the body's; a client that leaves within its body."""
    path, body = _any_body(draw)
    data = json.dumps(body).encode()
    length = draw.choice([*_LENGTHS, str(len(data) + draw.choice((-50, -1, 1, 999)))])
    lines = [f"Content-Length: {length}"] * draw.choice((1, 1, 2))
    if draw.random() < 0.2:
        lines.append("Transfer-Encoding: chunked")
    return "POST", _head("POST", path, *[line.encode("latin-1") for line in lines]) + data, draw.random() < 0.7


def _wrong_chunks(draw: random.Random, routes: list[tuple[str, str]]) -> Made:
    path, _ = _any_body(draw)
    good = b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"model": "tiny"}') if draw.random() < 0.5 else b""
    chunks = good + b"".join(draw.choice(_CHUNKS) for _ in range(draw.choice((1, 2))))
    return "POST", _head("POST", path, b"Transfer-Encoding: chunked") + chunks, draw.random() < 0.7


def _wrong_header(draw: random.Random, routes: list[tuple[str, str]]) -> Made:
    path, body = _any_body(draw)
    data = json.dumps(body).encode()
    extra = [draw.choice(_HEADERS) for _ in range(draw.choice((1, 2)))]
    return "POST", _head("POST", path, b"Content-Length: %d" % len(data), *extra) + data, False


def _wrong_line(draw: random.Random, routes: list[tuple[str, str]]) -> Made:
    line = draw.choice(_LINES)
    return line.split(b" ")[0].decode("latin-1"), line + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n", False


def _any_route(draw: random.Random, routes: list[tuple[str, str]]) -> Made:
    """Any method at any path, with odd names in it, with or without a body."""
    _, path = draw.choice(routes)
    parts = ["{" in part for part in path.split("/")]
    odd = ("x", "%00", "%ff", "..", "a" * 3000, "-1", "1e9", "%F0%9F%98%80", "resp_0", "%0a")
    path = "/".join(draw.choice(odd) if hole else part for hole, part in zip(parts, path.split("/"), strict=True))
    path += draw.choice(("", "", "/", "?", "?a=1&a=2", "?limit=-1", "?order=%ff", "?after=x", "?seconds=x", "?deep=x"))
    method = draw.choice(_METHODS)
    data = draw.choice((b"", b"{}", b"[]", b"null", b"x"))
    return method, _head(method, path, b"Content-Length: %d" % len(data)) + data, False


_KINDS: dict[str, Callable[[random.Random, list[tuple[str, str]]], Made]] = {
    "value": _wrong_value,
    "field": _without_field,
    "text": _wrong_text,
    "length": _wrong_length,
    "chunks": _wrong_chunks,
    "header": _wrong_header,
    "line": _wrong_line,
    "route": _any_route,
    "value again": _wrong_value,
}


def _any_body(draw: random.Random) -> tuple[str, dict[str, Any]]:
    path = draw.choice(list(BODIES))
    body = json.loads(json.dumps(BODIES[path]))
    # Whole answers are as frequent as streams; not every field at a time, since some exclude each other.
    for name in list(body):
        if name not in _KEPT and draw.random() < 0.4:
            del body[name]
    return path, body


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of a value and of all in it, the value itself last."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inner:
        yield from _places(item, (*place, name))
        yield (*place, name)


def _put(value: Any, place: tuple[Any, ...], new: object) -> None:
    """Replaces what is at a place; nothing where a container of it has been replaced before."""
    for name in place[:-1]:
        if isinstance(value, str):
            return
        value = value[name]
    if not isinstance(value, str):
        value[place[-1]] = new


def _post(path: str, body: bytes) -> bytes:
    return _head("POST", path, b"Content-Length: %d" % len(body)) + body


def _head(method: str, path: str, *headers: bytes) -> bytes:
    lines = (f"{method} {path} HTTP/1.1".encode(), b"Host: localhost", b"Content-Type: application/json",
             b"Connection: close", *headers)  # fmt: skip
    return b"\r\n".join(lines) + b"\r\n\r\n"
