"""Dry run of fine-tuning: tokens and masks in color, and what was refused."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from dsv4.post_training.sft_samples import Refusal, Sample
from dsv4.tokenizer import Tokenizer

TRAINED, CONTEXT, SPECIAL = "black on green", "dim", "bold"


def show_samples(
    items: Iterable[Sample | Refusal], tokenizer: Tokenizer, console: Console, shown: int, refused: int = 20
) -> tuple[int, int]:
    """Print the first `shown` samples and `refused` refusals, then totals; returns (samples, refusals)."""
    console.print(Text.assemble("tokens with loss are ", ("like this", TRAINED), ", those without ", ("so", CONTEXT)))
    samples = refusals = tokens = targets = longest = 0
    for item in items:
        if isinstance(item, Refusal):
            refusals += 1
            if refusals <= refused:
                console.print(f"refused {item.place}: {item.reason}", style="red", highlight=False, markup=False)
            continue
        samples += 1
        size = len(item.encoded.ids)
        tokens, targets, longest = tokens + size, targets + item.encoded.targets, max(longest, size)
        if samples <= shown:
            console.rule(f"{item.place}, messages[{item.turn}]: {size} tokens, {item.encoded.targets} with loss")
            console.print(colored(item, tokenizer))
    if refusals > refused:
        console.print(f"... and {refusals - refused} more refused", style="red", highlight=False)
    console.rule()
    console.print(
        f"{samples:,} samples, {tokens:,} tokens, {targets:,} with loss, longest {longest:,}; {refusals:,} refused",
        highlight=False,
    )
    return samples, refusals


def colored(sample: Sample, tokenizer: Tokenizer) -> Text:
    """A sample's text, token by token; a character of several tokens has the color of its last."""
    text, stream = Text(), tokenizer.decode_stream()
    mask = sample.encoded.mask
    for place, token in enumerate(sample.encoded.ids.tolist()):
        trained = mask is None or bool(mask[place])
        text.append(stream.push(token), TRAINED if trained else CONTEXT)
    return text
