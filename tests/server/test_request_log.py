"""Ids of requests in answers, errors and the log; JSON lines without keys and prompts."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator

import httpx
import pytest

from dsv4.server.errors import RequestError
from dsv4.server.request_log import JsonFormatter, RequestIdFilter, TextFormatter

from .scripted_model import ScriptedModel

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "a secret prompt"}], "max_tokens": 20}
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"


@pytest.fixture
def log(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """The log of a server, in the form of the test's parameter."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.addFilter(RequestIdFilter())
    handler.setFormatter(request.param())
    requests = logging.getLogger("dsv4.requests")
    root, level = logging.getLogger(), requests.level
    root.addHandler(handler)
    requests.setLevel(logging.INFO)
    yield text
    root.removeHandler(handler)
    requests.setLevel(level)


def test_both_sdks_know_the_id_of_their_request(server) -> None:
    answer = server.openai().chat.completions.create(**BODY)
    assert answer._request_id.startswith("req_")
    message = server.anthropic().messages.create(**BODY)
    assert message._request_id.startswith("req_") and message._request_id != answer._request_id


@pytest.mark.parametrize("path", ["/health", "/nowhere", "/", CHAT])
def test_every_answer_has_an_id_the_clients_own_if_it_is_plain(server, path: str) -> None:
    http: httpx.Client = server.http()
    assert http.get(path, headers={"x-request-id": "trace-7:a.b_c"}).headers["x-request-id"] == "trace-7:a.b_c"
    for bad in ("a b", "x" * 129, 'a"b'):
        assert http.get(path, headers={"x-request-id": bad}).headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("log", [JsonFormatter], indirect=True)
def test_json_lines_have_the_request_and_neither_key_nor_prompt(model, serve, log: io.StringIO) -> None:
    with serve(model, api_keys=["sk-secret-key-0001"]) as served:
        http = served.http(headers={"x-api-key": "sk-secret-key-0001", "x-request-id": "mine"})
        assert http.post(CHAT, json=BODY).status_code == 200
        assert http.post(MESSAGES + "?key=sk-secret-key-0001", json=BODY | {"temperature": 9}).status_code == 400
        model.fail = "out of order"
        assert http.post(CHAT, json=BODY).status_code == 503
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    # By id: the server of another test may still write its own. A set: a late line comes after the next request's.
    ends = [line for line in lines if line["logger"] == "dsv4.requests" and line["request_id"] == "mine"]
    assert len(ends) == 3 and {(line["path"], line["status"]) for line in ends} == {
        (CHAT, 200),
        (MESSAGES, 400),
        (CHAT, 503),
    }
    assert all(line["seconds"] >= 0 and line["time"].endswith("Z") for line in ends)
    assert any("the engine has stopped" in line["message"] and line["level"] == "error" for line in lines)
    assert "secret" not in log.getvalue()


@pytest.mark.parametrize("log", [JsonFormatter], indirect=True)
@pytest.mark.parametrize("asked", [False, True])
def test_prompts_are_logged_only_if_asked_for(model, serve, log: io.StringIO, asked: bool) -> None:
    everything = logging.getLogger("dsv4")
    level = everything.level
    everything.setLevel(logging.DEBUG)
    try:
        with serve(model, log_prompts=asked) as served:
            http, message = served.http(headers={"x-request-id": "mine-8"}), BODY["messages"]
            for path, fields in (
                (CHAT, {"messages": message}),
                (MESSAGES, {"messages": message}),
                ("/v1/responses", {"input": message}),
                ("/v1/completions", {"prompt": "a secret prompt"}),
                (CHAT, {"messages": message, "stream": True}),
            ):
                assert http.post(path, json={"model": "tiny", "max_tokens": 5} | fields).status_code == 200
            for wrong in (
                {"temperature": "a secret prompt"},
                {"tools": ["a secret prompt"]},
                {"a secret prompt": "\ud800"},
            ):
                assert http.post(CHAT, content=json.dumps(BODY | wrong)).status_code == 400
    finally:
        everything.setLevel(level)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    prompts = [line for line in lines if line["logger"] == "dsv4.prompts"]
    others = [line for line in lines if line["logger"].startswith("dsv4") and line not in prompts]
    mine = [line for line in others if line.get("request_id") == "mine-8"]  # another test's server may write its own
    assert len(mine) == 8 and "secret" not in json.dumps(others)
    assert len(prompts) == (5 if asked else 0)
    for line in prompts:
        assert "a secret prompt" in line["prompt"] and line["answer_id"] and line["request_id"] == "mine-8"


@pytest.mark.parametrize("log", [TextFormatter], indirect=True)
def test_a_path_cannot_forge_lines_of_the_log(model, serve, log: io.StringIO) -> None:
    with serve(model) as served:  # which has written all its lines once it has ended
        served.http().get("/a%0Aforged line")
    (line,) = (line for line in log.getvalue().splitlines() if "forged" in line)
    assert "GET '/a\\nforged line' 404 in " in line and line.endswith("]")


def see_it_cut_off(http: httpx.Client, model: ScriptedModel) -> None:
    """Ask for a whole answer, which is cut off; the model moves once a blank line has come."""
    model.held = threading.Event()
    try:
        with pytest.raises(httpx.RemoteProtocolError), http.stream("POST", CHAT, json=BODY) as response:
            for _ in response.iter_raw():
                model.held.set()
    finally:
        model.held.set()


@pytest.mark.parametrize("log", [JsonFormatter], indirect=True)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_that_a_client_is_not_told_is_logged(
    model, serve, log: io.StringIO, monkeypatch, stream: bool
) -> None:
    """That of a whole answer of which blank lines were sent; a stream ends with it."""

    def refuse(answer: object, event: object) -> None:
        raise RequestError(500, "the form is too complex")

    monkeypatch.setattr("dsv4.conversation.answer.Answer.push", refuse)
    with serve(model, keep_alive_seconds=0.05) as served:
        http = served.http()
        if stream:
            assert "the form is too complex" in http.post(CHAT, json=BODY | {"stream": True}).text
        else:
            see_it_cut_off(http, model)
    found = [line for line in map(json.loads, log.getvalue().splitlines()) if "too complex" in json.dumps(line)]
    assert [(line["level"], "error" in line) for line in found] == ([] if stream else [("error", False)])


@pytest.mark.parametrize("log", [JsonFormatter], indirect=True)
@pytest.mark.parametrize("begun", [False, True])
def test_an_unexpected_error_has_its_id_and_one_trace(model, serve, log: io.StringIO, monkeypatch, begun: bool) -> None:
    """Answered 500 with what every answer has; one that has begun, with a blank line, is cut off."""
    server_log = io.StringIO()
    handler = logging.StreamHandler(server_log)

    def fail(answer: object, event: object) -> None:
        raise ValueError("no such token")

    monkeypatch.setattr("dsv4.conversation.answer.Answer.push", fail)
    page = "https://pages.example"
    headers = {"Origin": page, "x-request-id": "mine-500"}
    seconds = 0.05 if begun else 60.0
    with serve(model, allowed_origins=[page], keep_alive_seconds=seconds) as served:
        logging.getLogger("uvicorn.error").addHandler(handler)  # whose handlers are set when a server is made
        http = served.http(headers=headers)
        if begun:
            see_it_cut_off(http, model)
        else:
            answer = http.post(CHAT, json=BODY)
            assert answer.status_code == 500 and answer.json()["error"]["message"] == "Internal server error"
            assert answer.headers["x-request-id"] == answer.headers["request-id"] == "mine-500"
            assert answer.headers["access-control-allow-origin"] == page
            assert http.get("/health").status_code == 200, "the connection stays open"
    logging.getLogger("uvicorn.error").removeHandler(handler)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    (trace,) = (line for line in lines if "no such token" in json.dumps(line))
    assert trace["request_id"] == "mine-500" and trace["level"] == "error" and trace["error"].startswith("Traceback")
    ends = [line for line in lines if line["logger"] == "dsv4.requests" and line["request_id"] == "mine-500"]
    (end,) = (line for line in ends if line["path"] == CHAT)
    assert end["status"] == (200 if begun else 500)
    assert "Traceback" not in server_log.getvalue()
