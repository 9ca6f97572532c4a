"""`dsv4 eval`: what is wrong with its flags is said before anything is scored."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")

from dsv4.commands.terminal import eval as command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data DIR", "--data alone; allowed: both --data and --corpus"),
        ("--corpus DIR", "--corpus alone"),
        ("--ledger DIR/results.jsonl", "--ledger is for open, definitions, bytes, needles; allowed: with --data"),
        ("--needle-lengths 512", "--needle-lengths is for"),
        ("--needle-tests 0", "allowed: a whole number, 1 or more"),
        ("--parts needles", "need --data and --corpus"),
        ("--parts needles --data DIR --corpus DIR --answers DIR/a.jsonl", "--answers are of the tasks"),
        ("--output DIR/none/x.json", "there is no folder"),
        ("--answers DIR/none/x.jsonl", "there is no folder"),
        ("--card DIR", "allowed: the folder of a run of nano, or a model's README.md"),
    ],
)
def test_wrong_flags_are_named_before_anything_is_scored(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "evaluate", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(SystemExit) as stopped:
        command.main(words.replace("DIR", str(tmp_path)).split())
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_scores_are_shown_before_files_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes of scoring are not lost with a card that cannot be written."""
    monkeypatch.setattr(command, "evaluate", lambda *_, **__: ([], []))
    card = tmp_path / "README.md"
    card.write_text("no card")
    with pytest.raises(ValueError, match="has no section Training"):
        command.main(["--json", "--output", str(tmp_path / "scores.json"), "--card", str(card)])
    assert '"suite"' in capsys.readouterr().out and '"suite"' in (tmp_path / "scores.json").read_text()
