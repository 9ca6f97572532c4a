"""Worked steps of integer arithmetic, one short line per step, each a copy or a one-digit operation.

A column sum starts at the units: the operands, one line per column with the carry as its last term, the result.

    47+38       52-38
    7+8=15      12-8=4        a column that must borrow starts with its 1 already put before the digit
    4+3+1=8     5-3-1=1
    47+38=85    52-38=14
"""


def add_steps(a: int, b: int) -> list[str]:
    """Write a + b for non-negative a, b."""
    if a < 10 and b < 10:
        return [f"{a}+{b}={a + b}"]
    lines, carry = [f"{a}+{b}"], 0
    for i in range(len(str(max(a, b)))):
        x, y = a // 10**i % 10, b // 10**i % 10
        total = x + y + carry
        lines.append(f"{x}+{y}={total}" if i == 0 else f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return [*lines, f"{a}+{b}={a + b}"]


def subtract_steps(a: int, b: int) -> list[str]:
    """Write a - b for a >= b >= 0, or for single digits of either sign."""
    if a < 10 and b < 10:
        return [f"{a}-{b}={a - b}"]
    if a < b:
        raise ValueError(f"subtract_steps({a}, {b}): a difference of longer numbers must not be negative")
    lines, borrow = [f"{a}-{b}"], 0
    for i in range(len(str(a))):
        x, y = a // 10**i % 10, b // 10**i % 10
        short = x - y - borrow < 0
        top = f"1{x}" if short else f"{x}"
        rest = x - y - borrow + 10 * short
        lines.append(f"{top}-{y}={rest}" if i == 0 else f"{top}-{y}-{borrow}={rest}")
        borrow = int(short)
    return [*lines, f"{a}-{b}={a - b}"]


def divide_steps(a: int, b: int) -> list[str]:
    """Write a / b for b from 1 to 9 and a quotient of several digits, from the left: digits, their quotient, the rest.

    232/8
    23/8=2 7
    72/8=9 0
    """
    if not 1 <= b <= 9 or a < 10 * b:
        raise ValueError(f"divide_steps({a}, {b}): b is from 1 to 9, and a at least 10 times as large")
    lines, rest = [f"{a}/{b}"], 0
    for digit in str(a):
        part = 10 * rest + int(digit)
        if part >= b or len(lines) > 1:
            lines.append(f"{part}/{b}={part // b} {part % b}")
        rest = part % b
    return lines


def operation_steps(a: int, op: str, b: int) -> list[str] | None:
    """Write a op b for op in + - *; None if the steps would not stay small.

    Small means: products of two single digits, sums and differences that involve a negative number only within single
    digits, and column sums of non-negative numbers with a non-negative result.
    """
    if op == "*":
        return [f"{a}*{b}={a * b}"] if 0 <= a < 10 and 0 <= b < 10 else None
    if op not in "+-":
        raise ValueError(f"operator {op!r}: one of + - * is allowed")
    result = a + b if op == "+" else a - b
    if -10 < a < 10 and 0 <= b < 10:
        return [f"{a}{op}{b}={result}"]
    if min(a, b, result) < 0:
        return None
    return add_steps(a, b) if op == "+" else subtract_steps(a, b)
