"""Other wordings of the tasks' questions: some that training has too, others that only an evaluation has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wordings:
    """One question in other words: `train` for training, `held_out` for evaluations."""

    train: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()

    def of(self, **fields: object) -> Wordings:
        """The same with the question's own numbers or words in the places of their names."""
        train, held_out = (tuple(text.format(**fields) for text in texts) for texts in (self.train, self.held_out))
        return Wordings(train, held_out)


NO_OTHERS = Wordings()
EXPRESSION = Wordings(
    (
        "What is {it}?", "{it}", "{it} =", "{it} = ?", "Compute {it}.", "How much is {it}?", "Work out {it}.",
        "Please calculate {it}.", "What does {it} equal?", "What's {it}?",
    ),
    ("Can you tell me what {it} is?", "Evaluate {it}.", "What do you get for {it}?"),
)  # fmt: skip
EQUATION = Wordings(
    ("Solve {it}.", "Solve {it} for {v}.", "What is {v} if {it}?", "{it}. Find {v}.", "Find {v}: {it}"),
    ("If {it}, what does {v} equal?", "{it}, so what is {v}?"),
)
GCD = Wordings(
    (
        "What is the gcd of {a} and {b}?", "gcd({a}, {b})", "Find the greatest common divisor of {a} and {b}.",
        "What is the largest number that divides both {a} and {b}?",
    ),
    ("Give me the GCD of {a} and {b}.", "What is the greatest common divisor of {a} and {b}?"),
)  # fmt: skip
COUNT_BITS = Wordings(
    ("How many ones are in {n} in binary?", "Count the 1 bits of {n}.", "How many bits of {n} are 1?"),
    ("How many 1 bits does {n} have?", "How many ones does the binary form of {n} have?"),
)
ASCENDING = Wordings(
    ("Sort {it}.", "Sort {it} from smallest to largest.", "Put these numbers in order: {it}", "Sort: {it}"),
    ("Can you sort {it}?", "Put {it} in ascending order."),
)
DESCENDING = Wordings(
    ("Sort {it} from largest to smallest.", "Put these numbers in descending order: {it}"),
    ("Can you sort {it} in descending order?", "Order these numbers from largest to smallest: {it}"),
)
REVERSAL = Wordings(
    ("Reverse the order of these words: {it}", "Say these words in reverse order: {it}", "Reverse these words: {it}"),
    ("Give these words in reverse order: {it}", "Reverse this list: {it}"),
)
LETTER_COUNT = Wordings(
    (
        "How many {c} are in {it}?", "How many times is {c} in {it}?", 'Count the letter "{c}" in "{it}".',
        "How many {c}'s are there in {it}?", 'How many letters "{c}" are in the word "{it}"?',
    ),
    ('How often does "{c}" occur in {it}?', "How many {c}'s are in {it}?"),
)  # fmt: skip
BACKWARD = Wordings(
    ("Spell {it} backward.", "Write {it} backwards.", "What is {it} backwards?", "Reverse the letters of {it}."),
    ("Can you spell {it} backwards?", "Spell the word {it} backward."),
)
