"""Ids that requests may use, the name in the answer, and which of several models answers."""

from __future__ import annotations

import contextlib
import shutil

import anthropic
import openai
import pytest

from dsv4.engine import LLM, AsyncEngine
from dsv4.server.model_names import model_for
from dsv4.server.served_models import ServedModel, ServedModels
from tests.server.conftest import ScriptedModel, serving

QUESTION = [{"role": "user", "content": "hi"}]


def chat(served, model: str, **options):
    return served.openai().chat.completions.create(model=model, messages=QUESTION, **options)


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("tiny", "tiny"),
        ("deepseek-flash", "deepseek-flash"),
        ("deepseek-v4-pro", "deepseek-v4-pro"),
        ("deepseek-v4-pro[1m]", "deepseek-v4-pro"),
        ("deepseek-v4-flash", "deepseek-flash"),
        ("deepseek-v4-flash-0731", "deepseek-flash"),
        ("deepseek-v4-flash-vision-exp[1m]", "deepseek-flash"),
    ],
)
def test_hosted_ids_are_answered_with_the_hosted_name(server, asked: str, shown: str) -> None:
    assert chat(server, asked).model == shown
    assert {chunk.model for chunk in chat(server, asked, stream=True)} == {shown}
    assert server.openai().completions.create(model=asked, prompt="a").model == shown
    message = server.anthropic().messages.create(model=asked, max_tokens=5, messages=QUESTION)
    assert message.model == shown


def test_claude_ids_are_accepted_on_anthropics_paths_only(server) -> None:
    create = server.anthropic().messages.create
    assert create(model="claude-opus-4-6[1m]", max_tokens=5, messages=QUESTION).model == "claude-opus-4-6"
    with pytest.raises(openai.BadRequestError, match="you passed claude-opus-4-6"):
        chat(server, "claude-opus-4-6")


@pytest.mark.parametrize("name", ["gpt-5", "deepseek-v4", "deepseek-v4-flashy", "TINY", ""])
def test_an_unknown_id_gets_the_list_of_the_valid_ones(server, name: str) -> None:
    for call in (
        lambda: chat(server, name),
        lambda: server.openai().completions.create(model=name, prompt="a"),
        lambda: server.anthropic().messages.create(model=name, max_tokens=5, messages=QUESTION),
    ):
        with pytest.raises((openai.BadRequestError, anthropic.BadRequestError)) as error:
            call()
        message = str(error.value)
        for known in ("tiny", "deepseek-flash", "deepseek-v4-pro", "deepseek-v4-flash", f"you passed {name}"):
            assert known in message, message


@pytest.mark.parametrize("name", ["deepseek-chat", "deepseek-reasoner"])
def test_retired_ids_are_refused_with_their_date(server, name: str) -> None:
    for call in (
        lambda: chat(server, name),
        lambda: server.openai("/beta").completions.create(model=name, prompt="a"),
        lambda: server.anthropic().messages.create(model=name, max_tokens=5, messages=QUESTION),
    ):
        with pytest.raises(
            (openai.BadRequestError, anthropic.BadRequestError), match="retired on 2026-07-24 15:59 UTC"
        ):
            call()


def test_retired_ids_think_as_they_did_where_they_are_allowed(serve, model) -> None:
    model.reply = "</think>ok"
    with serve(model, retired_models=True) as served:
        listed = [known.id for known in served.openai().models.list()]
        assert listed[-2:] == ["deepseek-chat", "deepseek-reasoner"]
        answer = chat(served, "deepseek-reasoner")
        assert answer.model == "deepseek-reasoner" and answer.choices[0].message.reasoning_content == ""
        assert not hasattr(chat(served, "deepseek-chat").choices[0].message, "reasoning_content")
        thinking = {"extra_body": {"thinking": {"type": "enabled"}}}
        assert hasattr(chat(served, "deepseek-chat", **thinking).choices[0].message, "reasoning_content")


def test_aliases_are_further_ids(serve, model) -> None:
    with serve(model, model_aliases=["gpt-5"]) as served:
        assert chat(served, "gpt-5").model == "gpt-5"
        listed = ["tiny", "gpt-5", "deepseek-flash", "deepseek-v4-pro", "deepseek-v4-flash"]
        assert [known.id for known in served.openai().models.list()] == listed


def test_a_name_that_requests_may_use_is_shown(serve, model) -> None:
    with serve(model, model_aliases=["openai/gpt-5"]) as served:
        for path, shown in (
            ("/v1/models/deepseek-v4-flash-0731", "deepseek-v4-flash-0731"),
            ("/models/deepseek-v4-pro[1m]", "deepseek-v4-pro"),
            ("/anthropic/v1/models/claude-opus-4-6[1m]", "claude-opus-4-6"),
            ("/v1/models/claude-opus-4-6", "claude-opus-4-6"),
            ("/v1/models/openai/gpt-5", "openai/gpt-5"),
            ("/v1/models/openai%2Fgpt-5", "openai/gpt-5"),
        ):
            answer = served.http().get(path)
            assert (answer.status_code, answer.json().get("id")) == (200, shown), path
            assert answer.json()["root"] == "tiny"
        for name in ("beta/models/claude-opus-4-6", "v1/models/deepseek-chat", "v1/models/openai/gpt-6"):
            answer = served.http().get(f"/{name}")
            assert answer.status_code == 404 and "There is no model" in answer.json()["error"]["message"]
        assert served.openai().models.retrieve("openai/gpt-5").id == "openai/gpt-5"
        assert served.http().get("/v1/models/").json()["object"] == "list"


@pytest.mark.parametrize(
    ("names", "asked", "index"),
    [
        (["a", "b"], "b", 1),
        (["a", "b"], "deepseek-v4-pro", 0),
        (["DeepSeek-V4-Pro-0813", "DeepSeek-V4-Flash"], "deepseek-flash", 1),
        (["DeepSeek-V4-Flash", "DeepSeek-V4-Pro-0813"], "deepseek-v4-pro", 1),
        (["DeepSeek-V4-Flash", "DeepSeek-V4-Pro-0813"], "claude-opus-4-6", 1),
        (["DeepSeek-V4-Pro", "DeepSeek-V4-Flash"], "claude-haiku-4-5", 1),
        (["deepseek-v4-pro", "deepseek-v4-flash"], "deepseek-v4-flash", 1),
        (["DeepSeek-V4-Pro", "DeepSeek-V4-Flash"], "deepseek-chat", 1),
        (["DeepSeek-V4-Pro", "DeepSeek-V4-Flash"], "gpt-5", 0),
    ],
)
def test_a_name_goes_to_the_model_of_its_family(names: list[str], asked: str, index: int) -> None:
    assert model_for(asked, names) == index


@pytest.mark.parametrize("alias", ["deepseek-r1", "deepseek-v4-flash", "claude-haiku-4-5"])
def test_an_alias_is_an_id_of_the_first_model_whatever_its_family(alias: str) -> None:
    models = [ServedModel(name, None, None) for name in ("DeepSeek-V4-Pro", "DeepSeek-V4-Flash")]
    found = ServedModels(models, aliases=[alias])
    assert (found.find(alias).name, found.shown(alias)) == ("DeepSeek-V4-Pro", alias)
    assert found.find("deepseek-flash").name == "DeepSeek-V4-Flash"


@pytest.fixture
def two(folder, tmp_path):
    """A server of two models, tiny and tiny-pro."""
    pro = tmp_path / "tiny-pro"
    shutil.copytree(folder, pro)
    models = [ScriptedModel(folder), ScriptedModel(pro)]
    models[0].reply, models[1].reply = "</think>small", "</think>large"
    second = AsyncEngine(LLM(models[1], folder=pro))
    with contextlib.closing(second), serving(LLM(models[0], folder=folder), models[0], others=[second]) as served:
        yield served, models


def test_several_models_answer_each_to_its_name(two) -> None:
    served, _ = two
    for name, text in (
        ("tiny", "small"),
        ("tiny-pro", "large"),
        ("deepseek-v4-pro", "large"),
        ("deepseek-flash", "small"),
    ):
        assert chat(served, name).choices[0].message.content == text
        assert served.openai().completions.create(model=name, prompt="a").choices[0].text.endswith(text)
    create = served.anthropic().messages.create
    for name, text in (("claude-opus-4-6", "large"), ("claude-sonnet-4-6", "small")):
        blocks = create(model=name, max_tokens=20, messages=QUESTION).content
        assert blocks[-1].text == text
    listed = {known.id: known.root for known in served.openai().models.list()}
    assert list(listed)[:2] == ["tiny", "tiny-pro"]
    assert listed["deepseek-v4-pro"] == "tiny-pro" and listed["deepseek-v4-flash"] == "tiny"
    assert served.openai().models.retrieve("deepseek-v4-pro").root == "tiny-pro"
    state = served.http().get("/health", params={"deep": 1}).json()
    assert {name: found["status"] for name, found in state["models"].items()} == {"tiny": "ok", "tiny-pro": "ok"}


def test_one_model_that_fails_leaves_the_others(two) -> None:
    served, models = two
    models[1].fail = "out of order"
    with pytest.raises(openai.InternalServerError, match="out of order"):
        chat(served, "tiny-pro")
    with pytest.raises(openai.InternalServerError, match="out of order"):
        chat(served, "tiny-pro")
    assert chat(served, "tiny").choices[0].message.content == "small"
    health = served.http().get("/health")
    assert health.status_code == 503 and "out of order" in health.json()["error"]


def test_two_models_of_one_name_are_refused(server) -> None:
    model = ServedModel.of(server.engine)
    with pytest.raises(ValueError, match="two models are named 'tiny'; allowed: folders of different names"):
        ServedModels([model, model])
