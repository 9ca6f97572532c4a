"""Calls in which the model has stopped: no client takes them for whole ones, and the model goes on."""

from __future__ import annotations

import json

import pytest
from jiter import from_json
from langchain_core.utils.json import parse_partial_json

from dsv4.tokenizer.special import DSML, EOS
from tests.conversation.answers import Talk, special
from tests.conversation.parsing import unreadable
from tests.conversation.test_answer import BLOCK, BLOCK_END, ENDED, EVERY_FORMAT, OPEN, asked, call, turn


def told(name: str, begun: str) -> str:
    """Arguments of a call in which the model has stopped, in a format. `begun`: what there is of them."""
    return json.dumps({"INVALID_JSON": begun}, ensure_ascii=False) if name == "messages" else unreadable(begun)


@EVERY_FORMAT
@pytest.mark.parametrize("begin", ["t</think>", "t\n\n"], ids=["after reasoning", "in reasoning"])
def test_a_model_that_stops_in_a_call_has_called(name: str, begin: str) -> None:
    """With what there is of the arguments, so that the client says what is wrong, and the model goes on."""
    for written, calls in (
        (f"{BLOCK}{OPEN}secret hal", ['{"x": "secret hal']),
        (f'{BLOCK}<{DSML}invoke name="f">\n', ["{"]),
        (BLOCK + call("v") + f"{OPEN}hal", ['{"x": "v"}', '{"x": "hal']),
        (f"{BLOCK}{call('v')}", ['{"x": "v"}']),
    ):
        reply = asked(name, special(begin + written + EOS))
        assert (reply.reasoning, reply.content, reply.reason) == ("t", "", ENDED[name])
        assert [given for _, given in reply.calls] == [a if a[-1] == "}" else told(name, a) for a in calls]
    reply = asked(name, special(f"{begin}{BLOCK}{EOS}"))
    assert (reply.reasoning.strip(), reply.content, reply.calls) == ("t", "", [])


@EVERY_FORMAT
def test_a_call_that_the_limit_has_cut_off_is_text(name: str) -> None:
    reply = asked(name, special(f"t</think>{BLOCK}{OPEN}secret hal"), end="length")
    assert (reply.content, reply.calls) == ("secret hal", [])
    assert reply.reason == {"chat": "length", "messages": "max_tokens", "responses": "incomplete"}[name]


@EVERY_FORMAT
def test_no_parser_of_beginnings_takes_a_call_that_was_not_ended_for_a_whole_one(name: str) -> None:
    """SDKs and frameworks complete what they have of a stream; a call without its last arguments may do harm."""
    begun = f'{BLOCK}<{DSML}invoke name="delete">\n'
    path, dry = f'<{DSML}parameter name="path" string="true">', f'<{DSML}parameter name="dry_run" string="false">'
    end = f"</{DSML}parameter>\n"
    for written in (
        begun,
        f"{begun}{path}/a",
        f"{begun}{path}/a{end}{dry}",
        f"{begun}{path}/a{end}{dry}tr",
        f"{begun}{path}/a{end}<{DSML}par",
        f"{begun}{dry}true{end}{path}" + '/a", "b": ["c\\',
    ):
        ((_, given),) = asked(name, special(f"t</think>{written}{EOS}")).calls
        if name == "messages":  # an input is always an object
            assert json.loads(given).keys() == {"INVALID_JSON"}
            continue
        with pytest.raises(ValueError, match="expected value"):
            from_json(given.encode(), partial_mode=True)
        assert parse_partial_json(given) is None
        with pytest.raises(ValueError, match="Expecting value"):
            json.loads(given)


@EVERY_FORMAT
def test_a_turn_that_stops_in_a_call_is_rendered_as_sent_with_its_reasoning(name: str) -> None:
    """An open value in the prompt would take in what follows."""
    talk = Talk(name)
    reply, _, _ = talk.ask(talk.body(), special(f"why</think>{BLOCK}{call('v')}{OPEN}hal{EOS}"))
    for given in (reply.calls[1][1], '{"x": "hal"}'):  # some clients complete it
        reply.calls[1] = ("f", given)
        later = turn(talk, reply)
        begin, end = f"<think>why</think>{BLOCK}{call('v')}", f"</{DSML}parameter>\n</{DSML}invoke>\n{BLOCK_END}{EOS}"
        assert later.replace("\n\n", "", 1).startswith(begin.rstrip()) and "hal" in later.partition(end)[0]
        assert later.index(BLOCK_END) < later.index("<tool_result>") and later.count("<tool_result>") == 2
