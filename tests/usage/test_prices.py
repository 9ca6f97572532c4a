"""Official prices by model, date and hour."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from dsv4.usage.prices import Rates, Tokens, official_name, parse_time, price_list

MILLION = Tokens(hit=1_000_000)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("model", "when", "hit", "miss", "output"),
    [
        ("deepseek-v4-flash", "2026-04-24T00:00", 0.028, 0.14, 0.28),
        ("deepseek-v4-flash", "2026-04-26T12:14", 0.028, 0.14, 0.28),
        ("deepseek-v4-flash", "2026-04-26T12:15", 0.0028, 0.14, 0.28),
        ("deepseek-v4-pro", "2026-04-25T00:00", 0.145, 1.74, 3.48),
        ("deepseek-v4-pro", "2026-08-16T15:59", 0.003625, 0.435, 0.87),
        ("deepseek-v4-pro", "2026-08-16T16:00", 0.022, 0.66, 1.98),
        ("deepseek-v4-flash", "2026-08-17T01:00", 0.014, 0.44, 1.32),
        ("deepseek-v4-flash", "2026-08-17T04:00", 0.007, 0.22, 0.66),
        ("deepseek-v4-flash", "2026-08-17T09:59", 0.014, 0.44, 1.32),
        ("deepseek-v4-flash", "2026-08-17T10:00", 0.007, 0.22, 0.66),
        ("deepseek-v4-flash", "2026-08-22T02:00", 0.014, 0.44, 1.32),  # a Saturday before the weekend rule
        ("deepseek-v4-flash", "2026-08-23T02:00", 0.007, 0.22, 0.66),  # the first Sunday after it
        ("deepseek-flash", "2026-09-10T03:59", 0.014, 0.44, 1.32),
        ("deepseek-flash", "2026-09-10T06:00", 0.006, 0.30, 1.20),
        ("deepseek-v4-flash", "2026-09-10T06:00", 0.006, 0.30, 1.20),
        ("deepseek-v4-pro", "2026-09-10T06:00", 0.044, 1.32, 3.96),
        ("deepseek-v4-pro", "2026-10-01T02:00", 0.022, 0.66, 1.98),  # a public holiday, a Thursday
        ("deepseek-v4-pro", "2026-10-08T02:00", 0.044, 1.32, 3.96),
        ("deepseek-chat", "2025-03-03T12:00", 0.07, 0.27, 1.10),
        ("deepseek-chat", "2025-03-03T16:30", 0.035, 0.135, 0.55),
        ("deepseek-chat", "2025-03-04T00:29", 0.035, 0.135, 0.55),
        ("deepseek-reasoner", "2025-03-03T00:30", 0.14, 0.55, 2.19),
        ("deepseek-reasoner", "2025-09-05T17:00", 0.07, 0.56, 1.68),
        ("deepseek-reasoner", "2026-01-01T00:00", 0.028, 0.28, 0.42),
        ("deepseek-chat", "2026-06-01T00:00", 0.0028, 0.14, 0.28),  # then a name of V4 Flash
    ],
)
def test_the_price_of_the_day_and_hour(model: str, when: str, hit: float, miss: float, output: float) -> None:
    price = price_list().price(model, at(when))
    assert price is not None and price.rates_at(at(when)) == Rates(hit, miss, output)
    assert price.source.startswith("https://api-docs.deepseek.com/")


def test_a_cost_adds_hits_misses_and_output_with_its_reasoning() -> None:
    tokens = Tokens(hit=1_000_000, miss=2_000_000, output=500_000, reasoning=400_000)
    cost = price_list().cost("deepseek-v4-pro", at("2026-10-08T02:00"), tokens)
    assert cost == pytest.approx(0.044 + 2 * 1.32 + 0.5 * 3.96)


def test_no_price_before_the_first_and_for_strangers() -> None:
    assert price_list().cost("deepseek-v4-flash", at("2026-04-23T23:59"), MILLION) is None
    assert price_list().cost("nano", at("2026-11-01T00:00"), MILLION) is None


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("deepseek-v4-pro", "deepseek-v4-pro"),
        ("deepseek-v4-pro[1m]", "deepseek-v4-pro"),
        ("deepseek-ai/DeepSeek-V4-Pro-0813", "deepseek-v4-pro"),
        ("DeepSeek-V4-Flash", "deepseek-v4-flash"),
        ("claude-opus-5-5", "deepseek-v4-pro"),
        ("claude-sonnet-5-5", "deepseek-flash"),
        ("gemini-3.8-flash", None),
        ("nano", None),
    ],
)
def test_names_of_a_model(name: str, official: str | None) -> None:
    assert official_name(name) == official


def test_a_day_has_all_its_prices() -> None:
    prices = price_list()
    workday = prices.rates_between("deepseek-v4-pro", at("2026-10-08T00:00"), at("2026-10-09T00:00"))
    assert workday == [Rates(0.022, 0.66, 1.98), Rates(0.044, 1.32, 3.96)]
    assert len(prices.rates_between("deepseek-v4-pro", at("2026-10-10T00:00"), at("2026-10-11T00:00"))) == 1
    assert len(prices.rates_between("deepseek-v4-pro", at("2026-04-26T00:00"), at("2026-04-27T00:00"))) == 2


def test_other_vendors_have_a_date_and_a_source() -> None:
    vendors = price_list().vendors
    assert len({price.vendor for price in vendors}) >= 3
    for price in vendors:
        assert price.source.startswith("https://") and price.read.year == 2026
        assert 0 < price.rates.hit <= price.rates.miss < price.rates.output
        assert price.rates.hit < price.rates.miss or "no price of cached tokens" in price.note


def test_times_are_utc_unless_they_say_otherwise() -> None:
    assert parse_time("20261128") == parse_time("2026-11-28") == at("2026-11-28T00:00")
    assert parse_time("2026-11-28T09:00:00+08:00") == at("2026-11-28T01:00")
