"""Costs of past usage: at the prices of its dates, on a V4 model today, and at other vendors' list prices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

from dsv4.migration.exports import UsageLine
from dsv4.usage.prices import PriceList, Rates, Tokens, VendorPrice

_SAME = 1e-3  # relative difference of two prices that are the same but for rounding


@dataclass
class Costs:
    """Costs in USD of one model's usage. A lower and an upper bound, where the hour is unknown."""

    model: str
    requests: int = 0
    tokens: Tokens = field(default_factory=Tokens)
    low: float = 0.0  # at the prices of its dates
    high: float = 0.0
    unpriced: int = 0  # lines from before the first known price, or of a model without one
    undated: int = 0  # lines without a time, priced as of now
    today_off_peak: float = 0.0  # on the V4 model that the usage would move to
    today_peak: float = 0.0

    def add(self, line: UsageLine, prices: PriceList) -> None:
        self.requests += line.requests
        self.tokens += line.tokens
        self.undated += not line.dated
        if line.tokens == Tokens():
            return
        bounds = _bounds(line, prices)
        if bounds is None:
            self.unpriced += 1
        else:
            self.low += bounds[0]
            self.high += bounds[1]


def recalculate(lines: Iterable[UsageLine], prices: PriceList, target: str, today: datetime) -> list[Costs]:
    """Costs by model, and what they would be on `target` at today's prices."""
    found: dict[str, Costs] = {}
    for line in lines:
        found.setdefault(line.model, Costs(line.model)).add(line, prices)
    price = prices.price(target, today)
    assert price is not None, f"{target} has a price"
    for costs in found.values():
        costs.today_off_peak = price.rates.cost(costs.tokens)
        costs.today_peak = (price.window_rates or price.rates).cost(costs.tokens)
    return [found[model] for model in sorted(found)]


def vendor_costs(tokens: Tokens, prices: PriceList) -> list[tuple[VendorPrice, float]]:
    """Cost of the same tokens at other vendors, cheapest first. Their tokenizers would count other numbers."""
    return sorted(((price, price.rates.cost(tokens)) for price in prices.vendors), key=lambda pair: pair[1])


def _bounds(line: UsageLine, prices: PriceList) -> tuple[float, float] | None:
    """Lowest and highest cost of a line at the prices of its time; one of them if its own price says which."""
    rates = prices.rates_between(line.model, line.start, line.end)
    if not rates:
        return None
    billed = [known for known in rates if _is_price(line.price, known, line.tokens)]
    costs = [known.cost(line.tokens) for known in billed or rates]
    return min(costs), max(costs)


def _is_price(price: float | None, rates: Rates, tokens: Tokens) -> bool:
    """True if the rates have the price of a line's only kind of tokens; in another currency they never do."""
    if price is None:
        return False
    known = rates.hit if tokens.hit else rates.miss if tokens.miss else rates.output
    return abs(price - known) <= _SAME * known
