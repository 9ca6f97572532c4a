import io
import json
import re

import pytest

from dsv4.cli import main
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


SCHEMA = '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": false}'


@pytest.mark.parametrize("in_file", [False, True])
def test_flags_hold_the_output_to_a_schema(in_file: bool, tmp_path, capsys) -> None:
    (tmp_path / "schema.json").write_text(SCHEMA)
    assert main(["generate", "A: ", "--json-schema", str(tmp_path / "schema.json") if in_file else SCHEMA]) == 0
    assert json.loads(capsys.readouterr().out) in ({"a": 1}, {"a": 2})


def test_flags_hold_the_output_to_a_regex_or_choices(capsys) -> None:
    assert main(["generate", "A: ", "--regex", "[0-9]{3}"]) == 0
    assert re.fullmatch(r"[0-9]{3}\n", capsys.readouterr().out)
    assert main(["generate", "A: ", "B: ", "--choice", "yes", "--choice", "no", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 and all(row["text"] in ("yes", "no") and row["finish_reason"] == "stop" for row in rows)


def test_a_constraint_that_cannot_be_kept_is_one_line(capsys) -> None:
    assert main(["generate", "A: ", "--json-schema", '{"uniqueItems": true}']) == 2
    error = capsys.readouterr().err
    assert error.startswith("dsv4 generate: error: SamplingParams.json_schema cannot be compiled: ")
    assert "uniqueItems" in error and error.count("\n") == 1
    assert main(["generate", "A: ", "--json-schema", "no-such-file.json"]) == 2
    assert "no-such-file.json" in capsys.readouterr().err
