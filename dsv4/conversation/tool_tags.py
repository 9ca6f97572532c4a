"""Tags of the models' tool-call markup.

A tag is told apart from text that only begins like a tag: a model may explain the markup or edit a file with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from dsv4.tokenizer.special import DSML as MARK
from dsv4.tokenizer.special import END_THINK

OPENINGS = (f"<{MARK}", f"</{MARK}")
BLOCK, BLOCK_END = f"<{MARK}tool_calls>", f"</{MARK}tool_calls>"
BLOCK_KINDS = frozenset({"tool_calls", "function_calls", "calls"})  # the last is V4.1's
KINDS = BLOCK_KINDS | {"invoke", "parameter"}

# Every part of a tag is bounded, so that scanning for tags takes time linear in the text.
_ATTRIBUTE = r"""\s+[\w-]{1,64}\s{0,4}=\s{0,4}(?:"[^"\n]{0,256}"|'[^'\n]{0,256}'|[^\s"'<>=/]{1,256})"""
_HEAD = rf"<(?P<slash>/?){MARK}\s?(?P<kind>\w{{0,32}})(?P<attributes>(?:{_ATTRIBUTE}){{0,8}})"
TAG = re.compile(rf"{_HEAD}\s{{0,8}}(?P<empty>/?)>")
_CUT_ATTRIBUTE = r"""\s+(?:[\w-]{1,64}\s{0,4}(?:=\s{0,4}(?:"[^"\n]{0,256}|'[^'\n]{0,256})?)?)?"""
CUT_TAG = re.compile(rf"{_HEAD}(?:{_CUT_ATTRIBUTE})?/?\Z")
_NAMED = re.compile(r"""([\w-]+)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"']+))""")

Inside = Literal["invoke", "parameter"] | None  # the open element


# Where tags begin with special tokens, text is read with these in it, which no decoded text has: for the letter with
# which ordinary tokens could spell the mark, and for the token that ends reasoning.
_PLAIN_BAR, THINKING_ENDS = "\udcbb", "\udce7"
_PLAIN_OPENINGS = tuple(opening.replace("｜", _PLAIN_BAR) for opening in OPENINGS)


@dataclass(frozen=True)
class Marks:
    """Ids of the special tokens that alone begin tags and end reasoning; spelled they are text. None: there is none."""

    tag: int | None
    thinking_ends: int | None

    def read(self, token_id: int, text: str) -> str:
        """A token's text as markup is read from it."""
        if token_id == self.thinking_ends:
            return text.removesuffix(END_THINK) + THINKING_ENDS
        return text if token_id == self.tag else text.replace("｜", _PLAIN_BAR)


def plain(text: str) -> str:
    """Spelling of a text that `Marks` has read."""
    return text.replace(_PLAIN_BAR, "｜").replace(THINKING_ENDS, END_THINK)


def spelled(text: str) -> str:
    """As `plain`; what only spells the beginning of a tag is set apart, so that it is none to a parser of texts."""
    for opening in _PLAIN_OPENINGS:
        text = text.replace(opening, opening.replace(_PLAIN_BAR, f" {_PLAIN_BAR}", 1))
    return plain(text)


def inside_after(inside: Inside, tag: re.Match[str]) -> Inside:
    """Open element after a tag. In a value block tags are text, invoke and parameter tags mean that it has ended."""
    kind, ends = tag["kind"], bool(tag["slash"] or tag["empty"])
    if kind == "invoke":
        return None if ends else "invoke"
    if kind == "parameter":
        return "invoke" if ends else "parameter"
    return inside


def ends_block(inside: Inside, tag: re.Match[str]) -> bool:
    return bool(tag["slash"]) and tag["kind"] in BLOCK_KINDS and inside != "parameter"


def attributes_of(tag: re.Match[str]) -> dict[str, str]:
    """Attributes of a tag by name."""
    return {name: a or b or c for name, a, b, c in _NAMED.findall(tag["attributes"])}


def without_tags(text: str) -> str:
    """Text without markup tags, a cut-off tag at the end included; a mark that forms no tag is removed alone."""
    text = without_cut_tag(TAG.sub("", text))
    for opening in OPENINGS:
        text = text.replace(opening, "")
    for opening in OPENINGS:  # what stood around those that are gone may form another
        text = text.replace(opening, opening.replace(MARK, f" {MARK}"))
    return text


def without_cut_tag(text: str) -> str:
    """Text without a cut-off tag at its end."""
    for opening in OPENINGS:
        start = text.rfind(opening)
        if start >= 0 and CUT_TAG.match(text, start):
            text = text[:start]
    return text


def possible_beginning(text: str, beginnings: tuple[str, ...] = OPENINGS) -> int:
    """Length of the text's longest suffix that may begin one of `beginnings`, by default a tag."""
    longest = max(map(len, beginnings)) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if any(begin.startswith(text[-n:]) for begin in beginnings)), 0)
