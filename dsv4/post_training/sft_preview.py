"""Dry run of fine-tuning: tokens and masks, in color or with marks, and what was refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console
from rich.text import Text

from dsv4.post_training.sft_samples import Refusal, Sample
from dsv4.tokenizer import Tokenizer

# Styles that alternate from token to token, and that of special tokens beside them.
TRAINED, CONTEXT = ("black on green", "black on bright_green"), ("bright_black", "bright_black underline")
SPECIAL = "bold"
# Without color: ends of tokens with loss, and what is between two tokens.
BEGIN, END, BORDER = "⟦", "⟧", "┊"


@dataclass(frozen=True)
class Token:
    """A token as it is shown: a character of several tokens is the last one's, those before show their bytes."""

    id: int
    text: str
    trained: bool
    special: bool


def show_samples(
    items: Iterable[Sample | Refusal],
    tokenizer: Tokenizer,
    console: Console,
    shown: int,
    refused: int | None = 20,
    ids: bool = False,
) -> tuple[int, int]:
    """Print the first `shown` samples and `refused` refusals (None: all), then totals; returns (samples, refusals).

    ids: a line for each token, with its id.
    """
    plain = console.color_system is None or console.no_color
    if shown:
        console.print(_legend(plain, ids), soft_wrap=True)
    samples = refusals = tokens = targets = longest = 0
    for item in items:
        if isinstance(item, Refusal):
            refusals += 1
            if refused is None or refusals <= refused:
                _say(console, f"refused {item.place}: {item.reason}", "red")
            continue
        samples += 1
        size = len(item.encoded.ids)
        tokens, targets, longest = tokens + size, targets + item.encoded.targets, max(longest, size)
        if samples <= shown:
            console.rule()
            _say(
                console, f"{item.place}, messages[{item.turn}]: {size} tokens, {item.encoded.targets} with loss", "bold"
            )
            view = listed if ids else marked if plain else colored
            console.print(view(item, tokenizer), soft_wrap=True)
    if refused is not None and refusals > refused:
        _say(console, f"... and {refusals - refused} more refused; --dry-run 0 lists all", "red")
    console.rule()
    _say(
        console,
        f"{samples:,} samples, {tokens:,} tokens, {targets:,} with loss, longest {longest:,}; {refusals:,} refused",
    )
    return samples, refusals


def shown_tokens(sample: Sample, tokenizer: Tokenizer) -> Iterator[Token]:
    """A sample's tokens in order; the ends of lines are visible."""
    stream, special = tokenizer.decode_stream(), set(tokenizer.special_tokens.values())
    mask = sample.encoded.mask
    for place, token in enumerate(sample.encoded.ids.tolist()):
        text = stream.push(token) or "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(token))
        trained = mask is None or bool(mask[place])
        yield Token(token, text, trained, token in special)


def colored(sample: Sample, tokenizer: Tokenizer) -> Text:
    """A sample's text; the shade changes from token to token."""
    text = Text()
    for place, token in enumerate(shown_tokens(sample, tokenizer)):
        style = (TRAINED if token.trained else CONTEXT)[place % 2]
        text.append(_visible(token.text), f"{style} {SPECIAL}" if token.special else style)
    return text


def marked(sample: Sample, tokenizer: Tokenizer) -> Text:
    """A sample's text with marks in place of color."""
    parts: list[str] = []
    for trained, run in groupby(shown_tokens(sample, tokenizer), lambda token: token.trained):
        part = BORDER.join(_visible(token.text) for token in run)
        parts.append(f"{BEGIN}{part}{END}" if trained else part)
    return Text("".join(parts))


def listed(sample: Sample, tokenizer: Tokenizer) -> Text:
    """A line for each of a sample's tokens: id, + for loss, text as JSON."""
    text = Text()
    for token in shown_tokens(sample, tokenizer):
        line = f"{token.id:>7} {'+' if token.trained else ' '} {json.dumps(token.text, ensure_ascii=False)}\n"
        text.append(line, SPECIAL if token.special else "")
    text.right_crop()
    return text


def _visible(text: str) -> str:
    return text.replace("\n", "↵\n")


def _legend(plain: bool, ids: bool) -> Text:
    if ids:
        return Text("a line for each token: id, + if it has loss, text")
    if plain:
        return Text(f"tokens with loss are between {BEGIN} and {END}; {BORDER} is between two tokens")
    like = (("like", TRAINED[0]), (" this", TRAINED[1]))
    return Text.assemble("tokens with loss are ", *like, ", those without ", ("so", CONTEXT[0]), (" too", CONTEXT[1]))


def _say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is, however long."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
