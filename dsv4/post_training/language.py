"""Language of reasoning: the share of it that is in the writing systems of the question."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter

from deepseek_recipe import Conversation, UserMessage

from dsv4.conversation.tool_tags import BLOCK_END
from dsv4.post_training.problems import END_OF_THINKING
from dsv4.tokenizer.special import DSML

_CODE = re.compile(rf"```.*?(?:```|\Z)|<{DSML}.*?(?:{BLOCK_END}|\Z)", re.DOTALL)  # has words of its own
_OF_ALL = {
    "FULLWIDTH",
    "HALFWIDTH",
    "MODIFIER",
    "MATHEMATICAL",
    "SCRIPT",
    "DOUBLE-STRUCK",
    "GREEK",
}  # of mathematics, too


def question_of(asked: Conversation) -> str:
    """Text of the user's last message; empty if there is none."""
    texts = [str(message.content) for message in asked.messages if isinstance(message, UserMessage)]
    return texts[-1] if texts else ""


def consistency(question: str, text: str) -> float:
    """Share of a text's letters that are in writing systems of the question, fenced code and tool calls aside.

    Of a text with reasoning, that of the reasoning. 1.0 where either has no letters.
    """
    reasoning, ended, _ = text.partition(END_OF_THINKING)
    known, found = _letters(question), _letters(reasoning if ended else text)
    if not known or not found:
        return 1.0
    return sum(count for script, count in found.items() if script in known) / found.total()


def _letters(text: str) -> Counter[str]:
    """Letters of a text by writing system."""
    scripts = Counter(map(_script, _CODE.sub(" ", text)))
    del scripts[""]
    return scripts


@functools.lru_cache(maxsize=8192)
def _script(character: str) -> str:
    """First word of a letter's name in Unicode, such as LATIN or CJK; empty for what belongs to no language."""
    if not unicodedata.category(character).startswith("L"):
        return ""
    name = unicodedata.name(character, "").split(" ")[0]
    return "" if name in _OF_ALL else name
