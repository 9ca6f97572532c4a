"""Questions about the letters of words; the steps spell the words, one letter and one digit at a time."""

from random import Random
from typing import Any, ClassVar

from dsv4.data.tasks import wordings
from dsv4.data.tasks.base import Draft, Example, GymTask, Task


class LetterCounting(GymTask):
    """`How many times does the letter "h" appear in the text: "hundred"?`; steps: each letter and the count so far."""

    name = "letter_counting"
    reworded = True
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
        others = wordings.LETTER_COUNT.of(c=letter, it=" ".join(span))
        return Draft(key, entry["question"], entry["answer"], "\n".join(lines), entry, wordings=others)


class SpellBackward(GymTask):
    """`Spell this word backward (example: sun -> nus): splat`; steps: the letters numbered, then in reverse."""

    name = "spell_backward"
    letterwise = True
    reworded = True
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
        others = wordings.BACKWARD.of(it=word)
        return Draft(word, entry["question"], entry["answer"], reasoning, entry, wordings=others)


class Spelling(Task):
    """`Spell the word "hundred" letter by letter.`, answer `h-u-n-d-r-e-d`; steps: the letters numbered.

    A word may be one token. How it is spelled can only be learned from questions like this one, so every word that the
    other letter tasks can ask about is asked here, those of their evaluation split too: forward, never backward.
    """

    name = "spelling"
    letterwise = True
    difficulty: ClassVar[dict[str, Any]] = {"letters": (3, 10), "case": "lower"}
    _asked = ('Spell the word "{}" letter by letter.', "Spell this word: {}", "How do you spell {}?")

    def __init__(self) -> None:
        self._words: list[str] = []

    def draft(self, rng: Random) -> Draft | None:
        """Draw a word of the gym's lists."""
        if not self._words:
            sources = (LetterCounting(), SpellBackward())
            found = {word for task in sources for word in task.dataset.words}
            self._words = sorted(w for w in found if w.isascii() and w.isalpha() and w.islower() and 3 <= len(w) <= 10)
        word = rng.choice(self._words)
        reasoning = "".join(f"{c}{i}" for i, c in enumerate(word, 1))
        question = rng.choice(self._asked).format(word)
        return Draft(question, question, "-".join(word), reasoning)

    def score(self, example: Example, answer_text: str) -> float:
        """Compare the letters."""
        return float(answer_text.strip() == example.answer)


LETTERS: tuple[type[Task], ...] = (LetterCounting, SpellBackward, Spelling)
