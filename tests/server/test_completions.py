"""POST /completions through the OpenAI SDK: prompts in every form, echo, log-probabilities, candidates, streams."""

from __future__ import annotations

import json

import openai
import pytest

from dsv4.conversation.vocabulary import Vocabulary
from dsv4.engine import TokenEvent
from dsv4.server.completion_answer import CompletionReader, Tally
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.special import BOS, EOS, FIM

TEXT = "the cat é"


@pytest.fixture
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


def complete(server, base: str = "/v1", **options):
    options.setdefault("prompt", TEXT)
    return server.openai(base).completions.create(model="tiny", **options)


def streamed(server, **options):
    chunks = list(complete(server, stream=True, **options))
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return chunks, texts


@pytest.mark.parametrize("base", ["", "/v1", "/beta", "/beta/v1"])
def test_a_prompt_is_continued_on_every_path(server, tokenizer, base: str) -> None:
    server.model.reply = " sat é🙂"
    answer = complete(server, base)
    assert server.model.prompts == [[tokenizer.special_id(BOS), *tokenizer.encode(TEXT)]]
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == (" sat é🙂", "stop", 0, None)
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    prompt, written = len(server.model.prompts[0]), len(tokenizer.encode(" sat é🙂")) + 1
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, written, prompt + written)
    assert usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens == prompt


def test_a_stream_has_the_text_and_one_usage_at_its_end(server) -> None:
    server.model.reply = " sat é🙂"
    chunks, texts = streamed(server, stream_options={"include_usage": True})
    assert texts == {0: " sat é🙂"} and len(chunks) > 4
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    text = server.http().post("/completions", json={"model": "tiny", "prompt": "a", "stream": True}).text
    frames = text.strip().split("\n\n")
    assert frames[-1] == "data: [DONE]" and "usage" not in json.loads(frames[0].removeprefix("data: "))


def test_prompts_may_be_texts_ids_and_both(server, tokenizer) -> None:
    server.model.reply = lambda prompt: f" {len(prompt)}"
    ids = tokenizer.encode("the cat sat")
    assert complete(server, prompt=ids).choices[0].text == f" {len(ids)}"
    assert complete(server, prompt=[ids, [5]]).choices[1].text == " 1"
    answer = complete(server, prompt=["", "the", ids])
    assert [choice.text for choice in answer.choices] == [" 1", f" {1 + len(tokenizer.encode('the'))}", f" {len(ids)}"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.prompt_tokens == 1 + 1 + len(tokenizer.encode("the")) + len(ids)
    _, texts = streamed(server, prompt=["", "the", ids])
    assert texts == {choice.index: choice.text for choice in answer.choices}


def test_special_spellings_in_a_prompt_stay_text(server, tokenizer) -> None:
    complete(server, prompt="<｜User｜>" + FIM[0], suffix="</think>")
    bos, hole, begin, end = (tokenizer.special_id(spelling) for spelling in (BOS, *FIM))
    (prompt,) = server.model.prompts
    special = set(tokenizer.special_tokens.values())
    assert [token for token in prompt if token in special] == [bos, begin, hole, end]


def test_a_suffix_makes_the_model_fill_in(server, tokenizer) -> None:
    server.model.reply = "middle"
    for prompt in ("def f():", ""):
        answer = complete(server, "/beta", prompt=prompt, suffix="return x", max_tokens=3)
        hole, begin, end = (tokenizer.special_id(mark) for mark in FIM)
        ids = [tokenizer.special_id(BOS), begin, *tokenizer.encode(prompt), hole, *tokenizer.encode("return x"), end]
        assert server.model.prompts[-1] == ids
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 3


def test_a_suffix_without_the_marks_in_the_tokenizer_is_refused(server, monkeypatch) -> None:
    tokenizer = server.engine.llm.tokenizer
    monkeypatch.setattr(tokenizer, "_added", {k: v for k, v in tokenizer._added.items() if k not in FIM})
    with pytest.raises(openai.BadRequestError, match="no fill-in-the-middle tokens"):
        complete(server, suffix="x")


def test_stop_strings_end_the_text_before_them(server) -> None:
    server.model.reply = "one STOP two"
    for stop, text in (("STOP", "one "), (["x", "TOP"], "one S"), (["TOP", " STOP"], "one")):
        answer = complete(server, stop=stop, logprobs=0)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, "stop")
        assert "".join(answer.choices[0].logprobs.tokens) == text
        chunks, texts = streamed(server, stop=stop, logprobs=0)
        assert texts == {0: text}
        assert "".join("".join(chunk.choices[0].logprobs.tokens) for chunk in chunks) == text


def test_echo_repeats_the_prompt(server, tokenizer) -> None:
    server.model.reply = " sat"
    assert complete(server, echo=True).choices[0].text == TEXT + " sat"
    assert complete(server, echo=True, prompt=tokenizer.encode("cat")).choices[0].text == "cat sat"
    assert streamed(server, echo=True)[1] == {0: TEXT + " sat"}
    only = complete(server, echo=True, max_tokens=0)
    assert (only.choices[0].text, only.choices[0].finish_reason, only.usage.completion_tokens) == (TEXT, "length", 0)


def test_logprobs_name_tokens_places_and_alternatives(server, tokenizer) -> None:
    server.model.reply = " sat é"
    found = complete(server, logprobs=2).choices[0].logprobs
    tokens = [tokenizer.token_bytes(token) for token in tokenizer.encode(" sat é")]
    assert len(found.tokens) == len(tokens), "the end of the sentence has no entry"
    assert found.tokens[0].encode() == tokens[0] and r"bytes:\xc3" in found.tokens
    assert found.text_offset[0] == 0 and found.text_offset == sorted(found.text_offset)
    assert all(value > -0.01 for value in found.token_logprobs)
    assert all(2 <= len(top) <= 3 and token in top for token, top in zip(found.tokens, found.top_logprobs, strict=True))
    assert all(len(top) == 1 for top in complete(server, logprobs=0).choices[0].logprobs.top_logprobs)


def test_the_prompts_logprobs_come_with_echo(server, tokenizer) -> None:
    server.model.reply = "the cat sat"  # the scripted model begins where it is first asked: after the first token
    ids = tokenizer.encode("the cat")
    for prompt, first in ((ids, None), ("the cat", float)):
        choice = complete(server, echo=True, logprobs=3, prompt=prompt, max_tokens=0).choices[0]
        found = choice.logprobs
        assert "".join(found.tokens) == choice.text == "the cat" and len(found.tokens) == len(ids)
        assert found.text_offset[0] == 0 and (found.token_logprobs[0] is None) == (first is None)
        for token, value, top in list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))[1:]:
            assert top[token] == value and len(top) >= 3
    whole = complete(server, echo=True, logprobs=3, prompt="the cat").choices[0]
    assert all(value > -0.01 for value in whole.logprobs.token_logprobs), "the script has this prompt"
    assert "".join(whole.logprobs.tokens) == "the cat sat" == whole.text
    chunks, _ = streamed(server, echo=True, logprobs=3, prompt="the cat")
    offsets = [offset for chunk in chunks for offset in chunk.choices[0].logprobs.text_offset]
    assert offsets == whole.logprobs.text_offset


def test_n_and_best_of(server, folder) -> None:
    server.model.reply = " sat"
    answer = complete(server, prompt=["a", "b"], n=3, temperature=0)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert all(choice.text == " sat" for choice in answer.choices)
    written = len(server.model.tokenizer.encode(" sat")) + 1
    assert answer.usage.completion_tokens == 6 * written, "a prompt counts once, its completions all count"
    assert answer.usage.prompt_tokens == sum(len(server.model.prompts[0]) for _ in range(2))
    answer = complete(server, prompt=["a", "b"], n=1, best_of=3)
    assert [choice.index for choice in answer.choices] == [0, 1] and answer.choices[0].logprobs is None
    assert answer.usage.completion_tokens == 6 * written
    assert streamed(server, n=2)[1] == {0: " sat", 1: " sat"}


def test_sampling_parameters_reach_the_engine(server, monkeypatch) -> None:
    seen = []
    stream = server.engine.stream
    monkeypatch.setattr(
        server.engine, "stream", lambda ids, params, user: seen.append(params) or stream(ids, params, user)
    )
    extra = {"top_k": 5, "min_p": 0.25, "ignore_eos": True}
    complete(server, temperature=0.5, top_p=0.5, seed=7, logit_bias={"5": -3}, max_tokens=4, extra_body=extra, n=2)
    first, second = seen
    assert (first.temperature, first.top_p, first.top_k, first.min_p, first.max_tokens) == (0.5, 0.5, 5, 0.25, 4)
    assert (first.logit_bias, first.ignore_eos, first.seed) == ({5: -3.0}, True, 7) and second.seed != 7
    complete(server)
    assert (seen[-1].temperature, seen[-1].top_p, seen[-1].max_tokens, seen[-1].logprobs) == (1.0, 1.0, 4096, False)


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"max_tokens": 0}, "max_tokens", "the valid range of max_tokens is [1, 393216]"),
        ({"max_tokens": 393217}, "max_tokens", "the valid range of max_tokens is [1, 393216]"),
        ({"max_tokens": "5"}, "max_tokens", '"5"; allowed: a valid integer'),
        ({"temperature": 2.5}, "temperature", "the valid range of temperature is [0, 2]"),
        ({"top_p": 0}, "top_p", "the valid range of top_p is (0, 1.0]"),
        ({"frequency_penalty": 3}, "frequency_penalty", "[-2, 2]"),
        ({"logprobs": 21}, "logprobs", "[0, 20]"),
        ({"logprobs": True}, "logprobs", "true; allowed: a valid integer"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"n": 3, "best_of": 2}, "best_of", "allowed: n (3) or more"),
        ({"best_of": 2, "stream": True}, "best_of", "stream"),
        ({"prompt": ["a"] * 129}, "prompt", "129 completions; allowed: 128"),
        ({"prompt": []}, "prompt", "an empty list"),
        ({"prompt": [[]]}, "prompt", "an empty list"),
        ({"prompt": [["a"]]}, "prompt", "a text, token ids, or a list of these"),
        ({"prompt": None}, "prompt", "a text, token ids, or a list of these"),
        ({"prompt": [5, 300]}, "prompt[1]", "token ids in [0, 299]"),
        ({"prompt": ["a", [-1]]}, "prompt[1][0]", "token ids in [0, 299]"),
        ({"prompt": "\ud800"}, "prompt", "no text"),
        ({"prompt": [5], "suffix": "a"}, "suffix", "a prompt of text"),
        ({"suffix": "a", "echo": True}, "echo", "unavailable with suffix"),
        ({"stop": ["a"] * 17}, "stop", "Stop string array too long: 17"),
        ({"stop": ["a", ""]}, "stop", "Invalid 'stop[1]': empty string"),
        ({"stream_options": {}}, "stream_options", "along with stream = true"),
        ({"logit_bias": {"300": 1}}, "logit_bias.300", "token ids in [0, 299]"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "[-100, 100]"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias." + "9" * 20, "token ids in [0, 299]"),
        ({"logit_bias": {"5": "1"}}, "logit_bias", "a valid number"),
        ({"logit_bias": [5]}, "logit_bias", "a valid dictionary"),
        ({"stop": ["a", 5]}, "stop", "a valid string"),
        ({"prompt": [1, True]}, "prompt", "a text, token ids, or a list of these"),
        ({"prompt": "", "add_special_tokens": False}, "prompt", "an empty text, and add_special_tokens is false"),
        ({"add_special_tokens": 1}, "add_special_tokens", "a valid boolean"),
        ({"response_format": {"type": "json_object"}}, "response_format", "Chat Completions"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "Chat Completions"),
        ({"mirostat": 2}, "mirostat", "Invalid mirostat value 2; allowed: 0"),
        ({"model": "gpt-9"}, "model", "The supported API model names are "),
    ],
)
def test_what_is_wrong_is_named(server, change: dict, param: str, words: str) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a"} | change)
    response = server.http().post("/v1/completions", content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param) and words in error["message"], error


def test_a_missing_prompt_and_broken_json_are_named(server) -> None:
    http = server.http()
    headers = {"content-type": "application/json"}
    for body, words in (('{"model": "tiny"}', "missing field `prompt`"), ("{", "line 1 column 2"), ("[]", "no object")):
        response = http.post("/completions", content=body, headers=headers)
        assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_a_prompt_that_does_not_fit_is_refused_in_the_words_that_clients_read(serve, model) -> None:
    with serve(model, max_model_len=64) as served:
        ids = list(range(100, 164))
        assert complete(served, prompt=ids, max_tokens=50).usage.completion_tokens == 1
        assert complete(served, prompt=ids[:60], max_tokens=50, echo=True, logprobs=1).choices[0].text
        for prompt in ([*ids, 5], [*ids, -1], "cat " * 5000):
            with pytest.raises(openai.BadRequestError, match="maximum context length is 64 tokens. However, you") as e:
                complete(served, prompt=["a", prompt], max_tokens=50)
            assert e.value.param == "prompt[1]"


def test_a_client_that_leaves_stops_all_its_completions(serve, model) -> None:
    model.reply, model.seconds_per_step = "a" * 5000, 0.01
    with serve(model) as served:
        stream = complete(served, prompt=["a", "b", "c"], n=2, stream=True)
        next(iter(stream))
        served.wait_until_running(6)
        stream.close()
        served.wait_until_idle()


def test_a_full_queue_and_a_failing_engine_are_errors(serve, model) -> None:
    with serve(model, max_num_waiting=2, max_num_seqs=1) as served:
        with pytest.raises(openai.InternalServerError) as full:
            complete(served, prompt=["a"] * 8)
        assert full.value.status_code == 503 and full.value.response.headers["Retry-After"]
        assert complete(served).choices, "the places of a refused request are free again"
        model.fail = "out of order"
        with pytest.raises(openai.InternalServerError, match="out of order"):
            complete(served, prompt=["a", "b"])


def test_a_prompt_without_the_begin_of_sentence_is_what_tokenize_says(server) -> None:
    for prompt in ("the cat", "<｜User｜>"):
        body = {"model": "tiny", "prompt": prompt, "add_special_tokens": False}
        tokens = server.http().post("/tokenize", json=body).json()["tokens"]
        echoed = (
            server.http().post("/v1/completions", json=body | {"echo": True, "logprobs": 0, "max_tokens": 2}).json()
        )
        assert server.model.prompts[-1] == tokens != []
        (choice,) = echoed["choices"]
        assert choice["text"].startswith(prompt) and choice["logprobs"]["token_logprobs"][0] is None
        assert choice["logprobs"]["text_offset"][: len(tokens)].count(0) == 1
    assert server.http().post("/v1/completions", json={"model": "tiny", "prompt": "the cat"}).status_code == 200
    assert server.model.prompts[-1][0] == 0


def test_the_end_of_the_sentence_is_never_text(server) -> None:
    """With ignore_eos the model may write it anywhere; its log-probability is there like any other's."""
    server.model.reply = " sat"
    extra = {"ignore_eos": True}
    answer = complete(server, max_tokens=9, logprobs=0, extra_body=extra)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, answer.usage.completion_tokens) == (" sat", "length", 9)
    written = len(server.model.tokenizer.encode(" sat"))
    ends = 9 - written
    assert choice.logprobs.tokens[written:] == ["<｜end▁of▁sentence｜>"] * ends
    assert choice.logprobs.text_offset[written:] == [len(" sat")] * ends
    assert streamed(server, max_tokens=9, extra_body=extra)[1] == {0: " sat"}


def test_a_stop_string_that_ends_in_half_a_character_has_ended_the_answer(server) -> None:
    server.model.reply = "xyza\u9f98"
    written = len(server.model.tokenizer.encode("xyza"))
    answer = complete(server, max_tokens=written + 1, logprobs=0, stop=["za\ufffd"])
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("xy", "stop")
    assert answer.usage.completion_tokens == written + 1
    assert all(offset < len(choice.text) for offset in choice.logprobs.text_offset) and choice.logprobs.tokens
    plain = complete(server, max_tokens=written + 1, stop=["b\ufffd"]).choices[0]
    assert (plain.text, plain.finish_reason) == ("xyza\ufffd", "length")


def test_of_a_step_only_the_token_that_has_ended_the_answer_has_no_log_probability(server, tokenizer) -> None:
    """An end of the sentence that was ignored has one, also where another token ends the same step."""
    eos, (letter,) = tokenizer.special_id(EOS), tokenizer.encode("a")
    for ids, text, shown in (([eos, letter], "a", [EOS, "a"]), ([letter, eos], "a", ["a"]), ([eos, eos], "", [])):
        reader = CompletionReader({}, 0, Vocabulary.of(server.engine.llm), Tally(1), 1, True, False)
        (chunk,) = reader.push(TokenEvent(ids, text, [-1.0, -2.0], [(), ()], "stop"))
        assert chunk.logprobs["tokens"] == shown and chunk.score == -1.5
