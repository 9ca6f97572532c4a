"""Tokenizing: the same bytes after any kill; damaged or foreign shards are errors that name the file."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4.cli import main
from dsv4.data import tokenizing
from dsv4.data.records import RecordError, find_sources
from dsv4.data.shards import (
    INDEX,
    Counts,
    Index,
    ShardError,
    ShardFolder,
    hash_file,
    open_shard,
    token_dtype,
    write_shard,
)
from dsv4.data.tokenizing import ShardWriter
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.special import BOS, EOS

from .test_records import write_files

SHARD_TOKENS = 30
TOOL_RESULT = {"role": "tool", "tool_call_id": "c", "content": "r"}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    write_files(folder)
    return folder


def writer(texts: Path, tokenizer_folder: Path, out: Path, shard_tokens: int = SHARD_TOKENS) -> ShardWriter:
    return ShardWriter(find_sources([str(texts)]), tokenizer_folder, out, shard_tokens)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_documents_come_back_with_their_boundaries(
    texts: Path, tokenizer_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    index = writer(texts, tokenizer_folder, tmp_path / "out").run()
    folder = ShardFolder(tmp_path / "out")
    assert len(index.shards) > 3 and len(folder) == index.counts.documents == 20
    documents = [folder.document(n) for n in range(len(folder))]
    assert [len(ids) for ids, _ in documents] == folder.lengths.tolist()
    assert tokenizer.decode(documents[0][0].tolist()) == f"{BOS}# é{EOS}"
    assert [tokenizer.decode(ids.tolist()) for ids, _ in documents[9:19]] == [f"{BOS}row {n}{EOS}" for n in range(10)]
    masks = [mask for _, mask in documents if mask is not None]
    assert len(masks) == 3 and all(0 < mask.sum() < len(mask) for mask in masks)
    assert index.counts.tokens == folder.lengths.sum()
    assert index.counts.targets == sum(len(ids) if mask is None else mask.sum() for ids, mask in documents)
    assert index.counts == sum((entry.counts for entry in index.shards), Counts())
    assert documents[0][0].dtype == np.uint16 and not documents[0][0].flags.owndata


@pytest.mark.parametrize("killed_at", [0, 1, 3])
def test_a_killed_call_goes_on_to_the_same_bytes(
    texts: Path, tokenizer_folder: Path, tmp_path: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer(texts, tokenizer_folder, tmp_path / "whole").run()
    written: list[Path] = []
    write = tokenizing.write_shard

    def write_or_die(path: Path, *arguments: object) -> None:
        if len(written) == killed_at:
            raise KeyboardInterrupt
        write(path, *arguments)  # pyright: ignore[reportArgumentType]
        written.append(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenizing, "write_shard", write_or_die)
        writer(texts, tokenizer_folder, tmp_path / "killed").run()
    with pytest.raises(ShardError, match="killed: no index.json"):
        ShardFolder(tmp_path / "killed")
    before = {path: path.stat().st_mtime_ns for path in written}
    writer(texts, tokenizer_folder, tmp_path / "killed").run()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_finished_folder_is_left_alone_and_other_data_refused(
    texts: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    index = writer(texts, tokenizer_folder, out).run()
    assert writer(texts, tokenizer_folder, out).run() == index
    with pytest.raises(ShardError, match="index.json is of other data"):
        writer(texts, tokenizer_folder, out, 40).run()
    (out / INDEX).unlink()
    (texts / "a.md").write_text("changed")
    with pytest.raises(ShardError, match="shard-00000.arrow is of other data"):
        writer(texts, tokenizer_folder, out).run()


def test_damaged_and_foreign_shards_are_errors_with_their_name(
    texts: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    index = writer(texts, tokenizer_folder, out).run()
    ShardFolder(out).check_tokenizer(index.tokenizer_sha256)
    with pytest.raises(ShardError, match="another tokenizer"):
        ShardFolder(out).check_tokenizer("0")
    path = out / "shard-00001.arrow"
    whole = path.read_bytes()
    for damaged, message in (
        (whole[:-1], "has .* bytes; the index"),
        (whole[:500] + bytes([whole[500] ^ 1]) + whole[501:], "sha256 is not the one"),
        (b"", "has 0 bytes"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=f"shard-00001.arrow.*{message}"):
            ShardFolder(out)
    with pytest.raises(ShardError, match="shard-00001.arrow is damaged, or no shard"):
        open_shard(path)
    (texts / "a.md").write_text("changed")
    writer(texts, tokenizer_folder, other).run()
    path.write_bytes((other / path.name).read_bytes())
    values = json.loads((out / INDEX).read_text())
    values["shards"][1] = json.loads((other / INDEX).read_text())["shards"][1]
    (out / INDEX).write_text(json.dumps(values))
    with pytest.raises(ShardError, match="shard-00001.arrow is of other data"):
        ShardFolder(out)
    path.unlink()
    with pytest.raises(ShardError, match="shard-00001.arrow is missing"):
        ShardFolder(out)
    for text in ("{", "[]", '{"format": "dsv4 tokens 1"}', '{"format": "else"}'):
        (out / INDEX).write_text(text)
        with pytest.raises(ShardError, match="index.json"):
            Index.read(out)


def test_shards_with_other_numbers_than_the_index_says_are_refused(
    texts: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Whole files of another program, with the index's sha256: an id that the model does not have, wide ids."""
    index = writer(texts, tokenizer_folder, tmp_path / "out").run()
    path = tmp_path / "out" / index.shards[0].name
    shard, vocab = open_shard(path), index.vocab_size
    for ids, dtype, message in (
        ([1, vocab], np.uint16, f"token id {vocab}; the tokenizer has {vocab} ids"),
        ([1, 2], np.int64, "ids are int64, masks uint8; allowed: uint16, uint8"),
    ):
        header = replace(shard.header, counts=Counts(1, 2, 2, 2))
        write_shard(path, [np.array(ids)], [None], np.dtype(dtype), header)
        entry = replace(index.shards[0], size=path.stat().st_size, sha256=hash_file(path))
        replace(index, shards=(entry, *index.shards[1:])).write(tmp_path / "out")
        with pytest.raises(ShardError, match=f"shard-00000.arrow: {message}"):
            ShardFolder(tmp_path / "out")


def test_empty_texts_alone_are_no_data(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(RecordError, match=r"a\.txt: no text in any record"):
        writer(tmp_path / "a.txt", tokenizer_folder, tmp_path / "out").run()
    (tmp_path / "b.txt").write_text("b")
    assert writer(tmp_path, tokenizer_folder, tmp_path / "out").run().counts.documents == 2


def test_a_bad_record_is_named(texts: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    (texts / "z.jsonl").write_text('{"text": "fine"}\n{"messages": [{"role": "user", "content": "no answer"}]}\n')
    with pytest.raises(ValueError, match=r"z\.jsonl:2: a conversation ends with a message of the assistant"):
        writer(texts, tokenizer_folder, tmp_path / "out").run()


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": ["x"]}, "messages[0]: str; messages are objects with a role"),
        ({"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "a"}]}, "messages[0].content"),
        ({"messages": [TOOL_RESULT, {"role": "assistant", "content": "a"}]}, "role 'tool' must be a response"),
        ({"text": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_the_command_refuses_a_bad_record_in_one_line(
    record: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "z.jsonl").write_text('{"text": "fine"}\n\n' + json.dumps(record))
    assert main(["data", "tokenize", str(tmp_path / "z.jsonl"), "--out", str(tmp_path / "out")]) != 0
    told = capsys.readouterr().err
    assert "z.jsonl:3: " in told and words in told and "Traceback" not in told


def test_folders_pickle_and_large_vocabularies_take_four_bytes(
    texts: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    writer(texts, tokenizer_folder, tmp_path / "out").run()
    folder = pickle.loads(pickle.dumps(ShardFolder(tmp_path / "out")))
    assert np.array_equal(folder.document(3)[0], ShardFolder(tmp_path / "out").document(3)[0])
    assert token_dtype(65_536) == np.uint16 and token_dtype(65_537) == token_dtype(129_280) == np.uint32


def test_the_command_tokenizes_and_inspects(
    texts: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["data", "tokenize", str(texts), "--model", str(tokenizer_folder), "--out", out]) == 0
    first = capsys.readouterr().out
    assert "shard-00000.arrow" in first and "7 sources, uint16 ids of a vocabulary of 500" in first
    assert main(["data", "inspect", out]) == 0
    assert capsys.readouterr().out == first
    (tmp_path / "out" / "shard-00000.arrow").write_bytes(b"no")
    assert main(["data", "inspect", out]) == 2
    assert "shard-00000.arrow has 2 bytes" in capsys.readouterr().err
