"""Printing of `dsv4 migrate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit

from rich.table import Table
from rich.text import Text

from dsv4.commands.terminal.amounts import counted, dollars
from dsv4.commands.terminal.wide_table import print_whole, sums_table
from dsv4.migration.costs import Costs, recalculate, vendor_costs
from dsv4.migration.exports import read_export
from dsv4.migration.files import Skipped, read_sources
from dsv4.migration.plan import FilePlan, display_name, plan_file
from dsv4.migration.rules import Wishes
from dsv4.usage.prices import PriceList, Tokens, price_list


def migrate(places: Sequence[str], model: str, base_url: str | None, write: bool) -> int:
    """Prints or writes the changes of sources -> exit status: 1 if changes are proposed, else 0."""
    wishes = Wishes(model, None if base_url is None else _checked_url(base_url))
    changes = notes = files = 0
    for found in read_sources([Path(place) for place in places]):
        if isinstance(found, Skipped):
            print(f"{display_name(found.path)}: skipped: {found.reason}", file=sys.stderr)
            continue
        plan = plan_file(found, wishes)
        if plan.changes or plan.notes:
            _print_plan(plan, write)
            files += 1
        if plan.changes and write:
            plan.write()
        changes += len(plan.changes)
        notes += len(plan.notes)
    done = "made" if write else "proposed"
    found = f"{counted(changes, 'change')} {done}, {counted(notes, 'place')} to look at, in {counted(files, 'file')}."
    print(found if files else "nothing to change.")
    return 1 if changes and not write else 0


def print_costs(exports: Sequence[str], model: str) -> None:
    """Prints the costs of usage exports: then, on V4 today, and at other vendors. ValueError for an unreadable one."""
    lines = chain.from_iterable(read_export(Path(path)) for path in exports)
    prices, today = price_list(), datetime.now(UTC)
    costs = recalculate(lines, prices, model, today)
    tokens = sum((row.tokens for row in costs), Tokens())
    table = sums_table("model", "requests", "hit", "miss", "output", "reasoning", "USD then", "USD today")
    for row in costs:
        counts = (row.requests, row.tokens.hit, row.tokens.miss, row.tokens.output, row.tokens.reasoning)
        then = "?" if row.unpriced and not row.high else _span(row.low, row.high)
        now = _span(row.today_off_peak, row.today_peak)
        table.add_row(Text(row.model or "(none)"), *(f"{count:,}" for count in counts), then, now)
    print_whole(table)
    print(f"Then: at the prices of its dates. Today: the same tokens on {model}, off-peak - peak.")
    _print_remarks(costs)
    _print_vendors(tokens, prices)


def _print_vendors(tokens: Tokens, prices: PriceList) -> None:
    table = Table("vendor", "model", box=None, header_style="bold", pad_edge=False)
    table.add_column("USD", justify="right")
    table.add_column("read on", no_wrap=True)
    table.add_column("note", overflow="fold")
    found = vendor_costs(tokens, prices)
    for price, cost in found:
        table.add_row(price.vendor, price.model, dollars(cost), str(price.read), price.note)
    print()
    print_whole(table)
    print(
        "The same numbers of tokens at list prices: other tokenizers count differently, other models answer longer or"
    )
    print("shorter. Charges for writing to a cache, discounts for batches and vendors' older prices are left out.")
    print("Sources:")
    sources: dict[str, list[str]] = {}
    for price, _ in found:
        sources.setdefault(price.source, []).append(price.model)
    for source, models in sources.items():
        print(f"  {', '.join(models)}: {source}")


def _print_plan(plan: FilePlan, write: bool) -> None:
    name = display_name(plan.source.path)
    found = [(line, "", finding) for line, finding in plan.changes]
    found += [(line, "look: ", finding) for line, finding in plan.notes]
    for line, mark, finding in sorted(found, key=lambda place: place[0]):
        print(f"{name}:{line}: {mark}{finding.rule}: {finding.reason}")
    if not write:
        sys.stdout.write(plan.diff(name))


def _print_remarks(costs: Sequence[Costs]) -> None:
    if any(row.low != row.high for row in costs):
        print("From - to: the export has no hours, so peak hours are not known.")
    if unpriced := sum(row.unpriced for row in costs):
        print(f"{counted(unpriced, 'line')} without a known price at that time: left out of the cost.")
    if undated := sum(row.undated for row in costs):
        print(f"{counted(undated, 'line')} without a time: priced as of now.")


def _span(low: float, high: float) -> str:
    texts = dollars(low), dollars(high)
    return texts[0] if texts[0] == texts[1] else " - ".join(texts)


def _checked_url(text: str) -> str:
    """A server's address without a path. ValueError for anything else."""
    url = urlsplit(text)
    if url.scheme not in ("http", "https") or not url.netloc or url.path.strip("/") or url.query or url.fragment:
        raise ValueError(f"--base-url is {text!r}; allowed: an address like http://127.0.0.1:8000, without a path")
    if set(text) & set("\"'`\\ \n"):
        raise ValueError(f"--base-url is {text!r}; allowed: no quotes and no white space")
    return text.rstrip("/")
