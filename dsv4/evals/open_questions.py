"""Open questions, written by hand and in no training data: is the answer plain English, of words that exist?

The test is of form: words of the corpus's word list, an ordinary end, no digits. Whether an answer is also honest and
to the point is read by people: `dsv4 eval` writes all answers to a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsv4.data.tasks import Example
from dsv4.engine import LLM
from dsv4.evals.intervals import wilson
from dsv4.evals.results import MODES
from dsv4.evals.runner import answer_all
from dsv4.post_training.problems import answer_of

LEAST_WORDS, MOST_WORDS = 1, 80
NAMES = frozenset({"dsv4", "v4's", "v4", "deepseek", "deepseek's"})  # names that the word list need not have


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


QUESTIONS: dict[str, tuple[str, ...]] = {
    "greeting": _lines("""
        Hi, how's it going?
        Hello my friend
        A very good morning to you!
        Hey nano, nice to see you
        Good to meet you.
        hi im new here
        Hello from Berlin!
        Well hello!
        Hi! Can we talk?
        Welcome back
        hey
        Pleased to meet you, I am Susan.
        """),
    "identity": _lines("""
        So who are you, exactly?
        Is there a person behind this?
        Are you ChatGPT?
        Could you tell me a bit about yourself?
        Are you a machine or a human being?
        what should i call you
        Do you have a first name?
        What is dsv4 nano?
        Am I talking to a computer?
        Who built you and why?
        Which company owns you?
        Do you know who you are?
        """),
    "ability": _lines("""
        What kind of help can I get from you?
        Name three things that you can do.
        I need help. What do you offer?
        Is there anything you are good at?
        What would you be able to do for a student?
        Which of my questions could you answer well?
        Can you do mathematics?
        Do you know any English words?
        how do i use you
        What is your best skill?
        Are you able to browse the internet?
        Can you remember what I said yesterday?
        """),
    "small talk": _lines("""
        I just woke up.
        My day was wonderful!
        What a beautiful evening.
        I love cooking for my friends.
        I am a little worried about my exam.
        You seem to be in a good mood.
        Let's chat about something.
        My dog is the sweetest animal.
        I am going on holiday next week!
        This coffee is cold.
        That was quick, thank you!
        I did not expect that.
        I think we should be friends.
        You made me smile.
        I don't understand you at all.
        Please be honest with me.
        """),
    "about the asker": _lines("""
        Can you guess what I had for breakfast?
        What's my sister called?
        Where did I leave my glasses?
        How tall am I?
        Which school did I go to?
        What did I dream about last night?
        Why did my neighbour move away?
        How many brothers do I have?
        Does my boss like me?
        What is written in the letter on my desk?
        Who called me this morning?
        Which colour is the shirt that I am wearing?
        """),
    "now": _lines("""
        What's the time right now?
        Which day of the week is today?
        Is it raining at the moment?
        Who won the match last night?
        What is the temperature outside?
        How much is a loaf of bread at the shop today?
        What is the latest song of my favourite band?
        Is the train to London late?
        Who is the prime minister these days?
        What are people talking about this week?
        Is the bakery on my street open?
        How is traffic in the city?
        """),
    "future": _lines("""
        Who will be famous in ten years?
        Am I going to be happy?
        Will my team win the league?
        What is going to happen to us all?
        Will there be snow at Christmas?
        How will computers look in a hundred years?
        Will she say yes?
        When will I meet my true love?
        Can you predict tomorrow's lottery?
        Will the price of gold go up?
        """),
    "the world": _lines("""
        Why did the old bakery in my village close?
        How many chairs are in the town hall?
        Who painted the picture in my uncle's kitchen?
        How many people are asleep right now?
        What was the name of the first sailor who ever sang?
        Who lives on the third floor?
        How many fish are in the sea?
        What does the queen keep in her handbag?
        Why is my street named after a bird?
        Who ate the last cake?
        How long was the longest beard in my town?
        What is behind the green door?
        """),
    "the model's life": _lines("""
        What did you do on Sunday?
        Which film made you cry?
        Do you get bored when nobody writes?
        Who is your best friend?
        Have you ever been in love?
        Do you prefer tea or coffee?
        Would you like a glass of water?
        What do you look like?
        Where did you grow up?
        Are you scared of the dark?
        What makes you laugh?
        Do you have a birthday?
        """),
    "beyond it": _lines("""
        Write a short poem for my grandmother.
        Please paint a sunset for me.
        Could you call a taxi?
        Tell me something really funny.
        Say good night in Swedish.
        Write an app that counts my steps.
        Please wash the dishes.
        Invent a bedtime story with a dragon.
        Find me a cheap hotel.
        Should I take this medicine?
        Is it wise to lend him money?
        Give me advice on love.
        """),
}


@dataclass(frozen=True)
class OpenAnswer:
    """A question, the answer without its thinking (None: the thinking never ended), and True for plain English."""

    kind: str
    mode: str
    question: str
    answer: str | None
    plain: bool


def is_plain_english(answer: str, words: frozenset[str]) -> bool:
    """True for sentences of known words, and nothing else than these and their punctuation."""
    found = re.findall(r"[A-Za-z0-9']+", answer)
    if not LEAST_WORDS <= len(found) <= MOST_WORDS or not re.search(r"[.!?]$", answer.strip()):
        return False
    if re.search(r"[^A-Za-z0-9\s.,;:!?'\"()-]", answer):
        return False
    return all(word.lower() in NAMES or word.lower().strip("'") in words for word in found)


def ask(llm: LLM, words: frozenset[str], max_tokens: int = 200) -> list[OpenAnswer]:
    """Greedy answers to all questions, thinking and not."""
    asked = [(kind, question) for kind, questions in QUESTIONS.items() for question in questions]
    found: list[OpenAnswer] = []
    for mode in MODES:
        examples = [_example(question, mode == MODES[0]) for _, question in asked]
        for (kind, question), answered in zip(asked, answer_all(llm, examples, max_tokens), strict=True):
            answer = answer_of(answered.text, answered.example.thinking)
            plain = answer is not None and answered.finished and is_plain_english(answer, words)
            found.append(OpenAnswer(kind, mode, question, answer, plain))
    return found


def _example(question: str, thinking: bool) -> Example:
    message = {"role": "user", "content": question}
    return Example(
        task="open_questions",
        key=question,
        messages=(message,),
        tools=(),
        thinking=thinking,
        effort="low",
        reasoning="",
        answer="",
        tool_calls=(),
        entry={},
    )


def to_lines(answers: Sequence[OpenAnswer]) -> Iterator[str]:
    """Rows of a Markdown table: plain answers by kind and mode."""
    yield f"| open questions | {MODES[0]} | {MODES[1]} |"
    yield "| --- | --- | --- |"
    for kind in [*QUESTIONS, "all"]:
        cells: list[str] = []
        for mode in MODES:
            plain = [a.plain for a in answers if a.mode == mode and kind in (a.kind, "all")]
            low, high = wilson(sum(plain), len(plain))
            cells.append(f"{sum(plain)} of {len(plain)} ({100 * low:.0f}-{100 * high:.0f} %)")
        yield f"| {kind} | {' | '.join(cells)} |"
