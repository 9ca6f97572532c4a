import io

import pytest
from rich.console import Console

from dsv4.commands.terminal.chat import command, reply, run
from dsv4.commands.terminal.chat_session import ChatSession


def screen(*lines: str) -> Console:
    """A non-terminal console that reads `lines`."""
    console = Console(file=io.StringIO(), width=100)
    waiting = list(lines)

    def read(*_: object, **__: object) -> str:
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    console.input = read  # type: ignore[method-assign]
    return console


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_reply_comes_in_pieces_of_thinking_and_answer(scripted) -> None:
    session = ChatSession(scripted("so\nso</think>Hello é."))
    pieces = list(session.ask("hi"))
    assert "".join(text for kind, text in pieces if kind == "thinking") == "so\nso"
    assert "".join(text for kind, text in pieces if kind == "answer") == "Hello é."
    assert session.messages[-1] == {"role": "assistant", "content": "Hello é."}
    assert session.num_tokens == len(session.llm.tokenizer.encode("so\nsoHello é.")) + 2  # and two special tokens


def test_outside_a_terminal_the_answer_begins_a_line(scripted) -> None:
    console = screen("hi")
    run(ChatSession(scripted("so</think>Hello.")), console)
    lines = text_of(console).splitlines()
    assert any(line.startswith("│ so") for line in lines) and "Hello." in lines


def test_the_history_and_the_settings_reach_the_prompt(scripted) -> None:
    session = ChatSession(scripted("</think>one", "two", "three"), effort="low", temperature=0.0, seed=7, max_tokens=50)
    list(session.ask("first"))
    session.thinking = False
    list(session.ask("second"))
    session.reset()
    list(session.ask("third"))
    (one, params), (two, _), (three, _) = session.llm.asked
    assert one.endswith("first<｜Assistant｜><think>") and "Reasoning Effort" not in one
    assert (params.temperature, params.seed, params.max_tokens) == (0.0, 7, 50)
    assert two.endswith("first<｜Assistant｜></think>one<｜end▁of▁sentence｜><｜User｜>second<｜Assistant｜></think>")
    assert "first" not in three


def test_an_interrupted_reply_keeps_its_text(scripted) -> None:
    session = ChatSession(scripted("</think>one two three", "x"))
    pieces = session.ask("count")
    said = next(pieces)[1] + next(pieces)[1]
    pieces.close()
    assert said and "one two three".startswith(said)
    assert session.messages == [{"role": "user", "content": "count"}, {"role": "assistant", "content": said}]
    thinking = session.ask("again")
    next(thinking)
    thinking.close()
    assert len(session.messages) == 2, "a question without an answer is forgotten"


def test_commands_change_the_session(scripted) -> None:
    session = ChatSession(scripted())
    assert command(session, "/think") == "thinking is off" and not session.thinking
    assert command(session, "/effort max") == "effort is max" and session.effort == "max"
    assert "one of low, high, max" in command(session, "/effort tiny") and session.effort == "max"
    assert "is not a command" in command(session, "/unknown")
    assert "/reset" in command(session, "/help")


def test_the_loop_answers_shows_thinking_and_leaves_at_the_end(scripted) -> None:
    console = screen("hi", "/think", "", "again")
    run(ChatSession(scripted("deep thought</think>Hello [bold]you[/].", "Plain.")), console)
    shown = text_of(console)
    assert "thinking, " in shown and "deep thought" in shown
    assert "Hello [bold]you[/]." in shown, "what the model writes is not markup"
    assert "thinking is off" in shown and "Plain." in shown and "tokens/s" in shown


def test_ctrl_c_stops_a_reply_and_not_the_chat(scripted, monkeypatch) -> None:
    session = ChatSession(scripted("</think>never ending"))
    real = session.llm.stream

    def interrupted(*arguments):
        for i, event in enumerate(real(*arguments)):
            if i == 4:
                raise KeyboardInterrupt
            yield event

    monkeypatch.setattr(session.llm, "stream", interrupted)
    console = screen()
    reply(session, console, "go")
    assert ", stopped" in text_of(console)
    assert session.messages[-1] == {"role": "assistant", "content": "nev"}


def test_a_conversation_beyond_the_context_is_an_error_message(scripted) -> None:
    session = ChatSession(scripted())
    console = screen()
    reply(session, console, "x" * 5000)
    assert "This model's maximum context length is 4096 tokens" in text_of(console).replace("\n", " ")
    assert session.messages == []


def test_invalid_utf_8_is_an_error_message_and_the_chat_goes_on(scripted) -> None:
    console = screen(b"caf\xe9".decode(errors="surrogateescape"), "hi")
    session = ChatSession(scripted("</think>Hello."))
    run(session, console)
    shown = text_of(console)
    assert "the question: character 3 is byte 0xE9, which is not UTF-8" in shown and "Hello." in shown
    assert [message["content"] for message in session.messages] == ["hi", "Hello."]


def test_a_model_without_a_tokenizer_cannot_chat(model) -> None:
    from dsv4.engine import LLM

    with pytest.raises(ValueError, match="has no tokenizer, so it cannot hold a conversation"):
        ChatSession(LLM(model))
