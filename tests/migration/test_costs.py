"""Costs of usage exports in every form."""

from __future__ import annotations

import io
import json
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dsv4.cli import main
from dsv4.migration.costs import Costs, recalculate, vendor_costs
from dsv4.migration.exports import read_export
from dsv4.usage.prices import Tokens, price_list
from dsv4.usage.report import write_records
from tests.usage.conftest import record

TODAY = datetime(2026, 11, 28, tzinfo=UTC)
HEADER = "user_id,start_time_iso,end_time_iso,model,api_key_name,api_key,type,price,amount\n"
OLD_HEADER = "user_id,utc_date,model,api_key_name,api_key,type,price,amount\n"


def costs(path: Path) -> list[Costs]:
    return recalculate(read_export(path), price_list(), "deepseek-flash", TODAY)


def deepseek_export(day: str, model: str, hit: str, miss: str, output: str) -> str:
    """Rows of one day: a million tokens of each kind in 5 requests, with their prices per token."""
    following = f"{day[:-2]}{int(day[-2:]) + 1:02d}"
    start = f"u,{day}T00:00:00+00:00,{following}T00:00:00+00:00,{model},key,sk-1***2,"
    rows = (("input_cache_hit_tokens", hit), ("input_cache_miss_tokens", miss), ("output_tokens", output))
    return "".join(f"{start}{kind},{price},1000000\n" for kind, price in rows) + f"{start}request_count,,5\n"


def test_deepseeks_export_has_the_price_of_its_hours(tmp_path: Path) -> None:
    """In USD the billed price says whether the hours were peak hours; in another currency they stay unknown."""
    path = tmp_path / "amount.csv"
    path.write_text(
        HEADER + deepseek_export("2026-10-08", "deepseek-v4-pro", "0.000000044", "0.00000132", "0.00000396")
    )
    (row,) = costs(path)
    assert (row.requests, row.tokens) == (5, Tokens(1_000_000, 1_000_000, 1_000_000))
    assert row.low == row.high == pytest.approx(0.044 + 1.32 + 3.96)
    assert (row.today_off_peak, row.today_peak) == (pytest.approx(0.753), pytest.approx(1.506))
    path.write_text(HEADER + deepseek_export("2026-10-08", "deepseek-v4-pro", "3e-7", "9e-6", "2.7e-5"))
    (row,) = costs(path)
    assert (row.low, row.high) == (pytest.approx(0.022 + 0.66 + 1.98), pytest.approx(0.044 + 1.32 + 3.96))


def test_v3s_usage_has_the_prices_of_its_days(tmp_path: Path) -> None:
    path = tmp_path / "amount.csv"
    rows = [
        "u,20251001,deepseek-chat,key,sk-1,input_cache_miss_tokens,0.00000028,1000000",
        "u,2026-01-01,deepseek-reasoner,key,sk-1,output_tokens,0.00000042,1000000",
        "u,2026-01-01,deepseek-reasoner,key,sk-1,search_count,0.00075,3",
        "u,2024-01-01,deepseek-chat,key,sk-1,output_tokens,0.00000028,1000000",
    ]
    path.write_text(OLD_HEADER + "\n".join(rows) + "\n")
    chat, reasoner = costs(path)
    assert (chat.model, chat.low, chat.high, chat.unpriced) == ("deepseek-chat", pytest.approx(0.28), chat.low, 1)
    assert (reasoner.low, reasoner.high, reasoner.unpriced) == (pytest.approx(0.42), reasoner.low, 0)


def test_the_platforms_zip_file(tmp_path: Path) -> None:
    path = tmp_path / "usage_data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        rows = deepseek_export("2026-10-08", "deepseek-flash", "0.000000003", "0.00000015", "0.0000006")
        archive.writestr("usage/amount-2026-10-01_2026-10-31.csv", "\ufeff" + HEADER + rows)
        archive.writestr("usage/cost-2026-10-01_2026-10-31.csv", "user_id,cost\nu,1\n")
    (row,) = costs(path)
    assert row.low == row.high == pytest.approx(0.753)


def test_the_ledgers_csv_has_hours_and_reasoning(tmp_path: Path) -> None:
    file = io.StringIO()
    write_records(file, [record(request_id="1"), record(request_id="2", time="2026-11-03T07:00:00.000Z")])
    path = tmp_path / "usage.csv"
    path.write_text(file.getvalue())
    (row,) = costs(path)
    assert (row.requests, row.tokens.reasoning) == (2, 60)
    assert row.low == row.high == pytest.approx(3 * (600 * 0.022 + 400 * 0.66 + 100 * 1.98) / 1e6)


def test_jsonl_of_every_vendors_answers(tmp_path: Path) -> None:
    noon = 1_793_880_000  # 2026-11-05T12:00Z, off-peak
    chat = {
        "created": noon,
        "model": "deepseek-v4-pro",
        "usage": {
            "prompt_tokens": 1000,
            "completion_tokens": 100,
            "prompt_tokens_details": {"cached_tokens": 600},
            "completion_tokens_details": {"reasoning_tokens": 30},
        },
    }
    responses = {
        "created_at": noon,
        "model": "deepseek-v4-pro",
        "usage": {"input_tokens": 1000, "input_tokens_details": {"cached_tokens": 600}, "output_tokens": 100},
    }
    messages = {
        "time": "2026-11-05T12:00:00Z",
        "model": "deepseek-v4-pro",
        "usage": {"input_tokens": 400, "cache_read_input_tokens": 600, "output_tokens": 100},
    }
    batch = {"custom_id": "a", "response": {"status_code": 200, "body": chat}}
    failed = {"custom_id": "b", "response": {"status_code": 500, "body": {"error": {}}}}
    undated = {"model": "deepseek-v4-pro", "usage": {"prompt_tokens": 10, "completion_tokens": 0}}
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, [chat, responses, messages, batch, failed])) + "\n\n")
    (row,) = costs(path)
    assert row.requests == 4 and row.tokens == Tokens(2400, 1600, 400, 60)
    assert row.low == row.high == pytest.approx(4 * (600 * 0.022 + 400 * 0.66 + 100 * 1.98) / 1e6)
    path.write_text(json.dumps(undated))
    assert costs(path)[0].undated == 1


def test_cached_tokens_in_the_fields_of_two_vendors_count_once(tmp_path: Path) -> None:
    """As LiteLLM answers for Anthropic's models, and with one of the fields only."""
    both = {
        "prompt_tokens": 100,
        "completion_tokens": 5,
        "total_tokens": 105,
        "prompt_tokens_details": {"cached_tokens": 80},
        "cache_read_input_tokens": 80,
        "cache_creation_input_tokens": 0,
    }
    one = {name: value for name, value in both.items() if name != "prompt_tokens_details"}
    path = tmp_path / "answers.jsonl"
    for usage in (both, one):
        path.write_text(json.dumps({"model": "deepseek-v4-pro", "usage": usage}))
        assert costs(path)[0].tokens == Tokens(80, 20, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "begins with the columns a, b; allowed: DeepSeek's export"),
        (OLD_HEADER + "u,someday,m,k,s,output_tokens,1,1\n", "x.csv line 2 cannot be read: Invalid isoformat"),
        (
            '{"usage": {"prompt_tokens": 1, "prompt_cache_hit_tokens": 2}}\n',
            "line 1 cannot be read: its usage does not",
        ),
        ('{"usage": {}}\n{"us', "x.csv line 2 cannot be read"),
    ],
)
def test_an_unreadable_export_is_an_error_with_its_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.csv").write_text(text)
    assert main(["migrate", "--usage", str(tmp_path / "x.csv")]) == 2
    assert message in capsys.readouterr().err


def test_other_vendors_cost_by_their_lists() -> None:
    tokens = Tokens(hit=1_000_000, miss=1_000_000, output=1_000_000)
    found = {price.model: cost for price, cost in vendor_costs(tokens, price_list())}
    assert found["claude-opus-5-5"] == pytest.approx(24.20)
    assert found["gpt-5.5"] == pytest.approx(35.50)
    assert found["gemini-3.8-flash"] == pytest.approx(5.25), "cached tokens without a price cost as much as others"
    assert list(found.values()) == sorted(found.values())


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")  # too narrow: numbers stay whole
    path = tmp_path / "amount.csv"
    path.write_text(HEADER + deepseek_export("2026-10-08", "deepseek-v4-pro", "3e-7", "9e-6", "2.7e-5"))
    assert main(["migrate", "--usage", str(path)]) == 0
    out = capsys.readouterr().out
    assert "2.6620 - 5.3240" in out and "peak hours are not known" in out
    assert "claude-opus-5-5" in out and "2026-10-10" in out and "https://" in out
