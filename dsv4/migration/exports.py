"""Usage exports: DeepSeek's own, this server's ledger, and logs of OpenAI-style answers.

DeepSeek's export is the platform's ZIP file or an amount-*.csv of it: a row per day or hour, model, key and kind of
token, with the price per token in the account's currency. Its older form has utc_date in place of the two times.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

from dsv4.usage.prices import Tokens, parse_time

MAX_BYTES = 1 << 30  # of a file in a ZIP file, unpacked
_KINDS = {
    "input_cache_hit_tokens": "hit",
    "input_cache_miss_tokens": "miss",
    "input_tokens": "miss",
    "output_tokens": "output",
}
FORMS = (
    "DeepSeek's export (its ZIP file or amount-*.csv), the CSV of dsv4 usage --by request, or JSONL with OpenAI's usage"
)


@dataclass(frozen=True)
class UsageLine:
    """Usage of some requests to one model, from `start` until before `end`, or at `start` if both are the same."""

    model: str
    start: datetime
    end: datetime
    tokens: Tokens
    requests: int
    price: float | None = None  # of a million of its tokens, as billed, in an unknown currency
    dated: bool = True  # False: the export has no time, which is taken as now


def read_export(path: Path) -> Iterator[UsageLine]:
    """Lines of a usage export, whose form is found out. ValueError names the line that is none."""
    if zipfile.is_zipfile(path):
        yield from _read_zip(path)
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        if first.lstrip().startswith("{"):
            yield from _read_jsonl(path.name, file)
        else:
            yield from _read_csv(path.name, file)


def _read_zip(path: Path) -> Iterator[UsageLine]:
    with zipfile.ZipFile(path) as archive:
        names = [info for info in archive.infolist() if Path(info.filename).name.startswith("amount")]
        if not names:
            raise ValueError(f"{path.name} holds no amount-*.csv; allowed: {FORMS}")
        for info in names:
            if info.file_size > MAX_BYTES:
                raise ValueError(f"{info.filename} in {path.name} has {info.file_size} bytes; allowed: {MAX_BYTES}")
            with archive.open(info) as file:
                yield from _read_csv(info.filename, io.TextIOWrapper(file, "utf-8-sig", newline=""))


def _read_csv(name: str, file: io.TextIOBase | Any) -> Iterator[UsageLine]:
    reader = csv.DictReader(file)
    columns = set(reader.fieldnames or ())
    if {"model", "type", "price", "amount"} <= columns and ({"utc_date"} <= columns or {"start_time_iso"} <= columns):
        read = _deepseek_line
    elif {"time", "model", "cache_hit_tokens", "cache_miss_tokens", "completion_tokens"} <= columns:
        read = _ledger_line
    else:
        raise ValueError(f"{name} begins with the columns {', '.join(sorted(columns))}; allowed: {FORMS}")
    for row in reader:
        try:
            line = read(row)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{name} line {reader.line_num} cannot be read: {error}") from error
        if line is not None:
            yield line


def _deepseek_line(row: Mapping[str, str]) -> UsageLine | None:
    """Line of a row of DeepSeek's export; None for a kind that is neither tokens nor requests, such as searches."""
    if row.get("start_time_iso"):
        start, end = parse_time(row["start_time_iso"]), parse_time(row["end_time_iso"])
    else:
        start = parse_time(row["utc_date"])
        end = start + timedelta(days=1)
    amount = int(float(row["amount"] or 0))
    if row["type"] == "request_count":
        return UsageLine(row["model"], start, end, Tokens(), amount)
    if row["type"] not in _KINDS:
        return None
    price = float(row["price"]) * 1e6 if row["price"] else None
    return UsageLine(row["model"], start, end, Tokens(**{_KINDS[row["type"]]: amount}), 0, price)


def _ledger_line(row: Mapping[str, str]) -> UsageLine:
    when = parse_time(row["time"])
    hit, miss, output = (int(row[name]) for name in ("cache_hit_tokens", "cache_miss_tokens", "completion_tokens"))
    tokens = Tokens(hit, miss, output, int(row.get("reasoning_tokens") or 0))
    return UsageLine(row["model"], when, when, tokens, 1)


def _read_jsonl(name: str, file: io.TextIOBase | Any) -> Iterator[UsageLine]:
    """Lines of answers: the response objects of Chat Completions, Responses or Messages, maybe inside of another."""
    now = datetime.now(UTC)
    for number, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            answer = _answer(cast(object, json.loads(text)))
            if answer is None:
                continue  # such as a failed request of a batch
            when = _answer_time(answer)
            tokens = _answer_tokens(cast("dict[str, Any]", answer["usage"]))
            yield UsageLine(str(answer.get("model", "")), when or now, when or now, tokens, 1, dated=when is not None)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{name} line {number} cannot be read: {error}") from error


def _answer(value: object) -> dict[str, Any] | None:
    """The object with `usage` in a line: itself, or inside `response` or `body`, as in the files of batches."""
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    found = cast("dict[str, Any]", value)
    if isinstance(found.get("usage"), dict):
        return found
    for name in ("response", "body"):
        if isinstance(found.get(name), dict) and (inner := _answer(found[name])) is not None:
            return inner
    return None


def _answer_time(answer: Mapping[str, Any]) -> datetime | None:
    for name in ("created", "created_at", "timestamp", "time"):
        value = answer.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return datetime.fromtimestamp(value, UTC)
        if isinstance(value, str):
            return parse_time(value)
    return None


def _answer_tokens(usage: Mapping[str, Any]) -> Tokens:
    """Tokens of a `usage` object. OpenAI's and DeepSeek's prompts include the cached tokens, Anthropic's do not."""
    prompt = usage.get("prompt_tokens")
    output = usage.get("completion_tokens", usage.get("output_tokens", 0)) or 0
    details = _object(usage, "prompt_tokens_details") | _object(usage, "input_tokens_details")
    read = usage.get("cache_read_input_tokens")
    if prompt is None and "cache_read_input_tokens" in usage:
        hit = read or 0
        miss = (usage.get("input_tokens") or 0) + (usage.get("cache_creation_input_tokens") or 0)
    else:  # a proxy may add Anthropic's numbers to OpenAI's, which stay what they are
        prompt = usage.get("input_tokens", 0) if prompt is None else prompt
        found = (usage.get("prompt_cache_hit_tokens"), details.get("cached_tokens"), read)
        hit = next((value for value in found if value is not None), 0)
        miss = (prompt or 0) - hit
    outputs = _object(usage, "completion_tokens_details") | _object(usage, "output_tokens_details")
    tokens = Tokens(int(hit), int(miss), int(output), int(outputs.get("reasoning_tokens") or 0))
    if min(tokens.hit, tokens.miss, tokens.output) < 0 or tokens.reasoning > tokens.output:
        raise ValueError(f"its usage does not add up: {dict(usage)}")
    return tokens


def _object(usage: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = usage.get(name)
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
