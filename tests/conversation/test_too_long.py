"""A text too long to fit the context is refused before it is tokenized."""

import json

import deepseek_recipe as recipe
import pytest

from dsv4.conversation.model import ConversationModel
from dsv4.engine import LLM
from dsv4.tokenizer import Tokenizer

from ..engine.conftest import TEXT_VOCAB, HistoryModel

TEXT = "the cat sat on the mat " * 10_000


@pytest.fixture
def llm(text_folder) -> LLM:
    return LLM(HistoryModel(TEXT_VOCAB), folder=text_folder, max_model_len=1000)


@pytest.fixture
def no_tokenizing(monkeypatch) -> None:
    def tokenise(self: Tokenizer, texts: list[str]) -> None:
        raise AssertionError("the text was tokenized")

    monkeypatch.setattr(Tokenizer, "_encodings", tokenise)


def request_of(text: str) -> recipe.ConversationRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": text}]}
    names = {"m": recipe.ModelVersion.DeepseekV4Pro}
    options = recipe.ConversionOptions(default_thinking_mode=True).with_model_versions_by_name(names)
    return recipe.ChatCompletionRequest(json.dumps(body).encode()).convert(options)


@pytest.mark.usefixtures("no_tokenizing")
def test_a_long_plain_text_is_refused_untokenized(llm: LLM) -> None:
    words = r"maximum context length is 1000 tokens. However, you requested at least \d+ tokens"
    with pytest.raises(ValueError, match=words):
        llm.generate(TEXT)


@pytest.mark.usefixtures("no_tokenizing")
def test_a_long_conversation_gets_the_hosted_message(llm: LLM) -> None:
    words = r"maximum context length is 1000 tokens. However, you requested (\d+) tokens \(\1 in the messages, 0 in the"
    with pytest.raises(recipe.ConversionError, match=words) as caught:
        ConversationModel(llm).prepare(request_of(TEXT))
    assert caught.value.status_code == 400


def test_counting_tokens_has_no_limit(llm: LLM) -> None:
    conversation = request_of(TEXT).conversation
    assert llm.prompts is not None
    count = ConversationModel(llm).prompt(conversation).count(llm.prompts.tokenizer)
    assert count == len(llm.prompts.encode(conversation)) > 50_000


def test_a_text_that_may_fit_is_tokenized_and_counted(llm: LLM) -> None:
    """A text within the lower bound but with too many tokens is refused with their exact number."""
    with pytest.raises(ValueError, match="the prompt has 1501 tokens; the limit is max_model_len = 1000"):
        llm.generate("t" * 1500)
