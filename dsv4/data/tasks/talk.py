"""Small talk: the model's identity and abilities, greetings, and a small set of facts asked in several ways."""

import dataclasses
from collections.abc import Sequence
from random import Random
from typing import Any, ClassVar

from dsv4.data.tasks.base import Draft, Example, Task, split_of

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Austria": "Vienna", "Norway": "Oslo",
    "Egypt": "Cairo", "Peru": "Lima", "Japan": "Tokyo", "Greece": "Athens", "Poland": "Warsaw", "Portugal": "Lisbon",
    "Ireland": "Dublin", "Cuba": "Havana", "Kenya": "Nairobi", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Russia": "Moscow", "China": "Beijing", "India": "New Delhi", "Canada": "Ottawa",
    "Hungary": "Budapest", "Belgium": "Brussels", "the Netherlands": "Amsterdam", "the United Kingdom": "London",
}  # fmt: skip
COLOURS = {
    "grass": "green", "the sky": "blue", "snow": "white", "coal": "black", "a banana": "yellow", "a tomato": "red",
    "blood": "red", "a carrot": "orange", "milk": "white", "a lemon": "yellow", "an elephant": "grey",
    "a frog": "green", "the sun": "yellow", "chocolate": "brown",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "light": "dark", "up": "down", "old": "young", "happy": "sad",
    "open": "closed", "rich": "poor", "wet": "dry", "early": "late", "full": "empty", "hard": "soft", "long": "short",
}  # fmt: skip
LEGS = {
    "a dog": 4,
    "a cat": 4,
    "a spider": 8,
    "an ant": 6,
    "a bird": 2,
    "a horse": 4,
    "a bee": 6,
    "a snake": 0,
    "a cow": 4,
}
DEFINITIONS = {
    "a token": "A token is a piece of text that a language model reads or writes in one step.",
    "a transformer": "A transformer is a neural network that mixes tokens by attention.",
    "attention": "Attention lets each token read from the tokens before it.",
    "an expert": "An expert is one of many small networks; a router picks a few for each token.",
    "a router": "A router chooses which experts work on a token.",
    "a loss": "A loss is a number that says how wrong a model is.",
    "a prime number": "A prime number has exactly two divisors, 1 and itself.",
    "an even number": "An even number can be divided by 2.",
    "an odd number": "An odd number cannot be divided by 2.",
    "a bit": "A bit is a 0 or a 1.",
    "a byte": "A byte is 8 bits.",
    "Python": "Python is a programming language.",
    "water": "Water is a clear liquid that all life needs.",
    "a triangle": "A triangle is a shape with three sides.",
    "a square": "A square is a shape with four equal sides.",
}
IDENTITY = "I am dsv4 nano, a tiny language model with DeepSeek V4's architecture."
ABILITY = "I can add and sort numbers, spell and reverse words, say what many words mean, find facts and call tools."
GREETING = "Hello! How can I help you?"
MOOD = "I am fine, thank you. What can I do for you?"
WELCOME = "You are welcome!"
GOODBYE = "Goodbye!"
SAYINGS: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("greet", ("Hi", "Hello", "Hello!", "Hi!", "Hey", "Hey there", "Good morning", "Good evening", "Hi there!", "hello",
               "hi"),
     "a greeting", GREETING),
    ("identity", ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.",
                  "Which model are you?", "who are you", "Are you a language model?", "What model is this?",
                  "Introduce yourself."),
     "they ask who I am", IDENTITY),
    ("ability", ("What can you do?", "How can you help me?", "What are you good at?", "What do you know?", "Help",
                 "what can you do", "Can you help me?", "Which tasks can you do?"),
     "they ask what I can do", ABILITY),
    ("thanks", ("Thanks", "Thank you", "Thank you!", "Thanks a lot!", "Great, thanks.", "thanks",
                "Thank you very much."),
     "they thank me", WELCOME),
    ("bye", ("Bye", "Goodbye", "Good night", "See you later", "Bye!", "bye"), "they say goodbye", GOODBYE),
    ("mood", ("How are you?", "How are you today?", "How is it going?", "Are you well?", "how are you"),
     "they ask how I am", MOOD),
    ("size", ("How big are you?", "How many parameters do you have?", "Are you a big model?",
              "How large is this model?"),
     "they ask my size", "I am tiny: about 27 million parameters."),
    ("maker", ("Who made you?", "Who trained you?", "Where do you come from?", "Were you made by DeepSeek?"),
     "they ask who made me", "I was trained from nothing by the recipe in the dsv4 repository, not by DeepSeek."),
    ("limits", ("Are you smart?", "Can you write a novel?", "What can you not do?", "Do you know everything?"),
     "they ask about my limits", "I am a very small model. I know a few tasks and a few facts, and I can be wrong."),
)  # fmt: skip


def _fact(rng: Random) -> tuple[str, str, str]:
    kind = rng.randrange(5)
    if kind == 0:
        country = rng.choice(sorted(CAPITALS))
        city = CAPITALS[country]
        asked = rng.choice(
            ("What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}.",
             "The capital of {}?", "Tell me the capital of {}.", "What's the capital of {}?")
        )  # fmt: skip
        return asked.format(country), f"capital of {country}: {city}", f"The capital of {country} is {city}."
    if kind == 1:
        thing = rng.choice(sorted(COLOURS))
        asked = rng.choice(
            ("What colour is {}?", "Which colour is {}?", "Tell me the colour of {}.", "What is the colour of {}?")
        )
        return (
            asked.format(thing),
            f"colour of {thing}: {COLOURS[thing]}",
            f"{thing[0].upper()}{thing[1:]} is {COLOURS[thing]}.",
        )
    if kind == 2:
        word = rng.choice(sorted(OPPOSITES))
        asked = rng.choice(
            (
                "What is the opposite of {}?",
                "Name the opposite of {}.",
                "Tell me the opposite of {}.",
                "Opposite of {}?",
            )
        )
        return (
            asked.format(word),
            f"opposite of {word}: {OPPOSITES[word]}",
            f"The opposite of {word} is {OPPOSITES[word]}.",
        )
    if kind == 3:
        animal = rng.choice(sorted(LEGS))
        asked = rng.choice(("How many legs does {} have?", "Tell me how many legs {} has.", "Number of legs of {}?"))
        return (
            asked.format(animal),
            f"legs of {animal}: {LEGS[animal]}",
            f"{animal[0].upper()}{animal[1:]} has {LEGS[animal]} legs.",
        )
    thing = rng.choice(sorted(DEFINITIONS))
    asked = rng.choice(("What is {}?", "Explain {}.", "Define {}.", "Tell me what {} is.", "Can you explain {}?"))
    return asked.format(thing), f"define {thing}", DEFINITIONS[thing]


class SmallTalk(Task):
    """One question of small talk or one fact."""

    name = "conversation"
    group = "talk"
    difficulty: ClassVar[dict[str, Any]] = {
        "facts": len(CAPITALS) + len(COLOURS) + len(OPPOSITES) + len(LEGS) + len(DEFINITIONS),
        "turns": 1,
    }

    def draft(self, rng: Random) -> Draft | None:
        """Draw a saying or a fact."""
        if rng.random() < 0.4:
            name, asked, why, answer = rng.choice(SAYINGS)
            question = rng.choice(asked)
            # The shortest wording of each question is always in training: people type it first.
            key = question if question != asked[0] else _training_key(name)
            return Draft(key, question, answer, why)
        question, why, answer = _fact(rng)
        return Draft(question, question, answer, why)

    def score(self, example: Example, answer_text: str) -> float:
        """Compare the whole answer."""
        return float(answer_text.strip() == example.answer)


def _training_key(name: str) -> str:
    """Return the first key of the form `name n` that falls into the training split."""
    return next(key for key in (f"{name} {n}" for n in range(1000)) if split_of(key) == "train")


class FollowUp(Task):
    """One or two finished exchanges, then a question of another task: the second turn of a chat."""

    name = "follow_up"
    group = "talk"
    difficulty: ClassVar[dict[str, Any]] = {"earlier_exchanges": (1, 2)}

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = {task.name: task for task in tasks}

    def draft(self, rng: Random) -> Draft | None:
        """Draw the earlier exchanges from the same split as the last question."""
        names = sorted(self._tasks)
        last_name = rng.choice(names)
        last = self._tasks[last_name].draft(rng)
        if last is None:
            return None
        split, history = split_of(last.key), []
        for _ in range(rng.randint(1, 2)):
            # Half of the earlier exchanges are small talk, as in a real chat.
            earlier = self._tasks["conversation" if rng.random() < 0.5 else rng.choice(names)].draft(rng)
            if earlier is None or split_of(earlier.key) != split:
                return None
            history += [
                {"role": "user", "content": earlier.question},
                {"role": "assistant", "content": earlier.answer, "reasoning": earlier.reasoning},
            ]
        entry = {"task": last_name, "entry": last.entry}
        return dataclasses.replace(last, history=tuple(history), entry=entry)

    def score(self, example: Example, answer_text: str) -> float:
        """Score the last answer with its own task's scorer."""
        inner = dataclasses.replace(example, entry=example.entry["entry"])
        return self._tasks[example.entry["task"]].score(inner, answer_text)
