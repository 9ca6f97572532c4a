import io
import json

import pytest

from dsv4.commands.terminal import generate as program
from dsv4.engine.llm import LLM


@pytest.fixture
def nano(model, text_folder, monkeypatch) -> LLM:
    model.config = type(model)(300).config
    llm = LLM(model, folder=text_folder)
    monkeypatch.setattr(program, "LLM", lambda path, **options: llm)
    return llm


def test_one_prompt_prints_its_continuation(nano, capsys) -> None:
    program.generate(None, ["the cat"], max_tokens=8, seed=1)
    printed = capsys.readouterr().out
    program.generate(None, ["the cat"], max_tokens=8, seed=1, as_json=True)
    row = json.loads(capsys.readouterr().out)
    assert printed == row["text"] + "\n"
    assert (row["prompt"], len(row["token_ids"]), len(row["logprobs"])) == ("the cat", 8, 8)
    assert row["finish_reason"] == "length"


def test_several_prompts_are_numbered_and_in_order(nano, capsys) -> None:
    program.generate(None, ["the cat", "the mat"], max_tokens=3, temperature=0.0)
    printed = capsys.readouterr().out
    assert printed.startswith("--- 1\n") and "\n--- 2\n" in printed


def test_a_dash_reads_standard_input(nano, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    program.generate(None, ["-"], max_tokens=2, as_json=True)
    assert json.loads(capsys.readouterr().out)["prompt"] == "from a pipe"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # Python's settings in a UTF-8 and in a C locale
def test_invalid_utf_8_is_an_error_message(errors: str, nano, monkeypatch) -> None:
    foreign = b"\xff".decode(errors="surrogateescape")
    with pytest.raises(ValueError, match="prompt 2: character 0 is byte 0xFF, which is not UTF-8"):
        program.generate(None, ["the cat", foreign])
    with pytest.raises(ValueError, match=r"SamplingParams.stop\[1\]: character 1 is byte 0xFF"):
        program.generate(None, ["the cat"], stop=["mat", f"a{foreign}"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8", errors=errors))
    with pytest.raises(ValueError, match="prompt 1: character 3 is byte 0xE9, which is not UTF-8"):
        program.generate(None, ["-"])


def test_a_bad_value_is_named_before_the_model_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr(program, "LLM", lambda path, **options: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="temperature is -1"):
        program.generate(None, ["x"], temperature=-1.0)
