"""Printing of `dsv4 usage`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from datetime import datetime
from typing import cast

from rich.text import Text

from dsv4.commands.terminal.amounts import counted, dollars
from dsv4.commands.terminal.wide_table import print_whole, sums_table
from dsv4.usage.prices import official_name, parse_time, price_list
from dsv4.usage.records import time_text
from dsv4.usage.report import (
    Group,
    UsageSum,
    records_as,
    summarize,
    summarize_as,
    total,
    write_records,
    write_sums,
)
from dsv4.usage.store import open_store, read_records


def print_usage(place: str, by: str, since: str | None, until: str | None, as_csv: bool, price_as: str | None) -> None:
    """Prints the usage in a database. ValueError for a time or a model that is not one, or an unusable database."""
    first = "" if since is None else time_text(_time("--since", since))
    last = "~" if until is None else time_text(_time("--until", until))  # "~" follows every time
    if price_as is not None and official_name(price_as) is None:
        raise ValueError(f"--price-as is {price_as!r}; allowed: {', '.join(price_list().models)}")
    with closing(open_store(place, create=False)) as store:
        if by == "request":
            records = read_records(store, first, last)
            found = records if price_as is None else records_as(records, price_as)
            if as_csv:
                write_records(sys.stdout, found)
                return
            sums = [UsageSum(f"{record.time}  {record.model}").plus(record) for record in found]
        elif price_as is None:
            sums = summarize(store, cast(Group, by), first, last)
        else:
            sums = summarize_as(store, price_as, cast(Group, by), first, last)
    if as_csv:
        write_sums(sys.stdout, by, sums)
    elif not sums:
        print("no requests are recorded in that time")
    else:
        _print_table(by, sums, price_as)


def _time(flag: str, text: str) -> datetime:
    try:
        return parse_time(text)
    except ValueError as error:
        raise ValueError(f"{flag} is {text!r}; allowed: a day or time like 2026-11-28 or 2026-11-28T09:00") from error


def _print_table(by: str, sums: Sequence[UsageSum], price_as: str | None) -> None:
    table = sums_table(by, "requests", "hit", "miss", "output", "reasoning", "seconds", "cost USD")
    everything = total(sums)
    for row in [*sums, everything] if len(sums) > 1 else sums:
        cost = "?" if row.unpriced == row.requests else dollars(row.cost_usd)
        counts = (
            row.requests,
            row.cache_hit_tokens,
            row.cache_miss_tokens,
            row.completion_tokens,
            row.reasoning_tokens,
        )
        style = "bold" if row is everything and len(sums) > 1 else ""
        name = Text(row.group or f"(no {by})")
        table.add_row(name, *(f"{count:,}" for count in counts), f"{row.seconds:,.1f}", cost, style=style)
    print_whole(table)
    if everything.unfinished:
        were = "was" if everything.unfinished == 1 else "were"
        print(f"{counted(everything.unfinished, 'request')} {were} cancelled or failed.")
    if everything.unpriced and price_as is None:
        print(
            f"{counted(everything.unpriced, 'request')} for models that DeepSeek has no price for; "
            "--price-as deepseek-v4-flash gives them one."
        )
