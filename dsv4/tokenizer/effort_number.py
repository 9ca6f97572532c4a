"""V4.1's effort: a number in the prompt, at the beginning of its system text.

The line is that of DeepSeek's encoder of V4.1, and so are the numbers of the levels. V4's vocabulary has no token of a
system turn, which stands before the line there; here the line is where V4's own instructions of efforts are.
"""

import re
from collections.abc import Sequence

from deepseek_recipe import Message, SystemMessage

MIN_BUDGET, MAX_BUDGET = 1, 100
NUMBERS: dict[str | None, int] = {None: 75, "low": 50, "high": 75, "xhigh": 75, "max": 100}  # of the API's levels
LINE = "Reasoning Effort: {} (range 1-100, the higher the value, the more thorough the reasoning)\n\n"
_BEGINNING = re.compile(re.escape(LINE.rstrip()).replace(r"\{\}", r"([1-9]\d?|100)") + r"(?:\n+|$)")


def numbered(messages: Sequence[Message], number: int) -> list[Message]:
    """The messages with the line of `number` first; of their own number, where a system text begins with its line."""
    first = messages[0] if messages and isinstance(messages[0], SystemMessage) else None
    text = "" if first is None else first.content
    own = _BEGINNING.match(text)
    if own is not None:
        number, text = int(own[1]), text[own.end() :]
    text = LINE.format(number) + text
    if first is None:
        return [SystemMessage(text), *messages]
    return [SystemMessage(text, first.image_sources, first.tools), *messages[1:]]


def check_budget(budget: int) -> int:
    """The budget. ValueError for one out of range."""
    if not MIN_BUDGET <= budget <= MAX_BUDGET:
        raise ValueError(f"budget is {budget}; allowed: {MIN_BUDGET} to {MAX_BUDGET}")
    return budget
