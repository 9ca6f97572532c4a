"""`dsv4 bench latency` runs, in small."""

import pytest

from benchmarks.latency import main


def test_it_measures_texts_prompts_and_steps(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--long", "300", "--short", "2", "--answer", "2", "--apart", "0.01", "--steps", "128"]
    assert main(["--megabytes", "0.02", *small]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("0.02 MB, ") and "longest pause of the event loop" in lines[0]
    assert lines[1].startswith("long prompt, 300 tokens: first token after ")
    assert [line.split(":")[0] for line in lines[2:]] == [
        "short prompts, first token after",
        "short prompts, last token after",
        "long prompt alone, 128 tokens a step",
    ]
