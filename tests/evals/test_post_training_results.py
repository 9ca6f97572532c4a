"""results.json: what is refused, what a run should show, and a page with its figures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dsv4.evals.intervals import difference
from dsv4.evals.post_training_results import Count, Effort, Results, make_results, read_results, write_results
from dsv4.evals.results_card import describe_results
from dsv4.evals.results_page import RunRecord, StageRecord, write_page
from dsv4.evals.results_plots import reward_curves
from dsv4.evals.v4_results import differences, largest
from dsv4.post_training.v4_recipe import DOMAINS as V4_DOMAINS
from dsv4.post_training.v4_run import RunFolders

DOMAINS = ("mathematics", "code")


def rows(**changed: int) -> dict[str, dict[str, Count]]:
    """80 right answers of 100 of every model in every domain, but for those `changed`: in its first."""
    names = ["base", "sft", *(f"specialists.{domain}" for domain in DOMAINS), "student", "averaged", "mixed"]
    found = {name: {domain: Count(correct=80, asked=100) for domain in DOMAINS} for name in names}
    for name, correct in changed.items():
        found[name]["mathematics"] = Count(correct=correct, asked=100)
    return found


def results(efforts: dict[str, Effort] | None = None, difference: float | None = 0.0, **changed: int) -> Results:
    return make_results(rows(**changed), efforts or {}, difference)


def test_it_is_written_and_read_with_the_keys_of_its_contract(tmp_path: Path) -> None:
    free = Effort(accuracy=0.6, tokens=30.0)
    made = results({"low": Effort(accuracy=0.5, tokens=20.0, free=free), "max": free})
    write_results(made, tmp_path / "results.json")
    raw: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    assert set(raw) == {"scores", "efforts", "train_serve_max_difference", "fine_tuned", "general"}
    assert set(raw["scores"]) == {"base", "sft", "specialists", "student", "averaged", "mixed"}
    assert raw["scores"]["specialists"]["code"]["code"] == {"correct": 80, "asked": 100}
    bare = {"accuracy": 0.6, "tokens": 30.0, "free": None}
    assert raw["efforts"] == {"low": {"accuracy": 0.5, "tokens": 20.0, "free": bare}, "max": bare}
    assert made.efforts["low"].cells() == ("50.0 %", "20.0", "60.0 %", "30.0")
    assert made.efforts["max"].cells() == ("60.0 %", "30.0", "-", "-")
    assert read_results(tmp_path) == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["scores"].pop("mixed"), r"scores\.mixed: Field required"),
        (lambda raw: raw["scores"]["base"]["code"].update(correct=101), "correct is 101; allowed: 0 to asked, 100"),
        (lambda raw: raw["scores"]["base"]["code"].update(asked=0), "greater than or equal to 1"),
        (lambda raw: raw["scores"]["sft"].pop("code"), r"sft has domains \['mathematics'\]; allowed: those of the"),
        (lambda raw: raw["scores"]["specialists"].pop("code"), r"specialists are \['mathematics'\]; allowed: one of"),
        (
            lambda raw: raw.update(general={"start": {}}),
            r"general has \['start'\]; allowed: start, teacher and student",
        ),
        (lambda raw: raw.update(extra=1), "Extra inputs are not permitted"),
        (lambda raw: raw.update(train_serve_max_difference=-1.0), "greater than or equal to 0"),
    ],
)
def test_what_is_not_whole_is_refused_in_words(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(results(), path)
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        read_results(path)


def test_the_interval_of_a_difference_is_newcombes() -> None:
    low, high = difference((56, 70), (48, 80))  # the first example of his paper, method 10
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)
    assert difference((0, 0), (5, 10))[0] < -0.5 < 0.5 < difference((0, 0), (5, 10))[1]


def test_findings_say_what_a_run_shows() -> None:
    made = rows(sft=50, student=78)
    made["sft"]["code"] = Count(correct=79, asked=100)
    levels = {"low": Effort(accuracy=0.5, tokens=20.0), "high": Effort(accuracy=0.6, tokens=19.0)}
    found = list(make_results(made, levels, 0.0).findings())
    assert [good for good, _ in found] == [True, False, True, False, True, True]
    assert found[4][1] == "right answers do not fall with it: low 50.0 %, high 60.0 %"
    assert "specialist of mathematics minus sft: +16.9 to" in found[0][1]
    assert "student: 98.8 % of the mean" in found[2][1]
    levels["max"] = Effort(accuracy=0.59, tokens=25.0)
    assert not next(good for good, words in make_results(made, levels, 0.0).findings() if words.startswith("right"))
    assert not next(good for good, words in results(student=70).findings() if words.startswith("student"))
    assert not list(results(difference=1e-7).findings())[-1][0]


def test_the_page_stands_alone_and_escapes_what_it_shows() -> None:
    grpo = [{"step": n, "reward": n / 3, "answer_tokens": 20.0} for n in range(4)]
    student = [{"step": 0, "kl_by_teacher": {"code": 0.4}}, {"step": 1, "kl_by_teacher": {"mathematics": 0.2}}]
    stages = [StageRecord("student", "dsv4 train distill 'a <b>'", 61.0, 1234)]
    made = results({"low": Effort(accuracy=0.5, tokens=20.0)}, sft=0)
    page = write_page(made, RunRecord("A <run>", {"code": grpo}, student, stages, {"student": 0.0}))
    assert "A &lt;run&gt;" in page and "a &lt;b&gt;" in page and "1,234" in page and "1:01" in page
    assert page == write_page(made, RunRecord("A <run>", {"code": grpo}, student, stages, {"student": 0.0}))
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_page_and_card_show_what_grpo_added() -> None:
    plain = results()
    before = {domain: Count(correct=60, asked=100) for domain in DOMAINS}
    made = make_results(rows(), {}, 0.0, before)
    assert [(domain, round(100 * low, 1)) for domain, _, _, (low, _) in made.of_grpo()] == [
        ("mathematics", 7.3), ("code", 7.3)
    ]  # fmt: skip
    page, card = write_page(made, RunRecord("A run")), describe_results(made)
    assert "What GRPO added" in page and '<td class="number">+7.3 to +31.9</td>' in page
    assert re.search(r"\| code \| 60\.0 % .*, 60 of 100 \| 80\.0 % .* \| \+7\.3 to \+31\.9 \|", card)
    assert "GRPO added" not in write_page(plain, RunRecord("A run")) and "fine-tuned" not in describe_results(plain)


def test_page_and_card_show_the_general_tasks() -> None:
    rates = {"start": 60, "teacher": 90, "student": 80}
    counts = {name: {"thinking": Count(correct=rate, asked=100)} for name, rate in rates.items()}
    made = make_results(rows(), {}, 0.0, general=counts)
    assert "general tasks, thinking: +7.3 to +31.9 points" in " ".join(words for _, words in made.findings())
    page, card = write_page(made, RunRecord(title="run")), describe_results(made)
    assert "<td>teacher</td>" in page and "90 of 100" in page and "| teacher | 90.0 % (83-94), 90 of 100 |" in card
    lost = make_results(rows(), {}, 0.0, general=counts | {"student": {"thinking": Count(correct=30, asked=100)}})
    assert [good for good, words in lost.findings() if "general tasks" in words] == [False]


def test_a_difference_that_no_step_has_is_not_measured(tmp_path: Path) -> None:
    """GRPO logs none in a step without updates, or with tokens of older weights; that is no difference of 0."""
    folders = RunFolders(tmp_path)
    rows = {folders.student.parent: [{"step": 0, "train_serve_difference": 0.0}]}
    rows |= {folders.specialist(domain).parent: [{"step": 0, "log_ratio_max": 0.1}] for domain in V4_DOMAINS}
    rows[folders.specialist("code").parent] = [{"step": 0, "train_serve_difference": 0.25}, {"step": 1}]
    for folder, lines in rows.items():
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = differences(folders)
    unmeasured = {f"specialists.{domain}": None for domain in V4_DOMAINS if domain != "code"}
    assert found == unmeasured | {"specialists.code": 0.25, "student": 0.0}
    assert largest(found.values()) is None and largest([0.25, 0.0]) == 0.25

    made = results(difference=None)
    write_results(made, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["train_serve_max_difference"] is None
    assert read_results(tmp_path) == made
    good, words = list(made.findings())[-1]
    assert not good and words.endswith("not measured in every run")
    page = write_page(made, RunRecord("A run", differences={"a": None, "b": 0.0}))
    cells = re.findall(r'<tr><td>([ab])</td><td class="number">(.*?)</td></tr>', page)
    assert cells == [("a", "not measured"), ("b", "0")]


def test_rewards_below_zero_are_in_the_picture() -> None:
    runs = {"mathematics": [{"step": step, "reward": (step - 2) / 4} for step in range(5)]}
    shown = re.findall(r">([−\d.]+)</text>", reward_curves(runs))
    assert min(float(text.replace("−", "-")) for text in shown) < -0.3


def test_a_page_of_nothing_right_is_drawn() -> None:
    made = make_results({name: dict.fromkeys(row, Count(correct=0, asked=3)) for name, row in rows().items()}, {}, 0.0)
    assert made.student_share is None and "<svg" in write_page(made, RunRecord("Nothing"))
