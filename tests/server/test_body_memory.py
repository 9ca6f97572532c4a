"""Memory of one body beside its JSON: little, whatever is in it. The limit of a body's bytes is large."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import deepseek_recipe as recipe
import pytest

from dsv4.server.completion_body import read_completion_body
from dsv4.server.errors import RequestError
from dsv4.server.leniency import adapt_body
from dsv4.server.pydantic_refusals import read_json_object
from dsv4.server.refusals import describe

MANY = 60_000  # more than the messages of a request
EMOJI = json.dumps("\U0001f600")  # as two escapes: the body is walked


def peak(work: Callable[[], object]) -> int:
    """Most bytes of Python objects that the work holds at a time."""
    tracemalloc.start()
    try:
        with contextlib.suppress(RequestError):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("emoji", ["", f',"y":{EMOJI}'])
@pytest.mark.parametrize("items", ["1", "{}", "[1]"])
def test_the_search_for_lone_surrogates_takes_nothing_per_element(items: str, emoji: str) -> None:
    body = f'{{"model":"tiny","z":[{",".join([items] * MANY)}]{emoji}}}'.encode()
    parsed = peak(lambda: json.loads(body))
    assert peak(lambda: read_json_object(body)) < parsed + len(body) + 100_000
    with pytest.raises(ValueError) as error:
        recipe.ChatCompletionRequest(body)
    refusal = peak(lambda: describe(error.value, body, recipe.ChatCompletionRequest, recipe.ChatCompletionRequest))
    assert refusal < parsed + 3 * len(body) + 100_000


def test_the_sizes_are_checked_before_the_copy_and_the_copy_is_the_json_once_more() -> None:
    for field, times in (("messages", 1.2), ("z", 2.3)):
        body = f'{{"model":"tiny","{field}":[{",".join(["{}"] * MANY)}]}}'.encode()
        parsed = peak(partial(json.loads, body))
        assert peak(partial(adapt_body, body, lambda request: None)) < times * parsed


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [1] * MANY},
        {"prompt": [1] * MANY + ["a"]},
        {"prompt": [[]] * MANY + [5]},
        {"prompt": [[5]] * MANY},
        {"prompt": "a", "stop": [5] * MANY},
        {"prompt": "a", "stop": ["5"] * MANY},
        {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(MANY)), "x")},
        {"prompt": "a", "temperature": [5] * MANY},
        {"prompt": "a", "top_k": [5] * MANY},
    ],
    ids=lambda fields: ", ".join(map(str, fields)),
)
def test_a_wrong_list_of_a_completion_is_refused_without_a_note_for_each_element(fields: dict[str, Any]) -> None:
    read_completion_body({"model": "tiny", "prompt": "a"})  # what is made once
    assert peak(lambda: read_completion_body({"model": "tiny", **fields})) < 300_000


def test_the_refusal_of_a_long_value_is_short(server: Any) -> None:
    for path, fields in (
        ("/v1/completions", {"prompt": "a", "top_k": [5] * 1000}),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"9" * 5000: 1}}),
        ("/v1/chat/completions", {"messages": [], "top_k": [5] * 1000}),
        ("/detokenize", {"tokens": ["5"] * 1000}),
    ):
        refused = server.http().post(path, json={"model": "tiny"} | fields)
        assert refused.status_code == 400 and len(refused.text) < 700, refused.text
