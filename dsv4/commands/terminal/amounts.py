"""Texts of amounts: dollars, and numbers with their noun."""

from __future__ import annotations

import math


def dollars(usd: float) -> str:
    """Four decimals; two significant digits below a cent: "1,234.5000", "0.000041"."""
    decimals = 1 - math.floor(math.log10(usd)) if 0 < usd < 0.01 else 4
    return f"{usd:,.{decimals}f}"


def counted(number: int, noun: str) -> str:
    """A number with its noun in the singular or plural: "1 file", "2 files"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
