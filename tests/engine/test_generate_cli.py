import io
import json

import pytest

from dsv4.engine import generate_cli
from dsv4.engine.llm import LLM


@pytest.fixture
def nano(model, text_folder, monkeypatch) -> LLM:
    model.config = type(model)(300).config
    llm = LLM(model, folder=text_folder)
    monkeypatch.setattr(generate_cli, "LLM", lambda path, **options: llm)
    return llm


def test_one_prompt_prints_its_continuation(nano, capsys) -> None:
    generate_cli.generate(None, ["the cat"], max_tokens=8, seed=1)
    printed = capsys.readouterr().out
    generate_cli.generate(None, ["the cat"], max_tokens=8, seed=1, as_json=True)
    row = json.loads(capsys.readouterr().out)
    assert printed == row["text"] + "\n"
    assert (row["prompt"], len(row["token_ids"]), len(row["logprobs"])) == ("the cat", 8, 8)
    assert row["finish_reason"] == "length"


def test_several_prompts_are_numbered_and_in_order(nano, capsys) -> None:
    generate_cli.generate(None, ["the cat", "the mat"], max_tokens=3, temperature=0.0)
    printed = capsys.readouterr().out
    assert printed.startswith("--- 1\n") and "\n--- 2\n" in printed


def test_a_dash_reads_standard_input(nano, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    generate_cli.generate(None, ["-"], max_tokens=2, as_json=True)
    assert json.loads(capsys.readouterr().out)["prompt"] == "from a pipe"


def test_a_bad_value_is_named_before_the_model_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr(generate_cli, "LLM", lambda path, **options: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="temperature is -1"):
        generate_cli.generate(None, ["x"], temperature=-1.0)
