"""Questions about the letters of words; the steps spell the words, one letter and one digit at a time."""

from random import Random
from typing import Any, ClassVar

from dsv4.data.tasks.base import Draft, GymTask


class LetterCounting(GymTask):
    """`How many times does the letter "h" appear in the text: "hundred"?`; steps: each letter and the count so far."""

    name = "letter_counting"
    difficulty: ClassVar[dict[str, Any]] = {"words": (1, 2), "letters_in_all": (3, 10), "case": "lower"}
    settings: ClassVar[dict[str, Any]] = {"min_words": 1, "max_words": 2}

    def draft(self, rng: Random) -> Draft | None:
        """Draw a short lower-case span."""
        entry = self.entry(rng)
        span, letter = entry["metadata"]["span"], entry["metadata"]["target_letter"]
        text = "".join(span)
        if not (text.isascii() and text.isalpha() and text.islower() and 3 <= len(text) <= 10):
            return None
        count, lines = 0, [letter]
        for word in span:
            line = ""
            for c in word:
                count += c == letter
                line += f"{c}{count}"
            lines.append(line)
        key = f"{letter} {' '.join(span)}"
        return Draft(key, entry["question"], entry["answer"], "\n".join(lines), entry)


class SpellBackward(GymTask):
    """`Spell this word backward (example: sun -> nus): splat`; steps: the letters numbered, then in reverse."""

    name = "spell_backward"
    letterwise = True
    difficulty: ClassVar[dict[str, Any]] = {"letters": (3, 5), "case": "lower"}
    settings: ClassVar[dict[str, Any]] = {"min_word_len": 3, "max_word_len": 5}

    def draft(self, rng: Random) -> Draft | None:
        """Draw a short lower-case word."""
        entry = self.entry(rng)
        word = entry["metadata"]["word"]
        if not (word.isascii() and word.isalpha() and word.islower()):
            return None
        places = [f"{c}{i}" for i, c in enumerate(word, 1)]
        reasoning = "".join(places) + "\n" + "".join(reversed(places))
        return Draft(word, entry["question"], entry["answer"], reasoning, entry)


LETTERS: tuple[type[GymTask], ...] = (LetterCounting, SpellBackward)
