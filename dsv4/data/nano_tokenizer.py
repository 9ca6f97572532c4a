"""Corpus and training of the nano tokenizer."""

from collections.abc import Iterator
from pathlib import Path

from deepseek_recipe import Conversation, DeepseekV4Encoding

from dsv4.data.tasks import TASKS
from dsv4.tokenizer.prompts import write_effort_ladder
from dsv4.tokenizer.special import SPECIAL_TOKENS
from dsv4.tokenizer.train import NANO_VOCAB_SIZE, train_tokenizer, write_tokenizer

EXAMPLES_PER_TASK = 1500
EFFORT_COPIES = 40  # copies of the effort instructions, long but rare in the examples, so that they get merges
# Letter tasks need the spelling of every token that a word may consist of. So their words are left out of the corpus
# and merging stops early: words then split into common pieces. Share of new words with a piece that occurs fewer than
# 10 times in 16,000 training words: 14 % with 2,560 trained ids, 5 % with 1,200.
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
    for name in sorted(WITHOUT):  # one question of each, so that its fixed words have merges
        yield from [TASKS[name].sample(0, "train").question] * EXAMPLES_PER_TASK


def _plain_parts(prompt: str, ranges: list[tuple[int, int]]) -> Iterator[str]:
    end = 0
    for start, stop in [*ranges, (len(prompt), len(prompt))]:
        if start > end:
            yield prompt[end:start]
        end = stop


def train_nano_tokenizer(folder: Path) -> None:
    """Train the nano tokenizer and write tokenizer.json, tokenizer_config.json and generation_config.json to `folder`.

    The folder uses the "preview" effort ladder: only effort "max" adds an instruction, so ordinary prompts stay short.
    """
    tokenizer = train_tokenizer(nano_corpus(), NANO_VOCAB_SIZE, TRAINED_SIZE)
    assert all(tokenizer.token_to_id(text) == n for n, text in enumerate(SPECIAL_TOKENS))
    write_tokenizer(tokenizer, folder)
    write_effort_ladder(folder, "preview")
