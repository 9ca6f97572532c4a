"""Batches of shards: every document once per epoch, shares of tokens, the same for any process that asks."""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from multiprocessing import active_children
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from dsv4.data.augment import Rates
from dsv4.data.order import MixtureOrder, PartOrder
from dsv4.data.packing import Document, TokenBatch
from dsv4.data.prefetch import Prefetch
from dsv4.data.records import find_sources
from dsv4.data.shard_loader import MixtureLoader, Part, RowShape
from dsv4.data.shards import ShardError, ShardFolder
from dsv4.data.tokenizing import ShardWriter
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.special import BOS, EOS, FIM
from dsv4.training.gradient import Work
from dsv4.training.losses import LossWeights
from dsv4.training.sources import MixtureSource, PartPaths
from dsv4.training.step_batches import Place, Reader

from .test_records import CHAT

SHAPE = RowShape(tokens=256, document_tokens=128, group_rows=8, alignment=16)
WORDS = ("one", "two", "sum", "of", "the", "numbers", "is", "word", "letter", "count", "bits", "list")


def shards(tmp_path: Path, tokenizer_folder: Path, name: str, documents: int, words: int) -> Path:
    """Shards of random texts with `words` words on average."""
    folder, random = tmp_path / name, Random(name)
    folder.mkdir()
    texts = [" ".join(random.choices(WORDS, k=random.randrange(2, 2 * words))) + ".\n" for _ in range(documents)]
    lines = [json.dumps({"text": f"{name} {n}: {text}"}) for n, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    ShardWriter(find_sources([str(folder)]), tokenizer_folder, folder / "shards", 2000).run()
    return folder / "shards"


@pytest.fixture
def paths(tmp_path: Path, tokenizer_folder: Path) -> tuple[Path, Path]:
    return (
        shards(tmp_path, tokenizer_folder, "short", 300, 8),
        shards(tmp_path, tokenizer_folder, "long", 40, 150),
    )


def source(tokenizer_folder: Path, paths: tuple[Path, ...], workers: int = 0, **changes: object) -> MixtureSource:
    parts = tuple(PartPaths(path.parent.name, (path,), weight) for path, weight in zip(paths, (3.0, 1.0), strict=False))
    return MixtureSource(tokenizer_folder, parts, 7, SHAPE, workers=workers, **changes)  # pyright: ignore[reportArgumentType]


def test_every_piece_comes_once_per_epoch_in_another_order(paths: tuple[Path, Path]) -> None:
    folder = ShardFolder(paths[1])
    order = PartOrder(0, "long", [folder, folder], 128, 128, seed=1)
    assert order.tokens == 2 * folder.lengths.sum()
    epochs = [[order.piece(n) for n in range(e * order.pieces, (e + 1) * order.pieces)] for e in range(2)]
    keys = [[(p.folder, p.document, p.start, p.stop) for p in epoch] for epoch in epochs]
    assert sorted(keys[0]) == sorted(keys[1]) and keys[0] != keys[1] and len(set(keys[0])) == order.pieces
    tokens = Counter((p.folder, p.document) for p in epochs[0] for _ in range(len(p)))
    assert tokens == {(f, d): int(n) for f in (0, 1) for d, n in enumerate(folder.lengths)}
    assert len({p.draw for epoch in epochs for p in epoch}) == 2 * order.pieces
    done = 0
    for count in range(2 * order.pieces):
        assert order.tokens_before(count) == done and order.count_before(done) == count
        done += len(order.piece(count))
        assert order.count_before(done - 1) == count + (len(order.piece(count)) > 1)


def test_groups_follow_each_other_and_parts_have_their_shares(paths: tuple[Path, Path]) -> None:
    parts = [PartOrder(n, str(n), [ShardFolder(path)], 128, 128, 1) for n, path in enumerate(paths)]
    order = MixtureOrder(parts, [3.0, 1.0], 1000)
    counts, tokens = [0, 0], [0, 0]
    for group in range(60):
        for piece in order.group(group):
            assert piece == parts[piece.part].piece(counts[piece.part])  # none is left out, none comes twice
            counts[piece.part] += 1
            tokens[piece.part] += len(piece)
        assert (group + 1) * 1000 <= sum(tokens) < (group + 1) * 1000 + 128
        assert abs(tokens[0] - 0.75 * sum(tokens)) < 2 * 128
    assert counts[0] > 2 * parts[0].pieces  # over several epochs
    assert list(MixtureOrder(parts, [3.0, 1.0], 1000).group(41)) == list(order.group(41))
    with pytest.raises(ValueError, match="more than 0"):
        MixtureOrder(parts, [1.0, 0.0], 10)
    with pytest.raises(ValueError, match="groups of an epoch of 2 parts"):
        MixtureOrder(parts, [3.0, 1.0], 1000, 2)
    assert order.lengths(41) == [len(piece) for piece in order.group(41)]


def test_rows_are_full_and_keep_documents_whole(
    paths: tuple[Path, Path], tokenizer_folder: Path, tokenizer: Tokenizer
) -> None:
    loader = source(tokenizer_folder, paths)
    batches = [loader.batch(n) for n in range(8 * SHAPE.group_rows)]
    assert all(0 < batch.tokens <= 256 for batch in batches)
    assert sum(batch.tokens for batch in batches) > 0.9 * 256 * len(batches)
    short = [tokenizer.decode(ids) for batch in batches for ids in batch.documents]
    short = [text for text in short if text.startswith(f"{BOS}short")]
    assert sum(text.endswith(EOS) for text in short) > 0.98 * len(short)
    assert len(set(short)) < len(short)  # a second epoch began
    lengths = [len(ids) for batch in batches for ids in batch.documents]
    assert max(lengths) == 128 and all(all(mask) for batch in batches for mask in batch.loss_masks)


def test_any_batch_is_a_function_of_its_number(paths: tuple[Path, Path], tokenizer_folder: Path) -> None:
    straight = source(tokenizer_folder, paths, rates=Rates(0.3, 0.3))
    batches = [straight.batch(n) for n in range(40)]
    for start in (0, 7, 8, 23):
        resumed = source(tokenizer_folder, paths, rates=Rates(0.3, 0.3))
        assert [resumed.batch(n) for n in range(start, 40)] == batches[start:]
    copy = pickle.loads(pickle.dumps(straight))
    assert copy.batch(13) == batches[13] and len(pickle.dumps(straight)) < 5000
    other = source(tokenizer_folder, paths)
    assert other.batch(0) != batches[0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_same_sequence(paths: tuple[Path, Path], tokenizer_folder: Path, ranks: int) -> None:
    """A step's 4 batches are dealt to the ranks in order, as training/step_batches.py:Place does."""
    expected = source(tokenizer_folder, paths)
    readers = [source(tokenizer_folder, paths) for _ in range(ranks)]
    for step in range(5):
        dealt: list[TokenBatch] = []
        for rank, reader in enumerate(readers):
            dealt += map(reader.batch, Place(rank, ranks, 4 // ranks).numbers(step))
        assert dealt == [expected.batch(number) for number in range(4 * step, 4 * step + 4)]


def test_worker_processes_make_the_same_batches(paths: tuple[Path, Path], tokenizer_folder: Path) -> None:
    alone = source(tokenizer_folder, paths, rates=Rates(0.3, 0.0))
    ahead = source(tokenizer_folder, paths, workers=2, rates=Rates(0.3, 0.0))
    numbers = range(5, 30)
    assert [ahead.batch(n) for n in numbers] == [alone.batch(n) for n in numbers]


def test_a_stage_that_has_ended_keeps_no_processes(paths: tuple[Path, Path], tokenizer_folder: Path) -> None:
    """And gives the same batches if the run goes back to it."""
    stages = [source(tokenizer_folder, paths, workers=1) for _ in range(2)]
    reader = Reader(Place(0, 1, 1), stages, torch.device("cpu"))
    works = [Work(stage, 1, LossWeights(), quantized=False) for stage in (0, 1, 0)]
    before = set(active_children())
    ids, running = [], []
    for work in works:
        ids.append(reader.read(work)[0].batch.token_ids.tolist())
        running.append(len(set(active_children()) - before))
    assert running[:2] == [1, 1] and ids[0] == ids[2]


def test_a_failing_worker_is_an_error_here() -> None:
    ahead = Prefetch(Failing(), 1)
    with pytest.raises(ValueError, match="group 3"):
        ahead.group(3)
    assert ahead.group(4) == 4  # from the start again
    with pytest.raises(ValueError, match="-1 workers"):
        Prefetch(Failing(), -1)


def test_groups_at_equal_distances_are_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a rank asks for them whose steps are longer than a group: its processes are not started for each."""
    starts: list[tuple[int, int]] = []
    monkeypatch.setattr(Prefetch, "_start", lambda self, n, by: starts.append((n, by)) or iter(range(n, 99, by)))
    ahead = Prefetch(Failing(), 2)
    assert [ahead.group(number) for number in (0, 1, 3, 5, 5, 7, 2, 3)] == [0, 1, 3, 5, 5, 7, 2, 3]
    assert starts == [(0, 1), (3, 2), (2, 1)]


def test_a_worker_is_not_in_the_group_that_signals_go_to() -> None:
    assert Prefetch(Grouped(), 1).group(0) != Grouped().group(0)


class Grouped:
    def group(self, number: int) -> int:
        """The process group."""
        return os.getpgrp()


class Failing:
    def group(self, number: int) -> object:
        if number == 3:
            raise ValueError(f"group {number}")
        return number


def test_conversations_keep_their_masks_or_have_whole_loss(
    tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps(CHAT) + "\n" + json.dumps({"text": "a plain text"}))
    ShardWriter(find_sources([str(tmp_path / "c.jsonl")]), tokenizer_folder, tmp_path / "out").run()
    for loss in ("mask", "all"):
        parts = (PartPaths("chats", (tmp_path / "out",), loss=loss),)
        chats = MixtureSource(tokenizer_folder, parts, 1, SHAPE, Rates(1.0, 0.0))
        batches = [chats.batch(n) for n in range(SHAPE.group_rows)]
        pairs = [pair for b in batches for pair in zip(b.documents, b.loss_masks, strict=True)]
        for ids, mask in pairs:
            text, learned = tokenizer.decode(ids), tokenizer.decode([t for t, m in zip(ids, mask, strict=True) if m])
            if FIM[1] not in text and text.startswith(BOS) and text.endswith(EOS) and "plain" not in text:
                assert learned == (f"2{EOS}4{EOS}" if loss == "mask" else text)
            if FIM[1] in text:
                assert "Be brief" not in text and all(mask)
        assert any(FIM[1] in tokenizer.decode(ids) for ids, _ in pairs)


def test_long_documents_are_cut_at_compression_windows(
    paths: tuple[Path, Path], tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    shape = RowShape(tokens=512, document_tokens=100, group_rows=4, alignment=16)
    loader = MixtureLoader([Part("long", 1.0, (ShardFolder(paths[1]),))], tokenizer, 1, shape)
    pieces = [ids for group in range(5) for row in loader.group(group) for ids, _ in row]
    eos = tokenizer.special_id(EOS)
    uncut = [len(ids) for ids in pieces if ids[-1] != eos]
    assert uncut and all(length % 16 == 0 for length in uncut) and max(map(len, pieces)) <= 100


def written(tmp_path: Path, tokenizer_folder: Path, texts: list[str]) -> Path:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ShardWriter(find_sources([str(tmp_path / "a.jsonl")]), tokenizer_folder, tmp_path / "shards").run()
    return tmp_path / "shards"


def alone(path: Path, tokenizer: Tokenizer, shape: RowShape, **more: object) -> MixtureLoader:
    return MixtureLoader([Part("a", 1.0, (ShardFolder(path),))], tokenizer, 3, shape, **more)  # pyright: ignore[reportArgumentType]


def read_rows(loader: MixtureLoader, rows: range) -> list[list[bytes]]:
    """Documents of the rows."""
    groups = {number: loader.group(number) for number, _ in map(loader.locate, rows)}
    return [[ids.tobytes() for ids, _ in groups[number][place]] for number, place in map(loader.locate, rows)]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("documents", "words"), [(5, 8), (200, 8), (40, 60), (700, 8)])
def test_each_document_comes_once_in_every_epoch(
    tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer, whole: bool, documents: int, words: int
) -> None:
    """Also where an epoch is less than a group, or a row."""
    path = shards(tmp_path, tokenizer_folder, "texts", documents, words)
    shape = RowShape(tokens=512, document_tokens=256, group_rows=8, alignment=16, whole=whole)
    loader = alone(path, tokenizer, shape)
    tokens = int(ShardFolder(path).lengths.sum())
    ends = [loader.epoch_rows(epochs) for epochs in range(4)]
    assert ends[0] == 0 and tokens <= 512 * ends[1] < 1.2 * tokens + 2 * 512
    known = Counter(ids.tobytes() for ids, _ in map(ShardFolder(path).document, range(documents)))
    epochs = [read_rows(loader, range(start, stop)) for start, stop in pairwise(ends)]
    for rows in epochs:
        found = Counter(document for row in rows for document in row)
        assert all(row for row in rows) and all(sum(map(len, row)) <= 2 * 512 for row in rows)
        if whole:
            assert found == known
        else:
            assert sum(map(len, found.elements())) == 2 * tokens and len(known - found) <= 0.02 * documents
    assert epochs[0] != epochs[1] or documents == 5


def test_groups_of_a_mixture_are_within_an_epoch_of_each_part(paths: tuple[Path, Path], tokenizer: Tokenizer) -> None:
    """And the weights hold: a small part comes often, but not many times at once."""
    shape = RowShape(tokens=256, document_tokens=128, group_rows=200, alignment=16)
    parts = [
        Part(str(n), weight, (ShardFolder(path),))
        for n, (path, weight) in enumerate(zip(paths, (3.0, 1.0), strict=True))
    ]
    loader = MixtureLoader(parts, tokenizer, 1, shape)
    tokens = [int(ShardFolder(path).lengths.sum()) for path in paths]
    assert 8 <= loader.group_rows <= tokens[0] / 0.75 / 256 < 200
    known = {ids.tobytes() for n in range(300) for ids, _ in [ShardFolder(paths[0]).document(n)]}
    seen = [
        Counter(read for row in loader.group(number) for ids, _ in row for read in [ids.tobytes()])
        for number in range(12)
    ]
    short = [Counter({read: n for read, n in group.items() if read in known}) for group in seen]
    assert max(n for group in short for n in group.values()) <= 2  # a group may begin in one epoch and end in the next
    total = sum(len(read) * n for group in seen for read, n in group.items())
    assert 0.7 < sum(len(read) * n for group in short for read, n in group.items()) / total < 0.8


def test_copies_of_a_document_are_in_different_rows(
    tmp_path: Path, paths: tuple[Path, Path], tokenizer_folder: Path, tokenizer: Tokenizer
) -> None:
    """Five documents with half of the tokens are many times in a group."""
    few = shards(tmp_path, tokenizer_folder, "few", 5, 20)
    parts = [Part("few", 1.0, (ShardFolder(few),)), Part("short", 1.0, (ShardFolder(paths[0]),))]
    loader = MixtureLoader(parts, tokenizer, 1, SHAPE)
    assert loader.group_rows == 4
    for number in range(6):
        rows = [[ids.tobytes() for ids, _ in row] for row in loader.group(number)]
        copies = Counter(document for row in rows for document in row)
        for row in rows:
            assert all(n == 1 or copies[document] > len(rows) for document, n in Counter(row).items())


def conversations(tmp_path: Path, tokenizer_folder: Path, lengths: list[int]) -> Path:
    """Shards of texts with so many tokens."""
    word = Tokenizer.from_pretrained(tokenizer_folder).encode(" the")
    assert len(word) == 1
    return written(tmp_path, tokenizer_folder, [" the" * (length - 2) for length in lengths])


@pytest.mark.parametrize(("longest", "tokens"), [(1000, 1000), (650, 1024), (1000, 2048)])
def test_whole_documents_are_never_cut(
    tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer, longest: int, tokens: int
) -> None:
    """Samples of up to the limit to the token, and those of which no two fit into a row."""
    random = Random(4)
    lengths = [longest, *(random.randint(longest // 2 + 40, longest) for _ in range(60))]
    path = conversations(tmp_path, tokenizer_folder, lengths)
    loader = alone(path, tokenizer, RowShape(tokens, longest, 16, 128, whole=True))
    for epochs in (1, 2):
        rows = read_rows(loader, range(loader.epoch_rows(epochs)))
        assert sorted(len(document) // 2 for row in rows for document in row) == sorted(lengths * epochs)
    cut = alone(path, tokenizer, RowShape(tokens, longest, 16, 128))
    assert len([1 for row in read_rows(cut, range(cut.epoch_rows(1))) for _ in row]) > len(lengths)


def test_longer_documents_are_cut_beside_whole_ones(
    tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer
) -> None:
    path = conversations(tmp_path, tokenizer_folder, [100, 90, 250])
    loader = alone(path, tokenizer, RowShape(128, 100, 4, 16, whole=True))
    found = [len(document) // 2 for row in read_rows(loader, range(loader.epoch_rows(1))) for document in row]
    assert sorted(found) == [58, 90, 96, 96, 100]


def test_rows_of_whole_documents_are_a_function_of_their_number(
    paths: tuple[Path, Path], tokenizer_folder: Path
) -> None:
    def make(workers: int = 0) -> MixtureSource:
        parts = (PartPaths("long", (paths[1],)),)
        return MixtureSource(tokenizer_folder, parts, 7, RowShape(256, 128, 8, 16, whole=True), workers=workers)

    straight = make()
    batches = [straight.batch(n) for n in range(120)]
    assert straight.open().epoch_rows(1) < 60
    assert [make().batch(n) for n in (0, 1, 57, 119)] == [batches[n] for n in (0, 1, 57, 119)]
    ahead = make(workers=1)
    assert [ahead.batch(n) for n in range(50, 80)] == batches[50:80]


def test_small_groups_are_made_without_processes(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Ranks whose steps have several of them ask for them at unequal distances: each time others would be started."""
    path = shards(tmp_path, tokenizer_folder, "few", 5, 20)
    small = MixtureSource(tokenizer_folder, (PartPaths("few", (path,)),), 7, SHAPE, workers=1)
    before = set(active_children())
    assert [small.batch(number).tokens > 0 for number in (0, 5, 6, 19)] == [True] * 4
    assert set(active_children()) == before


def test_generated_documents_go_with_whole_ones(paths: tuple[Path, Path], tokenizer: Tokenizer) -> None:
    shape = RowShape(tokens=256, document_tokens=128, group_rows=8, alignment=16, whole=True)
    parts = [Part("short", 1.0, (ShardFolder(paths[0]),)), Part("made", 1.0, None)]
    loader = MixtureLoader(parts, tokenizer, 1, shape, generated=Numbers())
    rows = [row for group in range(6) for row in loader.group(group)]
    assert all(0 < sum(len(ids) for ids, _ in row) <= 256 for row in rows)
    known = {ids.tobytes() for n in range(300) for ids, _ in [ShardFolder(paths[0]).document(n)]}
    assert all(ids.tobytes() in known for row in rows for ids, mask in row if mask is None)
    with pytest.raises(ValueError, match="epochs of a mixture"):
        loader.epoch_rows(1)
    assert loader.locate(len(rows)) == (6, 0)


class Numbers:
    """Generated documents of 10 tokens."""

    def draw(self, random: Random) -> Document:
        return Document((int(random.random() * 100),) * 10, (0,) * 5 + (1,) * 5)


def test_generated_documents_have_their_share(paths: tuple[Path, Path], tokenizer: Tokenizer) -> None:
    parts = [Part("short", 1.0, (ShardFolder(paths[0]),)), Part("made", 1.0, None)]
    loader = MixtureLoader(parts, tokenizer, 1, SHAPE, generated=Numbers())
    documents = [(ids, mask) for group in range(6) for row in loader.group(group) for ids, mask in row]
    made = sum(len(ids) for ids, mask in documents if mask is not None)
    assert 0.45 < made / sum(len(ids) for ids, _ in documents) < 0.55
    alone = MixtureLoader([Part("made", 1.0, None)], tokenizer, 1, SHAPE, generated=Numbers())
    assert all(mask is not None for row in alone.group(2) for _, mask in row)
    for wrong in ([], parts[:1]):
        with pytest.raises(ValueError, match="at most one of generated"):
            MixtureLoader(wrong, tokenizer, 1, SHAPE, generated=Numbers())


class Uneven:
    """Generated documents of 10 tokens, and of 100, as many tokens of each."""

    def draw(self, random: Random) -> Document:
        count = 100 if random.random() < 1 / 11 else 10
        return Document((1,) * count, (0,) + (1,) * (count - 1))


@pytest.mark.parametrize("whole", [False, True])
def test_long_generated_documents_come_as_often_in_small_groups(
    paths: tuple[Path, Path], tokenizer: Tokenizer, whole: bool
) -> None:
    """A group's share is little more than one of them."""
    shape = RowShape(tokens=256, document_tokens=128, group_rows=4, alignment=16, whole=whole)
    parts = [Part("short", 0.8, (ShardFolder(paths[0]),)), Part("made", 0.2, None)]
    loader = MixtureLoader(parts, tokenizer, 1, shape, generated=Uneven())
    rows = [row for group in range(400) for row in loader.group(group)]
    lengths = [len(ids) for row in rows for ids, mask in row if mask is not None]
    share = sum(lengths) / sum(len(ids) for row in rows for ids, _ in row)
    assert share == pytest.approx(0.2, rel=0.05)
    assert sum(length for length in lengths if length > 10) / sum(lengths) == pytest.approx(0.5, rel=0.1)


def test_no_group_is_empty(tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer) -> None:
    """Though no document of either part fits into its share of a group."""
    shape = RowShape(tokens=64, document_tokens=64, group_rows=2, alignment=16)
    folder = shards(tmp_path, tokenizer_folder, "few", 20, 60)
    parts = [Part("few", 1.0, (ShardFolder(folder),)), Part("made", 1.0, None)]

    class Long:
        def draw(self, random: Random) -> Document:
            return Document((1,) * 90, (1,) * 90)

    loader = MixtureLoader(parts, tokenizer, 1, shape, generated=Long())
    for group in range(60):
        assert all(sum(len(ids) for ids, _ in row) for row in loader.group(group))


def refused() -> Iterator[tuple[str, object]]:
    yield "documents of 300 tokens in rows of 256", lambda: RowShape(256, 300)
    yield "1 rows per group", lambda: RowShape(256, 256, 1)
    yield "loss is 'some'", lambda: Part("a", 1.0, None, "some")
    yield "a: weight 0", lambda: Part("a", 0.0, None)
    yield "whole documents, and Rates.* would grow", lambda: MixtureLoader(
        [Part("made", 1.0, None)], None, 1, RowShape(64, 64, whole=True), Rates(0.1), Numbers()  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


@pytest.mark.parametrize(("message", "make"), refused())
def test_wrong_settings_are_named(message: str, make) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_shards_of_another_tokenizer_are_refused(
    paths: tuple[Path, Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in tokenizer_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "tokenizer.json").write_text((tokenizer_folder / "tokenizer.json").read_text() + "\n")
    with pytest.raises(ShardError, match="shards was tokenized with another tokenizer"):
        source(other, paths).batch(0)
    with pytest.raises(ValueError, match="part 'x' has no folder; only 'tasks' needs none"):
        MixtureSource(tokenizer_folder, (PartPaths("x", ()),), 1, SHAPE).batch(0)


def test_views_of_the_map_are_not_copied(paths: tuple[Path, Path], tokenizer: Tokenizer) -> None:
    loader = MixtureLoader([Part("short", 1.0, (ShardFolder(paths[0]),))], tokenizer, 1, SHAPE)
    ids, mask = loader.group(0)[0][0]
    assert ids.dtype == np.uint16 and not ids.flags.writeable and mask is None
