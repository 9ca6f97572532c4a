"""Questions about lists: sort or filter numbers, reverse words, find the person who did something."""

import re
from random import Random
from typing import Any, ClassVar

from reasoning_gym.cognition.needle_data import NAMES, SUBJECTS, VERBS
from reasoning_gym.cognition.needle_haystack import generate_unique_triplets

from dsv4.data.tasks import wordings
from dsv4.data.tasks.base import Draft, Example, GymTask


class NumberSorting(GymTask):
    """`Sort these numbers in ascending order: 14, 3, 52` (our template, without the gym's long format rules).

    The answer is `3, 14, 52`; the gym scores its list form, and it must also match exactly, because the gym tolerates
    differences of 1. The steps are an insertion sort: a number, then the sorted list with it, so that every token is a
    copy or follows from comparing two numbers.
    """

    name = "number_sorting"
    reworded = True
    difficulty: ClassVar[dict[str, Any]] = {"numbers": (3, 5), "values": (0, 99), "decimals": 0}
    settings: ClassVar[dict[str, Any]] = {
        "min_numbers": 3,
        "max_numbers": 5,
        "min_decimals": 0,
        "max_decimals": 0,
        "min_value": 0,
        "max_value": 99,
    }

    def draft(self, rng: Random) -> Draft | None:
        """Draw a list of different numbers."""
        entry = self.entry(rng)
        left = [int(float(text)) for text in entry["metadata"]["original_numbers"]]
        if len(set(left)) < len(left):
            return None
        direction = entry["metadata"]["direction"]
        question = f"Sort these numbers in {direction} order: {', '.join(map(str, left))}"
        answer, lines = list[int](), list[str]()
        for number in left:
            answer = sorted([*answer, number], reverse=direction == "descending")
            lines.append(f"{number}: {' '.join(map(str, answer))}")
        others = wordings.DESCENDING if direction == "descending" else wordings.ASCENDING
        others = others.of(it=", ".join(map(str, left)))
        return Draft(question, question, ", ".join(map(str, answer)), "\n".join(lines), entry, wordings=others)

    def normalize(self, answer_text: str) -> str:
        """Turn `3, 14` into the gym's `['3', '14']`; leave anything else as it is."""
        text = answer_text.strip()
        return str(text.split(", ")) if re.fullmatch(r"\d+(, \d+)*", text) else text

    def score(self, example: Example, answer_text: str) -> float:
        """Score as the gym does, and require the exact numbers."""
        return super().score(example, answer_text) if answer_text.strip() == example.answer else 0.0


class NumberFiltering(GymTask):
    """`Keep all numbers larger than 37 in this list: ['14', '52'] ...`; the steps compare digit by digit.

    keep > 37              the rule, whichever of four ways the question has of saying it
    14: 1<3 no             tens; where they are equal, units too: 36: 3=3 6<7 no
    52: 5>3 yes

    A verdict on a whole number at once would be a function of four digits and four rules, which a tiny model does not
    learn: its verdicts are then close to chance while every number is copied right.
    """

    name = "number_filtering"
    difficulty: ClassVar[dict[str, Any]] = {"numbers": (3, 5), "values": (0, 99), "decimals": 0}
    settings: ClassVar[dict[str, Any]] = {
        "min_numbers": 3,
        "max_numbers": 5,
        "min_decimals": 0,
        "max_decimals": 0,
        "min_value": 0,
        "max_value": 99,
    }
    _keep: ClassVar[dict[str, str]] = {
        "keep_larger": ">",
        "keep_smaller": "<",
        "remove_larger": "<=",
        "remove_smaller": ">=",
    }

    def draft(self, rng: Random) -> Draft | None:
        """Draw a list and a bound."""
        entry = self.entry(rng)
        meta = entry["metadata"]
        numbers, bound, sign = meta["original_numbers"], meta["filter_value"], self._keep[meta["operation"]]
        kept = set(meta["result"])
        lines = [f"keep {sign} {bound}"]
        for number in numbers:
            compared = " ".join(_compare_digits(int(number), int(bound)))
            lines.append(f"{number}: {compared} {'yes' if number in kept else 'no'}")
        return Draft(entry["question"], entry["question"], entry["answer"], "\n".join(lines), entry)


def _compare_digits(a: int, b: int) -> list[str]:
    """Comparisons of tens and, where these are equal, of units, for numbers below 100: `1<3`, or `3=3`, `6<7`."""
    found: list[str] = []
    for x, y in zip(divmod(a, 10), divmod(b, 10), strict=True):
        found.append(f"{x}{'<' if x < y else '>' if x > y else '='}{y}")
        if x != y:
            break
    return found


class WordSequenceReversal(GymTask):
    """`Reverse this list of words: go, acute, word` (our template, without the gym's preamble)."""

    name = "word_sequence_reversal"
    reworded = True
    difficulty: ClassVar[dict[str, Any]] = {"words": (3, 5), "letters": (1, 6), "case": "lower"}
    settings: ClassVar[dict[str, Any]] = {"min_words": 3, "max_words": 5}

    def draft(self, rng: Random) -> Draft | None:
        """Draw short lower-case words; the steps number them, then count down."""
        if self._dataset is None:
            self.dataset.words = [w for w in self.dataset.words if w.isalpha() and w.islower() and len(w) <= 6]
        entry = self.entry(rng)
        words = entry["metadata"]["words"]
        # No space before the word: the answer starts without one, so the step from " word" to "word" is trained.
        numbered = [f"{i}{word}" for i, word in enumerate(words, 1)]
        question = f"Reverse this list of words: {', '.join(words)}"
        reasoning = "\n".join([*numbered, *reversed(numbered)])
        others = wordings.REVERSAL.of(it=", ".join(words))
        return Draft(question, question, entry["answer"], reasoning, entry, wordings=others)


class NeedleHaystack(GymTask):
    """`Tayo accepts beans. Chad likes pigs. Who likes pigs? ...`; steps: the question, then statements up to it."""

    name = "needle_haystack"
    difficulty: ClassVar[dict[str, Any]] = {
        "statements": (3, 5),
        "names": 150,
        "name_letters": (3, 5),
        "verb_words": 1,
        "subject_words": (1, 2),
    }

    def __init__(self) -> None:
        super().__init__()
        self._names = sorted({n for n in NAMES if n.isascii() and n.isalpha() and 3 <= len(n) <= 5})
        self._names = self._names[:: len(self._names) // 150][:150]
        self._verbs = sorted({v for v in VERBS if v.isascii() and " " not in v})
        self._subjects = sorted({s for s in SUBJECTS if s.isascii() and len(s.split()) <= 2})

    def entry(self, rng: Random) -> dict[str, Any]:
        """Draw statements as the gym does, but only from its shorter names, verbs and subjects."""
        count = rng.randint(3, 5)
        stack = generate_unique_triplets(self._names, self._verbs, self._subjects, count, rng)
        name, verb, subject = stack["needle"]
        asked = f"Who {verb} {subject}? Reply only with a name."
        text = "".join(f"{n} {v} {s}. " for n, v, s in stack["triplets"]) + "\n" + asked
        return {"question": text, "answer": name, "metadata": {"stack": stack["triplets"], "needle": stack["needle"]}}

    def draft(self, rng: Random) -> Draft | None:
        """Draw a haystack; None unless exactly one person did what is asked."""
        entry = self.entry(rng)
        name, verb, subject = entry["metadata"]["needle"]
        deeds = [(v, s) for _, v, s in entry["metadata"]["stack"]]
        if deeds.count((verb, subject)) > 1:
            return None
        lines = [f"{verb} {subject}"]
        for n, v, s in entry["metadata"]["stack"]:
            found = (v, s) == (verb, subject)
            lines.append(f"{n} {v} {s} {'yes' if found else 'no'}")
            if found:
                break
        return Draft(entry["question"], entry["question"], name, "\n".join(lines), entry)


LISTS: tuple[type[GymTask], ...] = (NumberSorting, NumberFiltering, WordSequenceReversal, NeedleHaystack)
