"""reasoning-gym's arithmetic questions, small enough for a tiny model, with column arithmetic as worked steps."""

import ast
import re
from math import gcd
from random import Random
from typing import Any, ClassVar

from reasoning_gym.algebra.simple_equations import SimpleEquationsConfig, SimpleEquationsDataset

from dsv4.data.tasks import wordings
from dsv4.data.tasks.base import Draft, GymTask
from dsv4.data.tasks.steps import add_steps, divide_steps, operation_steps, subtract_steps

_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
REST = 2  # operations that are left: with as many or more, a step is followed by what is left, to go on from


class ChainSum(GymTask):
    """`State the final answer to the following arithmetic problem: 47 + 38 - 12 =`."""

    name = "chain_sum"
    reworded = True
    difficulty: ClassVar[dict[str, Any]] = {
        "terms": (2, 3),
        "digits": (1, 2),
        "negative_results": "only from single digits",
    }
    settings: ClassVar[dict[str, Any]] = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}

    def draft(self, rng: Random) -> Draft | None:
        """Draw a chain; None unless every partial result stays small."""
        entry = self.entry(rng)
        parts = entry["metadata"]["expression"].split(" ")
        total, lines = int(parts[0]), []
        for place in range(1, len(parts), 2):
            op, term = parts[place], int(parts[place + 1])
            steps = operation_steps(total, op, term)
            if steps is None:
                return None
            lines += steps
            total = total + term if op == "+" else total - term
            left = parts[place + 2 :]
            if len(left) >= 2 * REST:
                lines.append("".join([str(total), *left]))
        expression = " ".join(parts)
        others = wordings.EXPRESSION.of(it=expression)
        return Draft(expression, entry["question"], entry["answer"], "\n".join(lines), entry, wordings=others)


class BasicArithmetic(GymTask):
    """`Calculate (3 + 4) * 2.`, operators + - * and parentheses."""

    name = "basic_arithmetic"
    reworded = True
    difficulty: ClassVar[dict[str, Any]] = {
        "terms": (2, 3),
        "digits": 1,
        "operators": "+ - *",
        "negative_terms": False,
        "products_up_to": 81,
    }
    settings: ClassVar[dict[str, Any]] = {
        "min_terms": 2,
        "max_terms": 3,
        "min_digits": 1,
        "max_digits": 1,
        "operators": ["+", "-", "*"],
        "allow_parentheses": True,
        "allow_negation": False,
    }

    def draft(self, rng: Random) -> Draft | None:
        """Draw an expression of single digits; None unless every partial result stays small."""
        entry = self.entry(rng)
        expression = entry["metadata"]["expression"]
        if re.search(r"(^|[(*+-] ?)-", expression):
            return None
        lines = _evaluation(expression)
        if lines is None or lines[-1].rpartition("=")[2] != entry["answer"]:
            return None
        others = wordings.EXPRESSION.of(it=expression)
        return Draft(expression, entry["question"], entry["answer"], "\n".join(lines), entry, wordings=others)


def _evaluation(expression: str) -> list[str] | None:
    """Write an expression's operations, left before right; None if one does not stay small."""
    tree, lines = ast.parse(expression, mode="eval").body, list[str]()
    while isinstance(tree, ast.BinOp):
        node, above = tree, None
        while operands := [side for side in (node.left, node.right) if isinstance(side, ast.BinOp)]:
            node, above = operands[0], node
        left, right = (ast.literal_eval(side) for side in (node.left, node.right))
        op = _OPERATORS[type(node.op)]
        steps = operation_steps(left, op, right)
        if steps is None:
            return None
        lines += steps
        value = ast.Constant({"+": left + right, "-": left - right, "*": left * right}[op])
        if above is None:
            return lines
        if above.left is node:
            above.left = value
        else:
            above.right = value
        if sum(isinstance(part, ast.BinOp) for part in ast.walk(tree)) >= REST:
            lines.append(ast.unparse(tree).replace(" ", ""))
    return lines or None


class FastSimpleEquations(SimpleEquationsDataset):
    """reasoning-gym's two-term equations, from the same random numbers but without building sympy expressions."""

    def _generate_equation(self, rng: Random, variable: str) -> tuple[str, int]:
        config = self.config
        count = rng.randint(config.min_terms, config.max_terms)
        if count != 2:
            raise ValueError(f"terms {count}: only equations of 2 terms are written here")
        values = [rng.randint(config.min_value, config.max_value) for _ in range(2)]
        position = rng.randint(0, 1)
        coefficient = rng.randint(config.min_value, config.max_value)
        op = rng.choices(config.operators, weights=config.operators_weights, k=1)[0]
        solution = rng.randint(config.min_value, config.max_value)
        constant = values[1 - position]
        if op == "*":
            return f"{_term(coefficient * constant, variable)} = {coefficient * constant * solution}", solution
        term, product = _term(coefficient, variable), coefficient * solution
        if op == "+":
            return f"{term} + {constant} = {product + constant}", solution
        if position == 0:
            return f"{term} - {constant} = {product - constant}", solution
        return f"{constant} - {term} = {constant - product}", solution


def _term(coefficient: int, variable: str) -> str:
    return variable if coefficient == 1 else f"{coefficient}*{variable}"


class SimpleEquations(GymTask):
    """`Solve for x: 3*x + 4 = 19`."""

    name = "simple_equations"
    reworded = True
    difficulty: ClassVar[dict[str, Any]] = {"terms": 2, "values": (1, 9), "operators": "+ - *", "coefficient_up_to": 9}
    settings: ClassVar[dict[str, Any]] = {"min_terms": 2, "max_terms": 2, "min_value": 1, "max_value": 9}
    _form = re.compile(
        r"(?:(?P<first>\d+) - )?(?:(?P<a>\d+)\*)?(?P<v>[a-z])(?: (?P<op>[+-]) (?P<b>\d+))? = (?P<c>-?\d+)"
    )

    def make_dataset(self) -> FastSimpleEquations:
        """Make the dataset of the gym's equations that does not build sympy expressions."""
        return FastSimpleEquations(SimpleEquationsConfig(size=1, seed=0, **self._settings))

    def draft(self, rng: Random) -> Draft | None:
        """Draw an equation; the steps move the constant, then divide."""
        entry = self.entry(rng)
        match = self._form.fullmatch(entry["metadata"]["equation"])
        if match is None:
            raise ValueError(f"equation {entry['metadata']['equation']!r} is not of the two-term form")
        a, v, c = int(match["a"] or 1), match["v"], int(match["c"])
        if a > 9:
            return None
        left = _term(a, v)
        if match["first"]:
            b = int(match["first"])
            lines, value = self._move(left, b, c, subtract=True)
        elif match["b"]:
            lines, value = self._move(left, int(match["b"]), c, subtract=False, plus=match["op"] == "+")
        else:
            lines, value = [], c
        if a > 1:
            lines += [f"{left}={value}", *divide_steps(value, a)] if value >= 10 * a else []
            lines.append(f"{v}={value}/{a}={value // a}")
        else:
            lines.append(f"{v}={value}")
        equation = entry["metadata"]["equation"]
        others = wordings.EQUATION.of(it=equation, v=v)
        key = equation.replace(v, "x")
        return Draft(key, entry["question"], entry["answer"], "\n".join(lines), entry, wordings=others)

    def _move(self, left: str, b: int, c: int, subtract: bool, plus: bool = False) -> tuple[list[str], int]:
        """Steps that isolate `left`, and its value: b - left = c (subtract), left + b = c (plus) or left - b = c."""
        if subtract:
            x, op, y = (b, "-", c) if c >= 0 else (b, "+", -c)
        elif plus:
            x, op, y = c, "-", b
        else:
            x, op, y = (c, "+", b) if c >= 0 else (b, "-", -c)
        steps = add_steps(x, y) if op == "+" else subtract_steps(x, y)
        return [f"{left}={x}{op}{y}", *steps], x + y if op == "+" else x - y


class Gcd(GymTask):
    """`Find the Greatest Common Divisor (GCD) of these numbers: 40, 25.`; the steps walk down both lists of divisors.

    40: 40 20 10 8 5 4 2 1
    25: 25 5 1
    25: 40 20              per divisor of the smaller number: the larger number's divisors, from the last one of the
    5: 20 10 8 5           line before down to the first that is not above the divisor
    """

    name = "gcd"
    reworded = True
    difficulty: ClassVar[dict[str, Any]] = {"numbers": 2, "values": (1, 40)}
    settings: ClassVar[dict[str, Any]] = {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 40}

    def draft(self, rng: Random) -> Draft | None:
        """Draw two numbers; both orders of the two have the same key."""
        entry = self.entry(rng)
        a, b = entry["metadata"]["numbers"]
        small, large = min(a, b), max(a, b)
        wide, narrow = ([d for d in range(n, 0, -1) if n % d == 0] for n in (large, small))
        lines = [f"{n}: {' '.join(map(str, divisors))}" for n, divisors in ((large, wide), (small, narrow))]
        at = 0
        for d in narrow:
            end = next(i for i in range(at, len(wide)) if wide[i] <= d)
            lines.append(f"{d}: {' '.join(map(str, wide[at : end + 1]))}")
            at = end
            if wide[at] == d:
                break
        assert d == gcd(a, b)
        others = wordings.GCD.of(a=a, b=b)
        return Draft(f"{small} {large}", entry["question"], entry["answer"], "\n".join(lines), entry, wordings=others)


class CountBits(GymTask):
    """`How many 1 bits are there in the binary representation of the number 45?`; a step: number, lowest bit, count."""

    name = "count_bits"
    reworded = True
    difficulty: ClassVar[dict[str, Any]] = {"n": (1, 511)}
    settings: ClassVar[dict[str, Any]] = {"min_n": 1, "max_n": 511}

    def draft(self, rng: Random) -> Draft | None:
        """Draw a number; each step halves it."""
        entry = self.entry(rng)
        n, ones, lines = int(entry["metadata"]["number"]), 0, []
        while n:
            ones += n % 2
            lines.append(f"{n} {n % 2} {ones}")
            n //= 2
        number = str(entry["metadata"]["number"])
        others = wordings.COUNT_BITS.of(n=number)
        return Draft(number, entry["question"], entry["answer"], "\n".join(lines), entry, wordings=others)


ARITHMETIC: tuple[type[GymTask], ...] = (ChainSum, BasicArithmetic, SimpleEquations, Gcd, CountBits)
