"""Integers beyond 64 bits in earlier tool calls, which deepseek-recipe would render as floats: 1.8446744073709552e+19.

Before rendering each stands aside for a number that fits and that occurs nowhere else; afterwards it is put back.
"""

import re
import secrets
from dataclasses import dataclass, field

from deepseek_recipe import AssistantMessage, Message, ToolCall

_LONG = re.compile(r"\d{19}")  # no shorter integer is beyond 64 bits
_STRING_OR_NUMBER = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?', re.DOTALL)
_FITS = range(-(2**63), 2**64)
_MAX_DIGITS = 4300  # Python's own limit of reading an integer


@dataclass(frozen=True)
class Rendered:
    """A rendered prompt, and the ascending ranges of its special tokens."""

    prompt: str
    special_ranges: list[tuple[int, int]]


@dataclass
class LongIntegers:
    """The long integers of one conversation."""

    _kept: dict[str, str] = field(default_factory=dict)  # stand-in -> integer, as written

    def hide(self, message: Message) -> Message:
        """The message with stand-ins in its tool calls' arguments."""
        calls = message.tool_calls
        if not isinstance(message, AssistantMessage) or not calls:
            return message
        if not any(_LONG.search(call.arguments) for call in calls):
            return message
        hidden = [ToolCall(call.id, call.name, _STRING_OR_NUMBER.sub(self._stand_in, call.arguments)) for call in calls]
        return AssistantMessage(message.content, message.reasoning_content, hidden, message.prefix)

    def restore(self, rendered: Rendered) -> Rendered:
        """The prompt with the integers."""
        if not self._kept:
            return rendered
        pieces: list[str] = []
        ranges: list[tuple[int, int]] = []
        place = end = 0
        for start, stop in rendered.special_ranges:
            piece = self._restored(rendered.prompt[end:start])
            special = rendered.prompt[start:stop]
            pieces += [piece, special]
            ranges.append((place + len(piece), place + len(piece) + len(special)))
            place, end = ranges[-1][1], stop
        pieces.append(self._restored(rendered.prompt[end:]))
        return Rendered("".join(pieces), ranges)

    def _stand_in(self, match: re.Match[str]) -> str:
        written = match[0]
        digits = written.removeprefix("-")
        if not digits.isdigit() or len(digits) < 19 or (len(digits) <= _MAX_DIGITS and int(written) in _FITS):
            return written
        # 63 random bits: no text has it by chance, and nobody can guess it.
        stand_in = str(10**18 * (1 + secrets.randbelow(8)) + secrets.randbelow(10**18))
        self._kept[stand_in] = written
        return stand_in

    def _restored(self, text: str) -> str:
        for stand_in, written in self._kept.items():
            text = text.replace(stand_in, written)
        return text
