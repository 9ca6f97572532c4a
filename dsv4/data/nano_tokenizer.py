"""The corpus of the nano tokenizer, and its training into a model folder."""

from collections.abc import Iterator
from pathlib import Path

from deepseek_recipe import Conversation, DeepseekV4Encoding

from dsv4.data.tasks import TASKS
from dsv4.tokenizer.prompts import write_effort_ladder
from dsv4.tokenizer.special import SPECIAL_TOKENS
from dsv4.tokenizer.train import NANO_VOCAB_SIZE, train_tokenizer, write_tokenizer

EXAMPLES_PER_TASK = 1500
EFFORT_COPIES = 40  # the effort instructions are rare in the examples but long; these copies earn them merges
# Letter tasks need the spelling of every token that a word may be made of. Their own words are left out of the corpus
# and the merges end early, so that a word falls into few, common pieces. Of new words
# 14 % held a piece that 16,000 training words hold fewer than 10 times with 2,560 trained ids, 5 % with 1,200.
TRAINED_SIZE = 1200
WITHOUT = {"letter_counting", "spell_backward"}


def nano_corpus() -> Iterator[str]:
    """Yield plain texts: rendered training examples with worked steps, effort instructions."""
    encoding = DeepseekV4Encoding()
    for task in TASKS.values():
        if task.name in WITHOUT:
            continue
        count = EXAMPLES_PER_TASK // 3 if task.name == "tool_call" else EXAMPLES_PER_TASK
        for seed in range(count):
            example = task.sample(seed, "train")
            prompt = encoding.render_conversation(example.prompt())
            yield from _plain_parts(prompt.prompt, prompt.special_ranges)
            yield example.answer
            yield example.reasoning
    for effort in ("high", "max"):
        prompt = encoding.render_conversation(Conversation(thinking_mode=True, reasoning_effort=effort))
        for _ in range(EFFORT_COPIES):
            yield from _plain_parts(prompt.prompt, prompt.special_ranges)
    for name in sorted(WITHOUT):  # one question each, so that the words around the asked word have merges
        yield from [TASKS[name].sample(0, "train").question] * EXAMPLES_PER_TASK


def _plain_parts(prompt: str, ranges: list[tuple[int, int]]) -> Iterator[str]:
    end = 0
    for start, stop in [*ranges, (len(prompt), len(prompt))]:
        if start > end:
            yield prompt[end:start]
        end = stop


def train_nano_tokenizer(folder: Path) -> None:
    """Train the nano tokenizer and write tokenizer.json, tokenizer_config.json and generation_config.json to `folder`.

    The nano folder speaks the preview ladder: only effort "max" adds an instruction, so ordinary prompts stay short.
    """
    tokenizer = train_tokenizer(nano_corpus(), NANO_VOCAB_SIZE, TRAINED_SIZE)
    assert all(tokenizer.token_to_id(text) == n for n, text in enumerate(SPECIAL_TOKENS))
    write_tokenizer(tokenizer, folder)
    write_effort_ladder(folder, "preview")
