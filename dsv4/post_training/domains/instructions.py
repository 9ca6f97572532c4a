"""Instructions that a program can check: one to three constraints on a short text, or a JSON schema.

A text is drawn first and the constraints are true of it: so no two contradict each other, and the text is a solution.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from deepseek_recipe import Conversation, UserMessage

from dsv4.data.tasks.words import CITIES, COLOURS, FIRST_NAMES, ITEMS
from dsv4.post_training.domains.constraints import GROUPS, Constraint, constraints_of
from dsv4.post_training.domains.domain import Domain, Level
from dsv4.post_training.problems import Explained

MOST = 3  # constraints of a question
VERBS = ("likes", "has", "sees", "wants", "sells", "finds")


@dataclass(frozen=True)
class Instructions:
    """A request with constraints. `partial`: the reward is the share that holds; else 1 for all, 0 otherwise."""

    key: str
    question: str
    constraints: tuple[Constraint, ...]
    solution: str
    partial: bool = False
    thinking: bool = False
    domain: str = "instructions"

    @property
    def reasoning(self) -> str:
        """The constraints in short, one per line."""
        return "\n".join(one.note for one in self.constraints)

    def prompt(self) -> Conversation:
        return Conversation([UserMessage(self.question)], thinking_mode=self.thinking)

    def reward(self, answer: str) -> float:
        return self.explain(answer).value

    def explain(self, answer: str) -> Explained:
        """Reward of an answer, and the constraints that it breaks."""
        broken = [one.wording for one in self.constraints if not one.holds(answer)]
        share = 1.0 - len(broken) / len(self.constraints)
        reason = f"broken: {' '.join(broken)}" if broken else "all constraints hold"
        return Explained(share if self.partial else float(not broken), reason)


@dataclass(frozen=True)
class InstructionFollowing(Domain):
    """Short texts under constraints. Easy: one sentence or list under one constraint, without counting of words."""

    name: ClassVar[str] = "instructions"
    partial: bool = False
    thinking: bool = False
    level: Level = "standard"

    def draw(self, rng: Random) -> Instructions | None:
        if self.level == "easy":
            subject, solution, constraints = _easy(rng)
        elif rng.random() < 0.2:
            subject, solution, constraints = _object(rng)
        else:
            subject, solution = _text(rng)
            avoided = rng.choice([item for item in ITEMS if item not in solution.lower()])
            constraints = _chosen(constraints_of(solution, avoided, rng), rng)
        if not constraints:
            return None
        request = rng.choice(("Write about {}.", "Write something about {}.", "Tell me about {}.")).format(subject)
        question = " ".join([request, *(one.wording for one in constraints)])
        said = " ".join(sorted(one.wording for one in constraints))
        return Instructions(
            f"instructions {subject}: {said}", question, constraints, solution, self.partial, self.thinking
        )


def _chosen(candidates: list[Constraint], rng: Random) -> tuple[Constraint, ...]:
    """One to MOST constraints, at most one of each group."""
    rng.shuffle(candidates)
    found: list[Constraint] = []
    size = rng.randint(1, MOST)
    for one in candidates:
        if len(found) < size and not any({one.kind, other.kind} <= group for other in found for group in GROUPS):
            found.append(one)
    return tuple(found)


def _easy(rng: Random) -> tuple[str, str, tuple[Constraint, ...]]:
    """A subject, a sentence or a list about it, and the constraint that made it so."""
    name, color, item = rng.choice(FIRST_NAMES), rng.choice(COLOURS), rng.choice(ITEMS)
    sentence = f"{name} {rng.choice(VERBS)} {color} {item}."
    listed = rng.sample(ITEMS, rng.randint(2, 5))
    text, constraint = rng.choice(
        (
            (sentence, Constraint("include", item)),
            (sentence, Constraint("starts", name.lower())),
            (sentence, Constraint("ends", f"{color} {item}.")),
            (sentence.lower(), Constraint("lower")),
            (sentence.upper(), Constraint("upper")),
            (f'"{sentence}"', Constraint("quoted")),
            ("\n".join(f"- {one}" for one in listed), Constraint("bullets", len(listed))),
        )
    )
    return name, text, (constraint,)


def _text(rng: Random) -> tuple[str, str]:
    """A subject, and sentences or a list about it."""
    name = rng.choice(FIRST_NAMES)
    if rng.random() < 0.3:
        items = rng.sample(ITEMS, rng.randint(2, 5))
        return name, "\n".join(f"- {item}" for item in items)
    sentences = [
        f"{name} {rng.choice(VERBS)} {rng.choice(COLOURS)} {rng.choice(ITEMS)}"
        + rng.choice(("", f" in {rng.choice(CITIES)}", f" and {rng.choice(ITEMS)}"))
        + rng.choice("..!")
        for _ in range(rng.randint(1, 3))
    ]
    text = " ".join(sentences)
    style = rng.random()
    if style < 0.2:
        text = text.lower()
    elif style < 0.4:
        text = text.upper()
    return name, f'"{text}"' if rng.random() < 0.2 else text


def _object(rng: Random) -> tuple[str, str, tuple[Constraint, ...]]:
    """A subject, an object about it as JSON, and the schema that it fits."""
    name = rng.choice(FIRST_NAMES)
    low = rng.randint(1, 50)
    fields: dict[str, tuple[Any, dict[str, Any]]] = {
        "name": (name, {"const": name}),
        "age": (rng.randint(low, low + 9), {"type": "integer", "minimum": low, "maximum": low + 9}),
        "city": (rng.choice(CITIES), {"type": "string", "minLength": 1}),
        "color": ("red", {"enum": ["red", *rng.sample(COLOURS[1:], 2)]}),
        "items": (
            rng.sample(ITEMS, 2), {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 3}
        ),
        "member": (rng.random() < 0.5, {"type": "boolean"}),
    }  # fmt: skip
    kept = rng.sample(sorted(fields), rng.randint(1, 3))
    schema = {
        "type": "object", "properties": {key: fields[key][1] for key in kept}, "required": kept,
        "additionalProperties": False,
    }  # fmt: skip
    solution = json.dumps({key: fields[key][0] for key in kept})
    return name, solution, (Constraint("json", json.dumps(schema)),)
