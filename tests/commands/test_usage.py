"""dsv4 usage: tables and CSV of a ledger."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from dsv4.cli import main
from dsv4.commands.terminal.amounts import counted, dollars
from dsv4.usage.store import insert, open_store
from tests.usage.conftest import record


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two requests of ann at an off-peak hour, one of bob at a peak hour."""
    monkeypatch.setenv("COLUMNS", "120")
    store = open_store(str(tmp_path / "usage.db"))
    insert(
        store,
        [
            record(request_id="1"),
            record(request_id="2", model="nano", cost_usd=None, finish_reason="cancelled"),
            record(request_id="3", user_id="bob", api_key="", time="2026-11-03T07:00:00.000Z"),
        ],
    )
    return str(tmp_path / "usage.db")


def test_a_table_by_day_with_a_total(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", ledger]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:5] == ["day", "requests", "hit", "miss", "output"]
    assert lines[1] == ["2026-11-02", "2", "1,200", "800", "200", "60", "3.0", "0.2500"]
    assert lines[3] == ["total", "3", "1,800", "1,200", "300", "90", "4.5", "0.5000"]
    assert " ".join(lines[4]).startswith("1 request was cancelled") and lines[5][0] == "1"


def test_small_costs_show_their_digits() -> None:
    assert [dollars(usd) for usd in (0.0, 0.000041, 0.0000000123, 0.0099, 0.01, 1234.5)] == [
        *("0.0000", "0.000041", "0.000000012", "0.0099", "0.0100", "1,234.5000")
    ]
    assert (counted(1, "file"), counted(2000, "file")) == ("1 file", "2,000 files")


def test_by_key_user_and_model(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    for by, names in (("key", ["(no key)", "****1234#00000000"]), ("user", ["ann", "bob"]), ("model", ["nano"])):
        assert main(["usage", ledger, "--by", by]) == 0
        out = capsys.readouterr().out
        assert all(name in out for name in names)


def test_csv_by_user_since_a_day(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", ledger, "--by", "user", "--csv", "--since", "2026-11-03", "--until", "2026-11-04"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["user"], row["requests"], row["cost_usd"], row["unpriced"]) == ("bob", "1", "0.25", "0")


def test_csv_by_request_has_every_column(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", ledger, "--by", "request", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["request_id"] for row in rows] == ["1", "2", "3"]
    assert rows[0]["reasoning_tokens"] == "30" and rows[1]["cost_usd"] == ""


def test_prices_of_another_model(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    for by in ("model", "request"):
        assert main(["usage", ledger, "--price-as", "deepseek-flash", "--by", by, "--csv"]) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        off_peak = (600 * 0.003 + 400 * 0.15 + 100 * 0.60) / 1e6
        assert sum(float(row["cost_usd"]) for row in rows) == pytest.approx(off_peak * 4)  # bob's cost twice as much


def test_errors_are_one_line(ledger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(tmp_path / "no.db")], "no.db does not exist"),
        ([ledger, "--since", "yesterday"], "--since is 'yesterday'; allowed: a day or time like 2026-11-28"),
        ([ledger, "--price-as", "nano"], "--price-as is 'nano'; allowed: deepseek-chat, deepseek-flash"),
    ):
        assert main(["usage", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("dsv4 usage: error: ") and message in error and error.count("\n") == 1


def test_no_requests_in_that_time(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", ledger, "--since", "2030-01-01"]) == 0
    assert capsys.readouterr().out == "no requests are recorded in that time\n"
