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

# Code and tool calls have words of their own. Reasoning ends after them; an answer may be cut within.
_CODE = re.compile(rf"```.*?```|<{DSML}.*?{BLOCK_END}", re.DOTALL)
_CUT_CODE = re.compile(rf"(?:```|<{DSML}).*\Z", re.DOTALL)

_SYMBOLS = {"<font>", "<super>", "<sub>"}  # decompositions of letters that are symbols of mathematics and units
_OF_NO_LANGUAGE = {
    *("MODIFIER", "MICRO", "EULER", "ALEF", "BET", "GIMEL", "DALET", "TURNED"),
    *("IDEOGRAPHIC", "KATAKANA-HIRAGANA", "VERTICAL"),  # marks of repetition and length, beside the letters
}
_FAMILIES = {"HIRAGANA": "KANA", "KATAKANA": "KANA"}
_WITH_HAN = ("KANA", "HANGUL")  # written with Chinese characters, too, whether a question has one or not


def question_of(asked: Conversation) -> str:
    """Text of the user's last message; empty if there is none."""
    texts = [str(message.content) for message in asked.messages if isinstance(message, UserMessage)]
    return texts[-1] if texts else ""


def consistency(question: str, text: str) -> float:
    """Share of a text's letters that are in writing systems of the question, fenced code and tool calls aside.

    Of a text with reasoning, that of the reasoning. 1.0 where either has no letters. Letters of mathematics belong to
    no language: so do Greek ones, unless they are most of the question's.
    """
    reasoning, ended, _ = text.partition(END_OF_THINKING)
    known = _letters(question)
    found = _letters(reasoning) if ended else _letters(_CUT_CODE.sub("", _CODE.sub(" ", text)))
    if 2 * known["GREEK"] <= known.total():
        del known["GREEK"], found["GREEK"]
    if not known or not found:
        return 1.0
    scripts = {*known} | ({"CJK"} if any(script in known for script in _WITH_HAN) else set[str]())
    return sum(count for script, count in found.items() if script in scripts) / found.total()


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
    if unicodedata.decomposition(character).partition(" ")[0] in _SYMBOLS:
        return ""
    if _first_word(character) in _OF_NO_LANGUAGE:
        return ""
    # Narrow and wide letters as others are. Of some nothing is left but marks.
    letters = [form for form in unicodedata.normalize("NFKC", character) if unicodedata.category(form)[0] == "L"]
    names = [name for name in map(_first_word, letters) if name not in _OF_NO_LANGUAGE]
    return _FAMILIES.get(names[0], names[0]) if names else ""


def _first_word(character: str) -> str:
    return unicodedata.name(character, "").partition(" ")[0]
