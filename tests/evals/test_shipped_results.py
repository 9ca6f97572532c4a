"""The embedded model's results.json: what the run that made it reached, and that its card says so."""

from __future__ import annotations

from dsv4.config import nano_path
from dsv4.evals.post_training_results import STUDENT_SHARE, read_results
from dsv4.evals.results_card import describe_results
from dsv4.post_training.domains.registry import DOMAINS


def test_the_student_is_as_good_as_its_teachers() -> None:
    results = read_results(nano_path())
    assert len(results.domains) == 4 and {*results.domains} <= {*DOMAINS}
    share = results.student_share
    assert share is not None and share >= STUDENT_SHARE
    assert [*results.efforts] == ["low", "high", "max"] and results.efforts_are_ordered
    assert results.train_serve_max_difference == 0.0


def test_the_card_has_the_results_with_what_was_missed() -> None:
    card = (nano_path() / "README.md").read_text(encoding="utf-8")
    assert describe_results(read_results(nano_path())) in card
