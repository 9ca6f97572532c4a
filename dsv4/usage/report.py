"""Sums of a ledger by key, user, model or day, as rows for a table or a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import IO, Any, Literal

from dsv4.usage.prices import parse_time, price_list
from dsv4.usage.records import COLUMNS, UsageRecord
from dsv4.usage.store import TABLE, UsageStore, read_records

Group = Literal["key", "user", "model", "day"]
_NAMES: dict[Group, str] = {"key": "api_key", "user": "user_id", "model": "model", "day": "SUBSTR(time, 1, 10)"}
_SUMS = ("prompt_tokens", "cache_hit_tokens", "cache_miss_tokens", "completion_tokens", "reasoning_tokens")


@dataclass(frozen=True)
class UsageSum:
    """Usage of one group of requests."""

    group: str  # "" where requests name no key or user
    requests: int = 0
    unfinished: int = 0  # of the requests, those cancelled or failed
    prompt_tokens: int = 0
    cache_hit_tokens: int = 0
    cache_miss_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    seconds: float = 0.0
    cost_usd: float = 0.0
    unpriced: int = 0  # requests of models without a price, which the cost leaves out

    def plus(self, record: UsageRecord) -> UsageSum:
        tokens = {name: getattr(self, name) + getattr(record, name) for name in _SUMS}
        return replace(
            self,
            requests=self.requests + 1,
            unfinished=self.unfinished + (record.finish_reason in ("cancelled", "error")),
            seconds=self.seconds + record.seconds,
            cost_usd=self.cost_usd + (record.cost_usd or 0.0),
            unpriced=self.unpriced + (record.cost_usd is None),
            **tokens,
        )


_COUNTED = tuple(field.name for field in fields(UsageSum))[1:]


def summarize(store: UsageStore, by: Group, since: str, until: str) -> list[UsageSum]:
    """Sums by group, ordered by its name, of requests that arrived from `since` until before `until`."""
    name = _NAMES[by]
    sums = ", ".join(f"SUM({column})" for column in _SUMS)
    sql = (
        f"SELECT {name}, COUNT(*), SUM(CASE WHEN finish_reason IN ('cancelled', 'error') THEN 1 ELSE 0 END), {sums}, "
        f"SUM(seconds), COALESCE(SUM(cost_usd), 0), COUNT(*) - COUNT(cost_usd) FROM {TABLE} "
        f"WHERE time >= :since AND time < :until GROUP BY {name} ORDER BY {name}"
    )
    return [_sum_of(row) for row in store.read(sql, {"since": since, "until": until})]


def _sum_of(row: Sequence[Any]) -> UsageSum:
    """Sum of a row in the order of its fields. PostgreSQL sums integers to decimals."""
    counts: dict[str, Any] = {}
    for name, value in zip(_COUNTED, row[1:], strict=True):
        counts[name] = float(value) if name in ("seconds", "cost_usd") else int(value)
    return UsageSum(row[0], **counts)


def summarize_as(store: UsageStore, model: str, by: Group, since: str, until: str) -> list[UsageSum]:
    """Sums as `summarize` makes them, with every request at the prices of one of DeepSeek's models."""
    names = {"key": "api_key", "user": "user_id", "model": "model", "day": "time"}
    sums: dict[str, UsageSum] = {}
    for record in records_as(read_records(store, since, until), model):
        group: str = getattr(record, names[by])[: 10 if by == "day" else None]
        sums[group] = sums.get(group, UsageSum(group)).plus(record)
    return [sums[group] for group in sorted(sums)]


def records_as(records: Iterable[UsageRecord], model: str) -> Iterable[UsageRecord]:
    """Records with the cost that one of DeepSeek's models would have had."""
    prices = price_list()
    return (replace(record, cost_usd=prices.cost(model, parse_time(record.time), record.tokens)) for record in records)


def total(sums: Sequence[UsageSum]) -> UsageSum:
    everything = UsageSum("total")
    for row in sums:
        added = {name: getattr(everything, name) + getattr(row, name) for name in _COUNTED}
        everything = replace(everything, **added)
    return everything


def write_records(file: IO[str], records: Iterable[UsageRecord]) -> None:
    """Writes records as CSV, one request per line."""
    _write(file, COLUMNS, (list(asdict(record).values()) for record in records))


def write_sums(file: IO[str], by: str, sums: Sequence[UsageSum]) -> None:
    """Writes sums as CSV; the first column has the name `by`."""
    _write(file, [by, *_COUNTED], (list(asdict(row).values()) for row in sums))


def _write(file: IO[str], columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(value) for value in row])


def _cell(value: object) -> object:
    """Value of a CSV cell: numbers without exponent; texts that a spreadsheet would compute are quoted with '."""
    if isinstance(value, float):
        return f"{value:.9f}".rstrip("0").rstrip(".")
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value
