import openai
import pytest

from dsv4.engine import LLM, AsyncEngine
from dsv4.server.app import create_app
from dsv4.server.config import ServerConfig

KEYS = ["sk-first-key-1234", "sk-second"]
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}


@pytest.fixture
def locked(model, serve):
    with serve(model, api_keys=KEYS) as served:
        yield served


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer sk-first-key-1234"},
        {"Authorization": "bearer sk-second"},
        {"x-api-key": "sk-second"},
        {"Authorization": "Bearer sk-second", "x-api-key": "wrong"},  # Authorization takes precedence
    ],
)
def test_a_key_opens_both_apis(locked, headers) -> None:
    http = locked.http(headers=headers)
    assert http.post("/v1/chat/completions", json=BODY).status_code == 200
    assert http.post("/anthropic/v1/messages", json=BODY).status_code == 200
    assert http.get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "no api key was given"),
        ({"Authorization": "Bearer sk-first-key-123"}, "Your api key: ****-123 is invalid"),
        ({"Authorization": "Bearer"}, "no api key was given"),
        ({"Authorization": "Basic sk-second"}, "no api key was given"),
        ({"Authorization": "Bearer wrong", "x-api-key": "sk-second"}, "****rong"),
        ({"x-api-key": "sk-SECOND"}, "****COND"),
    ],
)
def test_without_a_valid_key_nothing_opens(locked, headers, message: str) -> None:
    http = locked.http(headers=headers)
    for path in ("/v1/chat/completions", "/chat/completions", "/v1/messages", "/anthropic/v1/messages/count_tokens"):
        response = http.post(path, json=BODY)
        assert response.status_code == 401, path
        error = response.json()["error"]
        assert message in error["message"]
        assert (error["type"], error["code"], error["param"]) == ("authentication_error", "invalid_request_error", None)
    assert http.get("/v1/models").status_code == http.get("/unknown").status_code == 401
    assert locked.model.prompts == []


def test_the_page_and_the_health_need_no_key(locked) -> None:
    http = locked.http()
    assert http.get("/health").status_code == 200
    assert http.get("/").status_code == 200


def test_the_sdk_sees_an_authentication_error(locked) -> None:
    with pytest.raises(openai.AuthenticationError, match="is invalid"):
        locked.openai().models.list()


def test_without_keys_everything_is_open(server) -> None:
    assert server.http().post("/v1/chat/completions", json=BODY).status_code == 200


def test_an_empty_key_is_refused_at_start(model, folder) -> None:
    engine = AsyncEngine(LLM(model, folder=folder))
    with pytest.raises(ValueError, match="an API key is an empty string"):
        create_app([engine], ServerConfig(api_keys=["good", ""]))
    engine.close()
