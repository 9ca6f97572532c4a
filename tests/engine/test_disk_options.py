"""Options of the disk cache: what does not fit is refused or named in the log, and sizes have units."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dsv4.engine import LLM
from dsv4.model.transformer import Transformer

from ..model.tiny import random_model
from .prefixes import CONFIG, greedy, open_llm, prompt_of, same, stats


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(CONFIG)


def test_options_that_do_not_fit_are_named(model: Transformer, tmp_path: Path) -> None:
    for window in ("half", "periodic", "periodic:0", "periodic:-1", "periodic:1.5", "", "FULL"):
        with pytest.raises(ValueError, match="cache_window is .*; allowed: full, periodic:N"):
            LLM(model, cache_window=window)
    with pytest.raises(ValueError, match="cache_dir is .* and enable_prefix_caching False; allowed is one of them"):
        LLM(model, cache_dir=tmp_path, enable_prefix_caching=False)
    with pytest.raises(ValueError, match="cache_bytes is -1; allowed: 0 or more bytes"):
        LLM(model, cache_bytes=-1)


@pytest.mark.parametrize("name", ["file", "file/below", "dangling/below"])
def test_a_folder_that_cannot_be_made_is_an_error_at_the_start(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from dsv4.cli import main

    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "dangling").symlink_to("/proc/nope")
    folder = tmp_path / name
    with pytest.raises(ValueError, match=f"cache_dir is '{folder}', which cannot be made or used: .*Errno"):
        LLM("a model that is not even looked for", cache_dir=folder)
    assert main(["generate", "a", "--cache-dir", str(folder)]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1 and shown[0].startswith(f"dsv4 generate: error: --cache-dir is '{folder}', which cannot be")


def test_an_empty_name_is_no_folder(model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cache_dir is ''; allowed: a folder, which is made where there is none"):
        LLM(model, cache_dir="")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_taken_away_later_is_a_line_in_the_log(
    model: Transformer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    llm = open_llm(model, folder)
    want = llm.generate([prompt_of(300)], greedy())
    llm.flush()
    shutil.rmtree(folder)
    folder.write_text("now a file")
    llm.reset_prefix_cache()
    assert same(llm.generate([prompt_of(300)], greedy()), want)
    llm.close()
    assert len(caplog.records) == 1 and "nothing more is stored" in caplog.text


def test_a_budget_that_holds_no_state_is_refused_and_the_least_one_stores(model: Transformer, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="cache_bytes is 1000; allowed: [0-9]+ or more bytes, room for the index"
    ) as no:
        LLM(model, cache_dir=tmp_path, cache_bytes=1000)
    least = int(str(no.value).split("allowed: ")[1].split()[0])
    with pytest.raises(ValueError, match=f"cache_bytes is {least - 1}; allowed: {least} or more"):
        LLM(model, cache_dir=tmp_path, cache_bytes=least - 1)
    llm = LLM(model, cache_dir=tmp_path, cache_bytes=least)
    for length in (140, 150, 160):
        llm.generate([prompt_of(length)], greedy())
        llm.flush()
        assert sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) <= least
    assert stats(llm).num_writes == 3, "the block of each; states beside it do not fit and take nothing of it away"
    llm.close()
    again = open_llm(model, tmp_path)
    assert again.generate([prompt_of(160)], greedy())[0].cached_tokens >= 128
    again.close()


def test_sizes_have_units(capsys: pytest.CaptureFixture[str]) -> None:
    from dsv4.cli import build_parser

    for text, size in (
        ("4G", 4 << 30),
        ("1.5M", 3 << 19),
        ("10KiB", 10240),
        ("7", 7),
        ("2gb", 2_000_000_000),
        ("1T", 1 << 40),
    ):
        assert build_parser().parse_args(["serve", "--cache-bytes", text]).cache_bytes == size
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--cache-bytes", "many"])
    assert "size 'many'; allowed: a number of bytes, or with a unit, as in 500M, 8G or 1.5T" in capsys.readouterr().err
