"""Everything that the nano model reads, made from a corpus: tokenizer, word list, questions, haystacks; then shards."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from dsv4.checkpoint.atomic import new_file
from dsv4.data.nano.definitions import training_questions
from dsv4.data.nano.entries import Entry, count_words, read_entries, texts
from dsv4.data.nano.needles import ROOM, conversation, fill, repeat, split_lines
from dsv4.data.nano.tokenizer import train_nano_tokenizer
from dsv4.data.records import find_sources
from dsv4.data.stable_hash import stable_hash
from dsv4.data.tokenizing import ShardWriter
from dsv4.tokenizer import Tokenizer

SAMPLED_BYTES = 24_000_000  # of text, that the tokenizer is trained on
LEAST_COUNT = 5  # of a word in the word list
NEEDLE_WORDS = 400
# Longest haystack in tokens -> (conversations, facts and questions in each).
HAYSTACKS = {512: (6000, 6), 2048: (1600, 10), 4096: (1100, 14), 32768: (300, 32)}
# Most tokens of a document -> documents in which much can be looked up: haystacks full of facts, and repeated passages.
RECALLS = {512: 11_500, 2048: 1600, 4096: 900, 32768: 160}
FACTS_SHARE = 0.8  # of the tokens of a haystack full of facts: the facts, the questions and the answers
MOST_FACTS = 200
PASSAGE = 160  # characters of a passage
FILLERS = ("prose", "manuals", "programming")
FILLER_TEXTS = 12
QUESTIONS = "questions"
DEFINITIONS = "definitions"

Say = Callable[[str], object]


def haystack_part(tokens: int) -> str:
    """Name of the part with haystacks of at most `tokens` tokens."""
    return f"needles-{tokens}"


def recall_part(tokens: int) -> str:
    """Name of the part with documents of at most `tokens` tokens in which much can be looked up."""
    return f"recall-{tokens}"


class NanoData:
    """Files below `folder`, each made once: a killed call goes on with those that are missing.

    tokenizer/, words.txt, entries.jsonl, questions/PART.jsonl, shards/PART: a part for each group of the corpus, its
    held-out packages (`validation`), the definitions, each length of haystacks and of documents full of facts.
    """

    def __init__(self, corpus: Path, folder: Path, seed: int = 1, scale: float = 1.0) -> None:
        """`scale`: share of the haystacks, and of the tokenizer's sample, that are made."""
        if not (corpus / "train").is_dir():
            raise ValueError(f"{corpus} is no corpus: it has no folder train; dsv4 train corpus --out makes one")
        self.corpus, self.folder, self._seed, self._scale = corpus, folder, seed, scale

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    def make(self, say: Say = lambda text: None, only: Collection[str] | None = None) -> None:
        """Make all that is missing. `only`: of the shards those of these parts, and the questions in them."""
        wanted = self.parts().keys() if only is None else only
        self.folder.mkdir(parents=True, exist_ok=True)
        entries = self._entries(say)
        if not self.tokenizer.is_dir():
            say("tokenizer")
            unfinished = self.folder / "tokenizer.tmp"
            shutil.rmtree(unfinished, ignore_errors=True)
            train_nano_tokenizer(unfinished, self._sample(entries))
            unfinished.rename(self.tokenizer)
        self._write_questions(DEFINITIONS, lambda: training_questions(entries, self._seed))
        words = needle_words(entries)
        for tokens, (number, questions) in HAYSTACKS.items():
            if haystack_part(tokens) not in wanted:
                continue
            count = max(2, round(number * self._scale))
            self._write_questions(
                haystack_part(tokens),
                lambda tokens=tokens, count=count, questions=questions: self._haystacks(
                    tokens, count, questions, words
                ),
            )
        for tokens, number in RECALLS.items():
            if recall_part(tokens) not in wanted:
                continue
            count = max(2, round(number * self._scale))
            self._write_questions(
                recall_part(tokens), lambda tokens=tokens, count=count: self._recalls(tokens, count, words)
            )
        for part, paths in self.parts().items():
            folder = self.shards(part)
            if part in wanted and not (folder / "index.json").exists():
                index = ShardWriter(find_sources(list(map(str, paths))), self.tokenizer, folder).run()
                say(f"{part}: {index.counts.documents:,} documents, {index.counts.tokens:,} tokens")

    def shards(self, part: str) -> Path:
        """Folder of a part's shards."""
        return self.folder / "shards" / part

    def parts(self) -> dict[str, list[Path]]:
        """Sources of every part."""
        train = self.corpus / "train"
        found = {group.name: [group] for group in sorted(train.iterdir()) if any(group.glob("*.jsonl"))}
        if any((self.corpus / "validation").glob("*/*.jsonl")):
            found["validation"] = [self.corpus / "validation"]
        questions = [DEFINITIONS, *map(haystack_part, HAYSTACKS), *map(recall_part, RECALLS)]
        return found | {part: [self._questions_path(part)] for part in questions}

    def _entries(self, say: Say) -> list[Entry]:
        """Entries of the corpus; written with the word list on the first call."""
        path = self.folder / "entries.jsonl"
        if not path.exists():
            say("definitions and word list")
            counts = count_words(self.corpus)
            known = sorted(word for word, count in counts.items() if count >= LEAST_COUNT)
            _write(self.folder / "words.txt", (f"{word}\n" for word in known))
            entries = read_entries(self.corpus, counts)
            _write(path, (json.dumps(vars(entry)) + "\n" for entry in entries))
        return load_entries(self.folder)

    def _sample(self, entries: list[Entry]) -> Iterator[str]:
        """Texts of every file of the corpus at even distances, and the definitions."""
        paths = sorted((self.corpus / "train").glob("*/*.jsonl"))
        whole = sum(path.stat().st_size for path in paths)
        share = min(1.0, SAMPLED_BYTES * self._scale / whole)
        for path in paths:
            for number, text in enumerate(texts(path)):
                if stable_hash("tokenizer", path.name, number) % 10_000 < share * 10_000:
                    yield text
        for entry in entries:
            yield f"What is {entry.term}? {entry.answer}"

    def _haystacks(self, tokens: int, count: int, questions: int, words: list[str]) -> Iterator[dict[str, Any]]:
        """Conversations of `tokens` / 2 to `tokens` tokens."""
        tokenizer = Tokenizer.from_pretrained(self.tokenizer)
        random = Random(stable_hash("haystacks", self._seed, tokens))
        lines = self._lines(tokens)
        for _ in range(count):
            room = random.randint(tokens // 2, tokens) - 40 * questions
            kept = fill(lines, max(room, 100), lambda line: len(tokenizer.encode(line)))
            yield conversation(random, kept, words, questions)

    def _recalls(self, tokens: int, count: int, words: list[str]) -> Iterator[dict[str, Any]]:
        """Documents of `tokens` / 2 to `tokens` tokens: by turns a haystack full of facts, and passages that repeat."""
        tokenizer = Tokenizer.from_pretrained(self.tokenizer)
        random = Random(stable_hash("recalls", self._seed, tokens))
        lines, cost = self._lines(tokens, PASSAGE), fact_tokens(tokenizer, words)
        for number in range(count):
            room = random.randint(tokens // 2, tokens)
            facts = min(int(FACTS_SHARE * room / cost), MOST_FACTS, len(words) // 2)
            room = int(room - cost * facts) if number % 2 == 0 else room // 2 + ROOM
            kept = fill(lines, max(room, 100), lambda line: len(tokenizer.encode(line)))
            yield conversation(random, kept, words, facts) if number % 2 == 0 else {"text": repeat(random, kept)}

    def _lines(self, tokens: int, most: int = 400) -> Iterator[str]:
        """Lines of the corpus to hide facts in, of at most `most` characters, over and over.

        Of one text in FILLER_TEXTS, others for every length.
        """
        paths = [path for group in FILLERS for path in sorted((self.corpus / "train" / group).glob("*.jsonl"))]
        one_in = FILLER_TEXTS
        while True:
            found = False
            for path in paths:
                for number, text in enumerate(texts(path)):
                    if stable_hash(tokens, path.name, number) % one_in == 0:
                        found = True
                        yield from split_lines(iter([text]), most)
            if not found and one_in == 1:
                raise ValueError(f"{self.corpus} has no texts of {', '.join(FILLERS)} to hide facts in")
            if not found:  # a small corpus
                one_in = 1

    def _questions_path(self, part: str) -> Path:
        return self.folder / QUESTIONS / f"{part}.jsonl"

    def _write_questions(self, part: str, make: Callable[[], Iterable[dict[str, Any]]]) -> None:
        path = self._questions_path(part)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, (json.dumps(record) + "\n" for record in make()))


def load_entries(folder: Path) -> list[Entry]:
    """Entries that NanoData wrote in `folder`."""
    lines = (folder / "entries.jsonl").read_text(encoding="utf-8").splitlines()
    return [Entry(**json.loads(line)) for line in lines]


def load_words(folder: Path) -> frozenset[str]:
    """Word list that NanoData wrote in `folder`."""
    return frozenset((folder / "words.txt").read_text(encoding="utf-8").split())


def needle_words(entries: list[Entry]) -> list[str]:
    """Words to hide: the most frequent nouns of 4 to 7 letters."""
    return [entry.term for entry in entries if entry.kind == "noun" and 4 <= len(entry.term) <= 7][:NEEDLE_WORDS]


def fact_tokens(tokenizer: Tokenizer, words: list[str]) -> float:
    """Tokens of a fact with its question and its answer in a conversation, in the mean."""
    count = len(words) // 2
    messages = conversation(Random(0), [], words, count)["messages"]
    ends = 2  # the role's token, the end of a turn
    return sum(len(tokenizer.encode(message["content"])) + ends for message in messages) / count


def count_parts(folder: Path) -> Counter[str]:
    """Tokens of each part's shards in `folder`."""
    indexes = sorted((folder / "shards").glob("*/index.json"))
    return Counter({path.parent.name: json.loads(path.read_text())["counts"]["tokens"] for path in indexes})


def _write(path: Path, lines: Iterable[str]) -> None:
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
