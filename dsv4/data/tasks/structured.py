"""Tool calls and JSON extraction; the exact call and the exact object are required."""

import json
import re
from random import Random
from typing import Any, ClassVar

from dsv4.conversation.tool_tags import BLOCK, BLOCK_END
from dsv4.data.tasks.base import Draft, Example, Task, split_of
from dsv4.data.tasks.words import CITIES, COLOURS, FIRST_NAMES, ITEMS, TOPICS, WEATHER
from dsv4.tokenizer.special import DSML

TOOLS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
    "add": {
        "name": "add",
        "description": "Add two numbers",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
    "set_timer": {
        "name": "set_timer",
        "description": "Start a timer",
        "parameters": {"type": "object", "properties": {"minutes": {"type": "integer"}}},
    },
    "search": {
        "name": "search",
        "description": "Search the web",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
    },
}

UNREADABLE = (ValueError, RecursionError)  # errors of json.loads: numbers of thousands of digits, brackets as deep, too
_INVOKE = re.compile(rf'<{DSML}invoke name="([^"]*)">\n(.*?)</{DSML}invoke>', re.DOTALL)
_PARAMETER = re.compile(rf'<{DSML}parameter name="([^"]*)" string="(true|false)">(.*?)</{DSML}parameter>', re.DOTALL)


def parse_tool_calls(text: str) -> list[dict[str, Any]] | None:
    """Parse an answer's tool-call block to [{name, arguments}]; None if it is malformed, [] without one."""
    if BLOCK not in text:
        return []
    block, closed, after = text.split(BLOCK, 1)[1].partition(BLOCK_END)
    if not closed or after.strip():
        return None
    calls: list[dict[str, Any]] = []
    for name, body in _INVOKE.findall(block):
        arguments: dict[str, Any] = {}
        for key, is_string, value in _PARAMETER.findall(body):
            if is_string == "true":
                arguments[key] = value
                continue
            try:
                arguments[key] = json.loads(value)
            except UNREADABLE:
                return None
        calls.append({"name": name, "arguments": arguments})
    return calls


def _request(rng: Random, name: str) -> tuple[str, dict[str, Any], str, str, str]:
    """Draw a request for one tool: question, arguments, reason to call, the tool's result, the final answer."""
    if name == "get_weather":
        city = rng.choice(CITIES)
        sky, degrees = rng.choice(WEATHER), rng.randint(0, 35)
        asked = rng.choice(["What is the weather in {}?", "How is the weather in {} today?", "Weather in {}, please."])
        result = f"{sky}, {degrees} degrees"
        answer = f"It is {sky} in {city}, {degrees} degrees."
        return asked.format(city), {"city": city}, f"weather in {city}: get_weather", result, answer
    if name == "add":
        a, b = rng.randint(10, 9999), rng.randint(10, 9999)
        asked = rng.choice(["Use the tool to add {} and {}.", "Add {} and {} with the tool.", "Please add {} and {}."])
        return asked.format(a, b), {"a": a, "b": b}, f"add {a} and {b}: add", str(a + b), f"{a} + {b} = {a + b}."
    if name == "set_timer":
        minutes = rng.randint(1, 90)
        asked = rng.choice(
            ["Set a timer for {} minutes.", "Start a {} minute timer.", "Please set a timer of {} minutes."]
        )
        answer = f"The timer is set to {minutes} minutes."
        return asked.format(minutes), {"minutes": minutes}, f"timer of {minutes} minutes: set_timer", "ok", answer
    topic = f"{rng.choice(TOPICS)} in {rng.choice(CITIES)}" if rng.random() < 0.5 else rng.choice(TOPICS)
    pages = rng.randint(2, 99)
    asked = rng.choice(["Search the web for {}.", "Please search for {}.", "Look up {} on the web."])
    return (
        asked.format(topic),
        {"query": topic},
        f"search for {topic}: search",
        f"{pages} pages",
        f"I found {pages} pages about {topic}.",
    )


class ToolCalls(Task):
    """A request that needs a tool; the assistant turn is the call, or the answer after the tool's result.

    Several exchanges share one conversation in training, so that the long tools block occurs once.
    """

    name = "tool_call"
    group = "tools"
    difficulty: ClassVar[dict[str, Any]] = {"tools": (2, 3), "arguments": (1, 2), "earlier_exchanges": (0, 2)}

    def draft(self, rng: Random) -> Draft | None:
        """Draw a set of tools, earlier exchanges and a last request."""
        names = rng.sample(sorted(TOOLS), rng.randint(2, 3))
        history: list[dict[str, Any]] = []
        calls = 0

        def ask() -> tuple[str, str, str, str, list[dict[str, Any]]]:
            nonlocal calls
            calls += 1
            name = rng.choice(names)
            question, arguments, why, result, answer = _request(rng, name)
            return question, why, result, answer, [{"id": f"call_{calls}", "name": name, "arguments": arguments}]

        for _ in range(rng.randint(0, 2)):
            question, why, result, answer, call = ask()
            history += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "", "reasoning": why, "tool_calls": call},
                {"role": "tool", "content": result, "tool_call_id": call[0]["id"]},
                {"role": "assistant", "content": answer, "reasoning": "say the result"},
            ]
        question, why, result, answer, call = ask()
        if any(split_of(m["content"]) != split_of(question) for m in history if m["role"] == "user"):
            return None
        tools = tuple(TOOLS[n] for n in names)
        if rng.random() < 0.6:
            return Draft(question, question, "", why, {}, tuple(history), tools, tuple(call))
        history += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "", "reasoning": why, "tool_calls": call},
            {"role": "tool", "content": result, "tool_call_id": call[0]["id"]},
        ]
        return Draft(question, "", answer, "say the result", {}, tuple(history), tools)

    def score(self, example: Example, answer_text: str) -> float:
        """Compare the calls' names and arguments, or the final answer's text."""
        text = answer_text.replace("<｜end▁of▁sentence｜>", "")
        if not example.tool_calls:
            return float(text.strip() == example.answer)
        wanted = [{"name": c["name"], "arguments": c["arguments"]} for c in example.tool_calls]
        return float(parse_tool_calls(text) == wanted)


class JsonExtraction(Task):
    """`Extract name, age and city as JSON: Anna is 34 years old and lives in Rome.`; the steps name the fields."""

    name = "json_extraction"
    group = "tools"
    difficulty: ClassVar[dict[str, Any]] = {"fields": (2, 4)}

    def draft(self, rng: Random) -> Draft | None:
        """Draw a sentence and the fields to read from it."""
        name, city, age = rng.choice(FIRST_NAMES), rng.choice(CITIES), rng.randint(1, 99)
        kind = rng.randrange(3)
        if kind == 0:
            fields: dict[str, Any] = {"name": name, "age": age, "city": city}
            sentence = rng.choice(
                [f"{name} is {age} years old and lives in {city}.", f"{name} from {city} is {age} years old."]
            )
        elif kind == 1:
            item, colour, count = rng.choice(ITEMS), rng.choice(COLOURS), rng.randint(2, 99)
            fields = {"name": name, "count": count, "colour": colour, "item": item}
            sentence = rng.choice([f"{name} bought {count} {colour} {item}.", f"{name} has {count} {colour} {item}."])
        else:
            other, hour = rng.choice([n for n in FIRST_NAMES if n != name]), rng.randint(1, 12)
            fields = {"name": name, "with": other, "city": city, "hour": hour}
            sentence = f"{name} meets {other} in {city} at {hour} o'clock."
        keep = rng.sample(sorted(fields), rng.randint(2, len(fields)))
        wanted = {key: fields[key] for key in fields if key in keep}
        keys = list(wanted)
        question = f"Extract {', '.join(keys[:-1])} and {keys[-1]} as JSON: {sentence}"
        reasoning = "\n".join(f"{key}: {value}" for key, value in wanted.items())
        return Draft(question, question, json.dumps(wanted), reasoning)

    def score(self, example: Example, answer_text: str) -> float:
        """Compare the parsed object with the wanted one."""
        try:
            return float(json.loads(answer_text) == json.loads(example.answer))
        except UNREADABLE:
            return 0.0


STRUCTURED: tuple[type[Task], ...] = (ToolCalls, JsonExtraction)
