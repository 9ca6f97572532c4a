"""Rules of the migration: each looks through a source and yields changes, and notes about what a person has to decide.

Facts about V3: deepseek-chat did not think, deepseek-reasoner did; the two ids were retired on 2026-07-24. V4 thinks
unless a request switches it off, wants the reasoning of turns with tools back, and allows 393,216 tokens of output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dsv4.migration.syntax import Group, Item, Syntax
from dsv4.server.hosted_limits import MAX_TOKENS

TARGETS = ("deepseek-flash", "deepseek-v4-flash", "deepseek-v4-pro")
_RETIRED = re.compile(r"(?<![\w./])(?<!\w-)(deepseek/)?(deepseek-(?:chat|reasoner|coder))(?![\w/-]|\.\w)")
_EXPIRED_BASE = re.compile(r"(https://api\.deepseek\.com)/v3\.\d_\w+_expires_on_\d{8}")
_HOSTED = re.compile(r"https://api\.deepseek\.com(?=$|[/\"'`\s])")
_JSON_MODEL = re.compile(r'(?P<quote>\\*")model(?P=quote)\s*:\s*(?P=quote)deepseek-(?:chat|coder)(?P=quote)')
_DROPS_REASONING = re.compile(
    r"\bpop\(\s*[\"']reasoning_content|\bdel\b[^\n]*reasoning_content|\bdelete\b[^\n]*reasoning_content"
)
_NO_EFFECT_THINKING = ("temperature", "top_p")
_NO_EFFECT = ("presence_penalty", "frequency_penalty")
_DISABLED = {
    "call": 'extra_body={"thinking": {"type": "disabled"}}',
    "quoted": '"thinking": {"type": "disabled"}',
    "bare": 'thinking: { type: "disabled" }',
}


@dataclass(frozen=True)
class Finding:
    """A change of text[start:end], or with `new` None a note about it."""

    start: int
    end: int
    rule: str
    reason: str
    new: str | None = None


@dataclass(frozen=True)
class Wishes:
    """The user's choices."""

    model: str = TARGETS[0]
    base_url: str | None = None  # of a server of one's own; None leaves api.deepseek.com


def find(syntax: Syntax, wishes: Wishes) -> list[Finding]:
    """Findings of all rules, by place."""
    found = [finding for rule in _RULES for finding in rule(syntax, wishes)]
    return sorted(dict.fromkeys(found), key=lambda finding: (finding.start, finding.end, finding.rule))


def _retired_ids(syntax: Syntax, wishes: Wishes) -> Iterator[Finding]:
    """Ids of V3's models, wherever they stand outside of comments."""
    for match in _ids(syntax):
        name = match[2]
        if _is_openrouter(match):
            reason = f"{match[0]!r} may be OpenRouter's own id, which still exists; DeepSeek's would be {wishes.model}"
            yield Finding(match.start(), match.end(), "retired-id", reason)
            continue
        mode = "with thinking" if name == "deepseek-reasoner" else "without thinking"
        when = "merged into deepseek-chat in 2024" if name == "deepseek-coder" else "retired on 2026-07-24"
        reason = f"{name} was {when}; it was V3 {mode}, and is refused today"
        yield Finding(match.start(2), match.end(), "retired-id", reason, wishes.model)


def _thinking(syntax: Syntax, wishes: Wishes) -> Iterator[Finding]:
    """Requests and settings for deepseek-chat, which did not think: V4 has to be told."""
    reason = "V4 thinks unless it is switched off; deepseek-chat did not"
    for match in _ids(syntax):
        if match[2] == "deepseek-reasoner" or _is_openrouter(match):
            continue
        unit = syntax.unit_at(match.start())
        if found := _in_json_text(unit.text, match.start() - unit.start):
            place, quote = unit.start + found.end(), found["quote"]
            if f"{quote}thinking{quote}" not in unit.text:
                new = ", " + _DISABLED["quoted"].replace('"', quote)
                yield Finding(place, place, "thinking", reason, new)
            continue
        group, items = _request_around(syntax, match.start())
        if group is None:
            yield Finding(match.start(), match.end(), "thinking", f'{reason}: send "thinking": {{"type": "disabled"}}')
        elif "thinking" in items or "prompt" in items:
            continue  # the request says so itself, or is a plain completion, which never thinks
        elif "extra_body" in items:
            if "thinking" not in items["extra_body"].text:
                note = f'{reason}: add "thinking": {{"type": "disabled"}} to extra_body'
                yield Finding(items["extra_body"].start, items["extra_body"].end, "thinking", note)
        else:
            yield _insertion(syntax, group, items["model"], reason)


def _options(syntax: Syntax, wishes: Wishes) -> Iterator[Finding]:
    """Parameters of requests that mean something else in V4."""
    for group in syntax.groups:
        items = syntax.items(group)
        if "messages" not in items and not ("prompt" in items and "suffix" in items):
            continue
        model = items["model"].text if "model" in items else ""
        thinks = "deepseek-reasoner" in model
        if "deepseek" not in model and "deepseek" not in syntax.text.lower():
            continue
        for name, item in items.items():
            note = _option_note(name, item, thinks)
            if note is not None:
                yield Finding(item.start, item.end, *note)
        if "messages" not in items:
            note = "completion in the middle (FIM) stays under /beta and never thinks"
            yield Finding(items["suffix"].start, items["suffix"].end, "fim", note)


def _option_note(name: str, item: Item, thinks: bool) -> tuple[str, str] | None:
    """Rule and reason for an item of a request."""
    if name in _NO_EFFECT:
        return "no-effect", f"{name} is accepted and ignored by V4: remove it"
    if thinks and name in _NO_EFFECT_THINKING:
        return "no-effect", f"{name} has no effect while V4 thinks, as with deepseek-reasoner: remove it"
    if thinks and name == "tool_choice" and item.text.strip("\"'") not in ("auto", "none"):
        return "tool-choice", "the hosted V4 refuses a forced tool while it thinks (dsv4 serve takes it)"
    digits = item.text.replace("_", "")
    if name in ("max_tokens", "max_completion_tokens") and digits.isdigit():
        if int(digits) > MAX_TOKENS:
            return "max-tokens", f"{name} is {int(digits)}; V4 allows 1 to {MAX_TOKENS}"
        if thinks and int(digits) <= 8192:
            return "max-tokens", f"{name} counts the reasoning too: {int(digits)} may end an answer before it begins"
    return None


def _prefix(syntax: Syntax, wishes: Wishes) -> Iterator[Finding]:
    """Messages with `prefix`, which begin an answer."""
    for group in syntax.groups:
        item = syntax.items(group).get("prefix")
        if item is not None and item.text in ("True", "true"):
            note = "a prefix needs /beta, as in V3; where V4 thinks, the answer goes on without reasoning"
            yield Finding(item.start, item.end, "prefix", note)


def _reasoning_content(syntax: Syntax, wishes: Wishes) -> Iterator[Finding]:
    """Code that drops the reasoning from the history, as V3 demanded."""
    for match in _DROPS_REASONING.finditer(syntax.text):
        if not _in_comment(syntax, match.start()):
            note = (
                "V3 refused reasoning_content in the history, V4 refuses its absence where a turn calls tools: keep it"
            )
            yield Finding(match.start(), match.end(), "reasoning-content", note)


def _base_urls(syntax: Syntax, wishes: Wishes) -> Iterator[Finding]:
    """Base URLs of trial models that are gone, and with a server of one's own all of DeepSeek's."""
    for match in _EXPIRED_BASE.finditer(syntax.text):
        if not _in_comment(syntax, match.start()):
            new = wishes.base_url or match[1]
            reason = "this base URL was for a trial, and is gone"
            reason += "; requests go to your own server" if wishes.base_url is not None else ""
            yield Finding(match.start(), match.end(), "base-url", reason, new)
    for match in _HOSTED.finditer(syntax.text) if wishes.base_url is not None else ():
        if not _in_comment(syntax, match.start()) and not _EXPIRED_BASE.match(syntax.text, match.start()):
            yield Finding(match.start(), match.end(), "base-url", "requests go to your own server", wishes.base_url)


_RULES: tuple[Callable[[Syntax, Wishes], Iterator[Finding]], ...] = (
    _retired_ids,
    _thinking,
    _options,
    _prefix,
    _reasoning_content,
    _base_urls,
)


def _ids(syntax: Syntax) -> Iterator[re.Match[str]]:
    return (match for match in _RETIRED.finditer(syntax.text) if not _in_comment(syntax, match.start()))


def _is_openrouter(match: re.Match[str]) -> bool:
    """True for an id with vendor in a file that names OpenRouter, whose ids look like those of LiteLLM."""
    return match[1] is not None and "openrouter" in match.string.lower()


def _in_comment(syntax: Syntax, position: int) -> bool:
    unit = syntax.unit_at(position)
    return unit.kind == "comment" and position < unit.end


def _in_json_text(text: str, place: int) -> re.Match[str] | None:
    """`"model": "deepseek-chat"` around a place in a string that holds a JSON request, as in curl's -d."""
    matches = (match for match in _JSON_MODEL.finditer(text) if match.start() < place < match.end())
    match = next(matches, None)
    return match if match is not None and f"{match['quote']}messages{match['quote']}" in text else None


def _request_around(syntax: Syntax, position: int) -> tuple[Group | None, dict[str, Item]]:
    """The innermost brackets around a position, if they hold a request whose `model` stands there."""
    for group in syntax.groups:
        if syntax.units[group.opening].start < position < syntax.units[group.closing].start:
            items = syntax.items(group)
            model = items.get("model")
            if model is None or not model.start < position < model.end:
                return None, {}
            return (group, items) if {"messages", "prompt"} & set(items) and len(model.value) == 1 else (None, {})
    return None, {}


def _insertion(syntax: Syntax, group: Group, model: Item, reason: str) -> Finding:
    """The switch for thinking behind the request's model, in the language's form, on its own line as the model is."""
    form = "call" if group.bracket == "(" else "quoted" if syntax.text[model.start] in "\"'" else "bare"
    above, newline, before = syntax.text[: model.start].rpartition("\n")
    own_line = newline and not before.strip()
    gap = ("\r\n" if above.endswith("\r") else "\n") + before if own_line else " "
    if form == "call":
        reason += "; OpenAI's SDK sends it from extra_body"
    elif syntax.language == "python":
        reason += "; for OpenAI's SDK put it into extra_body"
    return Finding(model.end, model.end, "thinking", reason, f",{gap}{_DISABLED[form]}")
