"""Problems from files of the user: what a row may hold, how its answers are checked, and which rows are refused."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from dsv4 import notices
from dsv4.post_training import answer_checks
from dsv4.post_training.answer_checks import answer_end, check_answer, check_schema
from dsv4.post_training.data_problems import (
    DataProblem,
    Rows,
    absolute,
    digests,
    read_judgements,
    read_problems,
)
from dsv4.post_training.domains.registry import mixed
from dsv4.post_training.recipes import DistillRecipe, GRPORecipe
from dsv4.post_training.rubric import RubricQuestion
from dsv4.tokenizer.prompts import Ladder, write_effort_ladder
from dsv4.training.recipe import read_recipe

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def test_rows_of_json_and_of_parquet_are_the_same_problems(tmp_path: Path) -> None:
    rows = [
        {"prompt": "2+2?", "answer": 4, "thinking": False},
        {"messages": CHAT, "answer": "2", "check": "math", "domain": "sums", "reasoning_effort": "max"},
        {"messages": CHAT, "rubric": "A polite answer."},
    ]
    lines = read_problems([write(tmp_path / "p.jsonl", rows)])
    names = sorted({name for row in rows for name in row})
    columns = {name: [row.get(name) for row in rows] for name in names}
    columns["answer"] = ["4", "2", None]  # a column has one type
    parquet.write_table(pa.table(columns), tmp_path / "p.parquet")
    for first, second, third in (lines, read_problems([str(tmp_path / "p.parquet")])):
        assert isinstance(first, DataProblem) and isinstance(second, DataProblem) and isinstance(third, RubricQuestion)
        assert (first.domain, first.thinking, first.answer, first.check) == ("data", False, "4", "exact")
        assert (second.domain, second.thinking, second.answer, second.check) == ("sums", True, "2", "math")
        assert [message.content for message in second.prompt().messages] == ["Be brief.", "1+1?"]
        assert second.prompt().reasoning_effort == "max" and second.prompt().thinking_mode
        assert not first.prompt().thinking_mode and first.reward(" 4\n") == 1.0 and first.reward("4.") == 0.0
        assert third.question == "System:\nBe brief.\n\nUser:\n1+1?" and third.known is None
    assert [problem.key for problem in lines] == [f"{tmp_path / 'p.jsonl'}:{line}" for line in (1, 2, 3)]


@pytest.mark.parametrize(
    ("wanted", "answer", "right"),
    [
        ("42", "So it is \\boxed{42}, and not 41.", True), ("42", "First 40+2.\nThe answer is 42.", True),
        ("42", "40+2", False), ("42", "\\boxed{40+2}", False), ("42", "42 or 43", False), ("42", "", False),
        ("42", "It is not 42.", False), ("42", "The answer is 42 million.", False), ("42", "\\boxed{minus 42}", False),
        ("x^2+1", "\\boxed{1+x^{2}}", True), ("x^2+1", "$1 + x^2$", True), ("x^2+1", "x^2", False),
        ("\\frac{1}{2}", "\\boxed{\\frac{2}{4}}", True), ("\\frac{1}{2}", "0.5", True),
        ("x^2+1", "x^2+1" + "+0" * 500, False),
    ],
)  # fmt: skip
def test_mathematics_compares_the_end_of_an_answer(wanted: str, answer: str, right: bool) -> None:
    """An expression does not answer a question whose answer is a number: it would be the question itself."""
    pytest.importorskip("math_verify")
    assert check_answer("math", wanted, answer) == right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('{"name": "Ann", "age": 3}', True), ('\n```json\n{"name": "Ann", "age": 3}\n```\n', True),
        ('{"name": "Ann"}', False), ('{"name": "Ann", "age": "3"}', False), ('So: {"name": "Ann", "age": 3}', False),
        ("", False), ("{" * 5000, False), ("[" * 200_000, False), ('{"name": "Ann", "age": NaN}', False),
    ],
)  # fmt: skip
def test_a_schema_has_to_be_fulfilled_by_the_whole_answer(answer: str, right: bool, tmp_path: Path) -> None:
    schema = {"type": "object", "required": ["name", "age"], "properties": {"age": {"type": "integer"}}}
    rows = [{"prompt": "Who?", "check": "schema", "answer": given} for given in (schema, json.dumps(schema))]
    for problem in read_problems([write(tmp_path / "p.jsonl", rows)]):
        assert problem.reward(answer) == right


@pytest.mark.parametrize(
    ("schema", "answer", "right"),
    [
        ({"type": "number", "multipleOf": 0.01}, "1e999", False),
        ({"type": "number", "multipleOf": 0.01}, "1" + "0" * 400, False),
        ({"type": "number"}, "NaN", False),
        ({"type": "number"}, "-1e999", False),
        ({"minimum": 3}, "Infinity", False),
        ({"type": "number"}, "1e99", True),
    ],
)
def test_numbers_that_json_lacks_fulfil_no_schema(schema: dict[str, Any], answer: str, right: bool) -> None:
    assert check_answer("schema", check_schema(schema), answer) == right


OLD = "http://json-schema.org/draft-07/schema#"


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$schema": 5}, r"\$schema is 5; allowed: a text"),
        ({"$ref": "http://example.com/x.json"}, r"\$ref is 'http://example.com/x.json', which is not in it"),
        ({"$ref": "#/definitions/a"}, r"\$ref is '#/definitions/a', which is not in it"),
        ({"$schema": OLD, "properties": {"a": {"items": [{"$ref": "#/definitions/b"}]}}}, "'#/definitions/b', which"),
        ({"$dynamicRef": "#b"}, r"\$dynamicRef is '#b', which is not in it"),
        ({"$ref": "#/x", "x": {"$ref": "#/y"}}, "'#/y', which is not in it"),
        ({"$ref": "#/x", "x": 5}, "5 is not of type 'object', 'boolean'"),
        ({"$ref": "#/x/y", "x": [1]}, "'#/x/y', which is not in it"),
        ({"pattern": "a{99999999999999}"}, "the repetition number is too large"),
        ({"minimum": float("nan")}, "Out of range float values"),
        ('{"minimum": 1e999}', "1e999 is no JSON number"),
    ],
)
def test_a_schema_that_cannot_judge_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"answer is no JSON schema, which check schema needs: .*{message}"):
        check_schema(schema)


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"$defs": {"a": {"type": "integer"}}, "$ref": "#/$defs/a"}, "1", "1.5"),
        (
            {"$schema": OLD, "definitions": {"a": {"type": "integer"}}, "items": {"$ref": "#/definitions/a"}},
            "[1]",
            "[0.5]",
        ),
        ({"properties": {"a": {"$ref": "#"}}, "type": "object"}, '{"a": {}}', '{"a": 1}'),
        ({"$id": "http://a/b", "$ref": "d", "$defs": {"d": {"$id": "d", "type": "null"}}}, "null", "1"),
        ({"$ref": "#a", "$defs": {"q": {"$anchor": "a", "type": "null"}}}, "null", "1"),
        ({"$ref": "https://json-schema.org/draft/2020-12/schema"}, '{"type": "null"}', '{"type": 5}'),
        ({"enum": [{"$ref": "#/none"}]}, '{"$ref": "#/none"}', "1"),
        ({"properties": {"$ref": {"type": "null"}}}, '{"$ref": null}', '{"$ref": 1}'),
        (
            {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "definitions": {"b": {"type": "null"}},
                "properties": {"x": {"$ref": "#/definitions/b", "properties": {"y": {"$ref": "#/definitions/none"}}}},
            },
            '{"x": null}',
            '{"x": {}}',
        ),
    ],
)
def test_a_schema_may_refer_to_its_own_parts(schema: dict[str, Any], right: str, wrong: str) -> None:
    text = check_schema(schema)
    assert (check_answer("schema", text, right), check_answer("schema", text, wrong)) == (1.0, 0.0)


def test_many_references_to_one_part_are_checked_once() -> None:
    part = {"properties": {f"p{n}": {"type": "string", "minLength": n} for n in range(60)}}
    schema = {"$defs": {"a": part}, "properties": {f"x{n}": {"$ref": "#/$defs/a"} for n in range(200)}}
    began = time.process_time()
    check_schema(schema)
    assert time.process_time() - began < 5.0  # each time it would be some twenty


def test_a_schema_refers_to_nothing_outside() -> None:
    with pytest.raises(ValueError, match="the schema refers to 'http://localhost/a.json', which is not in it"):
        check_answer("schema", '{"$ref": "http://localhost/a.json"}', "{}")


def test_the_end_of_an_answer() -> None:
    assert answer_end("a \\boxed{1} b \\boxed{\\frac{1}{2}} c") == "\\frac{1}{2}"
    assert answer_end("one\n two \n\n") == "two"
    assert (answer_end("\\boxed{1"), answer_end("")) == ("\\boxed{1", "")


def test_bad_rows_are_refused_with_file_line_and_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "_told", set())
    wrong: list[tuple[Any, str]] = [
        ("{", "no JSON"),
        ({"prompt": "x"}, "no answer, no tests and no rubric; allowed: one of them, or answer and"),
        ({"answer": "x"}, "neither messages nor prompt; it has ['answer']"),
        ({"prompt": "x", "messages": CHAT, "answer": "x"}, "both messages and prompt; allowed: one of them"),
        ({"prompt": "x", "answer": "x", "check": "regex"}, "check is 'regex'; allowed: exact, math, schema"),
        ({"prompt": "x", "answer": " "}, "answer is ' '; allowed: a text that is not empty"),
        ({"prompt": "x", "answer": True}, "answer is True; allowed: a text that is not empty"),
        ({"prompt": 3, "answer": "x"}, "prompt is 3; allowed: a text"),
        ({"prompt": "x", "answer": "x", "thinking": "no"}, "thinking is 'no'; allowed: true, false"),
        ({"messages": ["x"], "answer": "x"}, "messages is no list of objects with a role"),
        ({"messages": [*CHAT, {"role": "assistant", "content": "2"}], "answer": "x"}, "the last message is of 'assist"),
        ({"messages": [{"role": "user"}], "answer": "x"}, "missing field `content`"),
        ({"prompt": "x", "rubric": "good \ud800"}, "rubric: character 5 is U+D800, half of a surrogate pair"),
        ({"prompt": "x", "answer": "\udfff"}, "answer: character 0 is U+DFFF"),
        ({"prompt": "x", "answer": "x", "domain": "d\ud800"}, "domain: character 1 is U+D800"),
        ({"messages": [{"role": "user", "content": "\ud800"}], "answer": "x"}, "escapes that are no text"),
        (
            {"prompt": "x", "check": "schema", "answer": "x"},
            "no JSON schema, which check schema needs: Expecting",
        ),
        ({"prompt": "x", "check": "schema", "answer": {"type": "text"}}, "schema needs: 'text' is not valid under any"),
        (
            {"prompt": "x", "check": "schema", "answer": [1]},
            "no JSON schema, which check schema needs: it is no",
        ),
        ({"prompt": "x", "answer": "x", "reasoning_effort": True}, "reasoning_effort: invalid type: boolean `true`"),
    ]
    path = write(tmp_path / "p.jsonl", [{"prompt": "x", "answer": "y"}, *(row for row, _ in wrong)])
    with caplog.at_level(logging.WARNING):
        assert len(read_problems([path])) == 1
    assert len(caplog.messages) == len(wrong)
    for line, (message, (_, reason)) in enumerate(zip(caplog.messages, wrong, strict=True), 2):
        assert message.startswith(f"refused: {path}:{line}: ") and reason in message
    many = write(tmp_path / "many.jsonl", [{"prompt": "x", "answer": "y"}, *["{"] * 30])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        read_problems([many])
    assert len(caplog.messages) == 21 and caplog.messages[-1] == f"10 more rows of {many} are refused"


def test_files_without_a_problem_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = write(tmp_path / "bad.jsonl", ["{", "["])
    with pytest.raises(ValueError, match=r"no row of 2 can be used; the first: .*bad\.jsonl:1: no JSON"):
        read_problems([bad])
    (tmp_path / "p.txt").write_text("text")
    with pytest.raises(ValueError, match=r"p\.txt: files that end in \.jsonl, \.ndjson, \.parquet are allowed"):
        read_problems([str(tmp_path / "p.txt")])
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file"):
        read_problems([str(tmp_path / "none.jsonl")])
    good = write(tmp_path / "good.jsonl", [{"prompt": "x", "answer": "y"}])
    monkeypatch.setattr(answer_checks, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"check is math, which needs math-verify \(pip install math-verify\)"):
        read_problems([good], "math")


def test_judgements_have_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = {"question": "Say hello.", "answer": "Hello!"}
    labels = ["good", "bad", 7, "fine", 11, True, None]
    path = write(tmp_path / "j.jsonl", [asked | {"label": label} for label in labels])
    with caplog.at_level(logging.WARNING):
        found = read_judgements([path], thinking=False)
    assert [one.label for one in found] == [10, 0, 7] and not found[0].thinking
    assert found[0].reward("Score: 10") == 1.0 and "A good answer: 10." in str(found[0].prompt().messages[0].content)
    assert f"{path}:4: label is 'fine'; allowed: good, bad, 0 to 10" in caplog.messages[0] and len(caplog.messages) == 4
    whole = asked | {"label": "good", "rubric": "Polite."}
    halves = [whole | {name: "x \ud800"} for name in ("question", "answer", "rubric")]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        (own,) = read_judgements([write(tmp_path / "k.jsonl", [whole, *halves])])
    assert own.rubric == "Polite." and own.thinking and len(caplog.messages) == 3
    assert f"{tmp_path / 'k.jsonl'}:2: question: character 2 is U+D800, half of" in caplog.messages[0]


@pytest.mark.parametrize("schema", [GRPORecipe, DistillRecipe])
def test_an_effort_that_is_a_number_needs_a_model_with_a_ladder_of_numbers(
    schema: type[GRPORecipe | DistillRecipe], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": str(effort), "answer": "y", "reasoning_effort": effort} for effort in ("max", 50)]
    data = write(tmp_path / "p.jsonl", rows)
    recipe = read_recipe(schema, None, [f"problems.data={data}"])
    asked: dict[Ladder, set[str]] = {}
    for ladder in get_args(Ladder):
        write_effort_ladder(tmp_path, ladder)
        with caplog.at_level(logging.WARNING):
            source = recipe.for_model(tmp_path).source()
        asked[ladder] = {str(source.problem(number).prompt().messages[-1].content) for number in range(2)}
    assert asked == {"preview": {"max"}, "0731": {"max"}, "scalar": {"max", "50"}}
    reason = "reasoning_effort is 50, a number, and the model's ladder of efforts is preview; allowed: a level"
    assert any(f"refused: {data}:2: {reason}" in line for line in caplog.messages)


def test_every_row_is_asked_once_in_each_epoch_in_another_order(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": str(n), "answer": "x"} for n in range(7)])
    rows = Rows(read_problems([path]), seed=3)
    epochs = [[rows.problem(7 * epoch + n).key for n in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs) and len({*map(tuple, epochs)}) == 3
    assert rows.problem(9) == Rows(read_problems([path]), seed=3).problem(9)


def test_a_recipe_mixes_rows_with_tasks_and_judgements_by_weight(tmp_path: Path) -> None:
    data = write(tmp_path / "p.jsonl", [{"prompt": "x", "answer": "y"}])
    judged = write(tmp_path / "j.jsonl", [{"question": "x", "answer": "y", "label": "bad"}])
    keys = [f"problems.data={data}", "problems.tasks=['gcd']", "problems.data_weight=2", f"judge.data={judged}"]
    source = read_recipe(GRPORecipe, None, [*keys, "judge.weight=3"]).source()
    domains = [source.problem(number).domain for number in range(600)]
    shares = {name: domains.count(name) / 600 for name in ("gcd", "data", "judge")}
    assert shares == pytest.approx({"gcd": 1 / 6, "data": 2 / 6, "judge": 3 / 6}, abs=0.06)
    alone = read_recipe(GRPORecipe, None, [f"judge.data={judged}"]).source()
    assert alone.problem(5).domain == "judge"
    efforts = ["problems.efforts=['low', 'max']", *keys]
    asked = [read_recipe(GRPORecipe, None, efforts).source().problem(number) for number in range(60)]
    assert {one.prompt().reasoning_effort for one in asked if one.domain == "data"} == {"low", "max"}
    assert len({one.prompt().reasoning_effort for one in asked if one.domain == "judge"}) == 1
    with pytest.raises(ValueError, match="effort_domains has dta, which is not asked; allowed: gcd, data"):
        read_recipe(GRPORecipe, None, [*efforts, "problems.effort_domains=['dta']"]).source()


def test_a_mixture_of_one_source_is_the_source() -> None:
    rows = Rows(())
    assert mixed([(rows, 2.0)], 1) is rows


def test_distillation_needs_prompts_only(tmp_path: Path) -> None:
    data = write(tmp_path / "p.jsonl", [{"prompt": "x"}])
    problem = read_recipe(DistillRecipe, None, [f"problems.data={data}"]).source().problem(0)
    with pytest.raises(TypeError, match="has no answer: it can be distilled on, not rewarded"):
        problem.reward("x")
    with pytest.raises(ValueError, match="no answer, no tests and no rubric"):
        read_recipe(GRPORecipe, None, [f"problems.data={data}"]).source()


def test_files_are_named_and_compared_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.jsonl", [{"prompt": "x"}])
    assert absolute(["p.jsonl", "hf:owner/name"]) == (str(tmp_path / "p.jsonl"), "hf:owner/name")
    before = digests(["p.jsonl"])
    assert before == digests(absolute(["p.jsonl"])) and before.endswith(" p.jsonl\n")
    write(tmp_path / "p.jsonl", [{"prompt": "y"}])
    assert digests(["p.jsonl"]) != before
