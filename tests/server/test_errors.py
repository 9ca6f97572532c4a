import re
import threading

import openai
import pytest

from dsv4.conversation.answer import Answer

QUESTION = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


def refused(server, path: str = CHAT, **change) -> dict:
    response = server.http().post(path, json={"model": "tiny", "messages": QUESTION} | change)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request_error")
    return error["message"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_p": 0}, "Invalid top_p value, the valid range of top_p is (0, 1.0]"),
        ({"stop": ["x"] * 17}, "Stop string array too long: 17"),
        (
            {"max_tokens": "5"},
            "Failed to deserialize the JSON body into the target type: max_tokens: invalid type: string",
        ),
        ({"messages": [{"role": "function", "content": "x"}]}, "unknown variant `function`, expected one of `system`"),
        ({"response_format": {"type": "xml"}}, "unknown variant `xml`"),
    ],
)
def test_a_bad_request_is_refused_with_the_hosted_message(server, change, message: str) -> None:
    assert message in refused(server, **change)


def test_an_unknown_model_error_lists_the_known_models(server) -> None:
    message = refused(server, model="gpt-9")
    assert "The supported API model names are" in message and "but you passed gpt-9." in message
    assert "tiny" in message and "deepseek-v4-pro" in message
    assert "claude-x" in refused(server, model="claude-x"), "only the Messages API takes these names"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *((CHAT, body) for body in (b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"model": 1}', b"\xff\xfe")),
        *(("/v1/messages", body) for body in (b"{", b'{"model": 1}', b"\xff\xfe")),
        ("/v1/messages/count_tokens", b"{"),
    ],
)
def test_a_body_that_is_no_request_is_refused_and_harms_nothing(server, path: str, body: bytes) -> None:
    response = server.http().post(path, content=body)
    assert response.status_code == 400
    assert "Failed to deserialize the JSON body" in response.json()["error"]["message"]
    assert server.engine.healthy


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_a_context_overflow_names_the_numbers(model, serve, path: str) -> None:
    low = {"reasoning_effort": "low"} if path == CHAT else {"output_config": {"effort": "low"}}
    with serve(model, max_model_len=1000) as served:
        too_long = [{"role": "user", "content": "x" * 1100}]
        message = refused(served, path, messages=too_long, max_tokens=500, **low)
        assert message.startswith("This model's maximum context length is 1000 tokens. However, you requested ")
        assert "500 in the completion). Please reduce the length of the messages or completion." in message
        assert "0 in the completion" in refused(served, path, messages=too_long, **low)
        brimful = [{"role": "user", "content": "ab " * 1000}]  # 3,000 bytes, between 1,000 and 3,000 tokens
        assert "maximum context length is 1000" in refused(served, path, messages=brimful, max_tokens=1, **low)


def test_claude_code_recognizes_too_long_a_prompt(model, serve) -> None:
    """It compacts the conversation if a message has Anthropic's words, and by how much from the numbers."""
    with serve(model, max_model_len=1000) as served:
        for text in ("x" * 1100, "x" * 9000):  # refused after tokenizing, and before
            message = refused(served, "/v1/messages", messages=[{"role": "user", "content": text}])
            found = re.search(r"prompt is too long: (\d+) tokens > 1000 maximum", message)
            assert found and int(found[1]) > 1000 and message.startswith("This model's maximum context length")
            assert "too long" not in refused(served, CHAT, messages=[{"role": "user", "content": text}])


@pytest.mark.parametrize(("path", "max_tokens"), [(CHAT, 500), (CHAT, 393_216), ("/v1/messages", 384_000)])
def test_max_tokens_is_capped_by_the_room_beside_the_prompt(model, serve, path: str, max_tokens: int) -> None:
    """Agents send the max_output_tokens of /v1/models with every prompt."""
    model.reply = "</think>" + "x" * 2000
    with serve(model, max_model_len=1000) as served:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 700}], "max_tokens": max_tokens}
        body |= {"reasoning_effort": "low"} if path == CHAT else {"output_config": {"effort": "low"}}
        got = served.http().post(path, json=body).json()
        usage = got["usage"]
        total = sum(usage[name] for name in usage if name in ("prompt_tokens", "input_tokens"))
        total += usage.get("completion_tokens", 0) + usage.get("output_tokens", 0)
        assert total == 1000
        assert "length" in str(got) or got["stop_reason"] == "max_tokens"
        offered = served.http().get("/v1/models").json()["data"][0]["max_output_tokens"]
        assert served.http().post(path, json=body | {"max_tokens": offered}).status_code == 200


def test_unknown_paths_and_methods_answer_in_json(server) -> None:
    http = server.http()
    assert (http.get("/v2/nothing").status_code, http.get(CHAT).status_code) == (404, 405)
    assert http.get(CHAT).json()["error"]["message"] == f"GET {CHAT}: Method Not Allowed; send POST"
    assert "GET /v2/nothing: Not Found" in http.get("/v2/nothing").json()["error"]["message"]
    assert http.get("/anthropic/nothing").json()["type"] == "error"
    assert "type" not in http.get("/nothing").json()


def test_a_body_over_the_limit_is_refused_before_it_is_read(server, monkeypatch) -> None:
    monkeypatch.setattr("dsv4.server.requests.MAX_BODY_BYTES", 1000)
    response = server.http().post(CHAT, content=b"x" * 2000)
    assert (response.status_code, response.json()["error"]["type"]) == (413, "request_too_large")
    parts = iter([b"x" * 600] * 3)
    assert server.http().post(CHAT, content=parts).status_code == 413  # without Content-Length


def test_models_are_listed_for_both_sdks(server) -> None:
    client = server.openai()
    listed = [model.id for model in client.models.list()]
    assert listed[0] == "tiny" and "deepseek-v4-flash" in listed
    assert client.models.retrieve("tiny").context_window == 65536
    with pytest.raises(openai.NotFoundError, match="There is no model 'nope'"):
        client.models.retrieve("nope")
    assert [model.id for model in server.anthropic().models.list()] == listed


def test_the_beta_base_address_answers(server) -> None:
    for base in ("/beta", "/beta/v1"):
        client = server.openai(base)
        assert client.chat.completions.create(model="tiny", messages=QUESTION).choices[0].message.content == "ok"
        assert client.models.list().data[0].id == client.models.retrieve("tiny").id == "tiny"


def test_base_addresses_answer_probes(server) -> None:
    http = server.http()
    assert http.head("/").status_code == http.get("/").status_code == 200
    assert http.head("/anthropic").status_code == http.get("/anthropic").status_code == 200


def test_health_counts_requests_and_a_broken_engine_fails_them_all(model, serve) -> None:
    with serve(model) as served:
        http = served.http()
        assert http.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
        model.seconds_per_step = 0.02
        model.reply = "</think>" + "x" * 500
        frames: list[str] = []

        def read(path: str) -> None:
            with served.http().stream("POST", path, json={"model": "tiny", "messages": QUESTION, "stream": True}) as r:
                frames.append("".join(r.iter_text()))

        threads = [threading.Thread(target=read, args=(path,)) for path in (CHAT, "/v1/messages")]
        for thread in threads:
            thread.start()
        served.wait_until_running(2)
        model.fail = "out of order"
        for thread in threads:
            thread.join(60)
        chat, messages = sorted(frames, key=lambda text: "event: " in text)
        assert "out of order" in chat.split("\n\n")[-2] and "[DONE]" not in chat
        assert messages.split("\n\n")[-2].startswith("event: error\ndata: {")
        health = http.get("/health")
        assert health.status_code == 503 and "out of order" in health.json()["error"]
        late = http.post(CHAT, json={"model": "tiny", "messages": QUESTION})
        assert late.status_code == 503 and "out of order" in late.json()["error"]["message"]


def test_an_engine_that_breaks_under_a_whole_answer_is_a_503(model, serve) -> None:
    model.fail = "out of order"
    with serve(model) as served:
        response = served.http().post(CHAT, json={"model": "tiny", "messages": QUESTION})
        assert response.status_code == 503 and "out of order" in response.json()["error"]["message"]


@pytest.mark.parametrize("good_events", [0, 1])
def test_an_answer_that_cannot_be_parsed_is_an_error_and_no_cut_connection(server, monkeypatch, good_events) -> None:
    """A stream that has not begun gets the error's status, a begun stream an error event."""
    push, left = Answer.push, good_events

    def fail(answer: Answer, event: object) -> list[object]:
        nonlocal left
        if left == 0:
            raise ValueError("no such token")
        left -= 1
        return push(answer, event)

    monkeypatch.setattr("dsv4.conversation.answer.Answer.push", fail)
    body = {"model": "tiny", "messages": QUESTION}
    whole = server.http().post(CHAT, json=body)
    assert whole.status_code == 500 and whole.json()["error"]["type"] == "internal_error"
    left = good_events
    # A separate client: after an unhandled error the server closes the connection once the response is sent.
    stream = server.http().post(CHAT, json=body | {"stream": True})
    assert stream.status_code == (200 if good_events else 500)
    assert ("no such token" in stream.text) == bool(good_events) and "[DONE]" not in stream.text


@pytest.mark.parametrize(("path", "stream"), [(CHAT, True), ("/v1/messages", False)])
def test_nan_logits_are_an_error_and_fail_the_health(model, serve, path: str, stream: bool) -> None:
    """An empty answer with status 200 would look like a valid one."""
    original = model._next
    model._next = lambda slot, length: original(slot, length) * float("nan")
    body = {"model": "tiny", "messages": QUESTION, "stream": stream, "max_tokens": 20}
    with serve(model) as served:
        answer = served.http().post(path, json=body)
        assert answer.status_code == 503, "a stream that has not begun gets the status of the error, too"
        assert "are not finite" in answer.text and "service_unavailable" in answer.text and "[DONE]" not in answer.text
        health = served.http().get("/health")
        assert health.status_code == 503 and "are not finite" in health.json()["error"]
