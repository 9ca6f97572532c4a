"""Prices: DeepSeek's by model, date and hour, and other vendors' list prices, both read from prices.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

COMPARED_MODEL = "deepseek-v4-flash"  # whose prices stand for a model that is not DeepSeek's
FILE = Path(__file__).with_name("prices.toml")
_BEIJING = timedelta(hours=8)
_STEP = timedelta(minutes=30)  # all windows begin and end at such times


@dataclass(frozen=True)
class Tokens:
    """Billed tokens. `reasoning`, a part of `output`, costs as much as the rest of it."""

    hit: int = 0  # of the prompt, found in the cache
    miss: int = 0  # the other tokens of the prompt
    output: int = 0
    reasoning: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(
            self.hit + other.hit,
            self.miss + other.miss,
            self.output + other.output,
            self.reasoning + other.reasoning,
        )


@dataclass(frozen=True)
class Rates:
    """Prices in USD per million tokens."""

    hit: float
    miss: float
    output: float

    def cost(self, tokens: Tokens) -> float:
        """Cost in USD."""
        return (tokens.hit * self.hit + tokens.miss * self.miss + tokens.output * self.output) / 1e6


@dataclass(frozen=True)
class Window:
    """Hours of the day, from a date on; `hours` holds the first minute and the minute after the last, in UTC."""

    begins: datetime
    hours: tuple[tuple[int, int], ...]
    workdays: bool  # Monday to Friday only, in Beijing
    holidays: frozenset[date]

    def holds(self, when: datetime) -> bool:
        day = (when + _BEIJING).date()
        if (self.workdays and day.weekday() >= 5) or day in self.holidays:
            return False
        minute = when.hour * 60 + when.minute
        return any(
            first <= minute < last if first < last else minute >= first or minute < last for first, last in self.hours
        )


@dataclass(frozen=True)
class OfficialPrice:
    """Price of DeepSeek's models from a date on, maybe with other rates in some hours."""

    models: frozenset[str]
    begins: datetime
    rates: Rates
    source: str
    window: tuple[Window, ...] = ()  # in order of their beginnings; the last that has begun counts
    window_rates: Rates | None = None

    def rates_at(self, when: datetime) -> Rates:
        current = next((window for window in reversed(self.window) if window.begins <= when), None)
        inside = current is not None and current.holds(when)
        return self.window_rates if inside and self.window_rates is not None else self.rates


@dataclass(frozen=True)
class OfficialCost:
    """Cost in USD at DeepSeek's own API, as one of its models."""

    model: str
    usd: float


@dataclass(frozen=True)
class VendorPrice:
    """List price of another vendor's model on the day it was read."""

    vendor: str
    model: str
    rates: Rates
    read: date
    source: str
    note: str


@dataclass(frozen=True)
class PriceList:
    official: tuple[OfficialPrice, ...]
    vendors: tuple[VendorPrice, ...]

    @property
    def models(self) -> list[str]:
        """DeepSeek's models that have a price."""
        return sorted({name for price in self.official for name in price.models})

    def price(self, model: str, when: datetime) -> OfficialPrice | None:
        """Price that held at a time; None before the first."""
        name = official_name(model)
        held = [price for price in self.official if name in price.models and price.begins <= when]
        return max(held, key=lambda price: price.begins, default=None)

    def cost(self, model: str, when: datetime, tokens: Tokens) -> float | None:
        """Official cost in USD at a time; None for a model without a price then."""
        price = self.price(model, when)
        return None if price is None else price.rates_at(when).cost(tokens)

    def rates_between(self, model: str, start: datetime, end: datetime) -> list[Rates]:
        """Distinct rates that held at some time from `start` until before `end`, in order of appearance."""
        times = [start]
        while (following := times[-1] + _STEP) < end:
            times.append(following)
        times += [price.begins for price in self.official if start <= price.begins < end]
        found = [(price, when) for when in sorted(times) if (price := self.price(model, when)) is not None]
        return list(dict.fromkeys(price.rates_at(when) for price, when in found))


@cache
def price_list() -> PriceList:
    """Price list of this version."""
    with FILE.open("rb") as file:
        raw = tomllib.load(file)
    windows: dict[str, list[Window]] = {}
    for row in sorted(raw["window"], key=lambda row: row["from"]):
        windows.setdefault(row["name"], []).append(_window(row))
    official = [
        OfficialPrice(
            frozenset(row["models"]),
            row["from"],
            Rates(**row["usd"]),
            row["source"],
            tuple(windows[row["window"]]) if "window" in row else (),
            Rates(**row["window_usd"]) if "window_usd" in row else None,
        )
        for row in raw["official"]
    ]
    vendors = [
        VendorPrice(
            row["vendor"],
            row["model"],
            Rates(**{"hit": row["usd"]["miss"], **row["usd"]}),
            row["read"],
            row["source"],
            "; ".join(_notes(row)),
        )
        for row in raw["vendor"]
    ]
    return PriceList(tuple(official), tuple(vendors))


def official_name(model: str) -> str | None:
    """DeepSeek's name of the model behind a client's name for it; None for a model that is not DeepSeek's.

    Names of Anthropic's models stand for those that DeepSeek's Messages API answers them with.
    """
    name = model.lower().removesuffix("[1m]").rpartition("/")[2]
    if name in _known_names():
        return name
    if name.startswith("claude-"):
        return "deepseek-v4-pro" if name.startswith("claude-opus") else "deepseek-flash"
    if "deepseek" in name and "v4-pro" in name:
        return "deepseek-v4-pro"
    return "deepseek-v4-flash" if "deepseek" in name and "flash" in name else None


def official_cost(model: str, when: datetime, tokens: Tokens) -> OfficialCost | None:
    """Cost that tokens of any model would have had at a time; None before the first price."""
    name = official_name(model) or COMPARED_MODEL
    usd = price_list().cost(name, when, tokens)
    return None if usd is None else OfficialCost(name, usd)


def parse_time(text: str) -> datetime:
    """Time of an ISO 8601 text, or of a day's beginning (2026-11-28, 20261128); UTC unless it names an offset.

    ValueError for any other text.
    """
    when = datetime.fromisoformat(text)
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)


@cache
def _known_names() -> frozenset[str]:
    return frozenset(price_list().models)


def _window(row: Mapping[str, Any]) -> Window:
    hours = tuple((_minute(first), _minute(last)) for first, last in (span.split("-") for span in row["hours"]))
    holidays: Sequence[str] = row.get("holidays", ())
    return Window(row["from"], hours, row.get("workdays", False), frozenset(map(date.fromisoformat, holidays)))


def _minute(clock: str) -> int:
    hour, minute = clock.split(":")
    return int(hour) * 60 + int(minute)


def _notes(row: Mapping[str, Any]) -> list[str]:
    return [note for note in (row.get("note"), None if "hit" in row["usd"] else "no price of cached tokens") if note]
