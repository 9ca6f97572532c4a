"""Every kind of source gives its records in order, from any number on, or an error that names the place."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from dsv4.data.encoding import RecordEncoder, read_conversation
from dsv4.data.records import MESSAGES, Record, RecordError, find_sources
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.prompts import PromptEncoder
from dsv4.tokenizer.special import ASSISTANT, BOS, EOS

CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2+2?"},
        {"role": "assistant", "content": "4"},
    ]
}


def write_files(folder: Path) -> dict[str, list[Record]]:
    """Files of every kind in a folder -> records by name."""
    (folder / "deep").mkdir()
    (folder / "deep" / "b.txt").write_text("second\nfile")
    (folder / "a.md").write_text("# é")
    lines: list[dict[str, Any]] = [{"text": "one"}, CHAT, {"text": "three", "n": 3}]
    data = "\n\n".join(json.dumps(line) for line in lines).encode()
    (folder / "c.jsonl").write_bytes(data)
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(data))
    (folder / "e.txt.bz2").write_bytes(bz2.compress(b"packed"))
    rows: list[Record] = [f"row {n}" for n in range(10)]
    parquet.write_table(pa.table({"text": rows, "other": rows}), folder / "f.parquet", row_group_size=3)
    parquet.write_table(pa.table({"messages": [CHAT["messages"]], "reasoning_effort": ["max"]}), folder / "g.parquet")
    (folder / ".hidden.txt").write_text("no")
    (folder / "picture.png").write_text("no")
    return {
        "a.md": ["# é"], "c.jsonl": ["one", CHAT, "three"], "d.jsonl.gz": ["one", CHAT, "three"],
        "deep/b.txt": ["second\nfile"], "e.txt.bz2": ["packed"], "f.parquet": rows,
        "g.parquet": [CHAT | {"reasoning_effort": "max"}],
    }  # fmt: skip


def test_all_kinds_are_read_in_order_and_from_any_record(tmp_path: Path) -> None:
    expected = write_files(tmp_path)
    sources = find_sources([str(tmp_path)])
    assert [source.name for source in sources] == list(expected)
    for source in sources:
        records = list(source.records())
        assert records == expected[source.name]
        for start in range(len(records) + 1):
            assert list(source.records(start)) == records[start:]


def test_patterns_are_files_folders_and_globs_without_duplicates(tmp_path: Path) -> None:
    write_files(tmp_path)
    globbed = find_sources([str(tmp_path / "**/*.txt"), str(tmp_path / "a.md"), str(tmp_path / "deep")])
    assert [source.name for source in globbed] == ["b.txt", "a.md"]
    before = globbed[1].digest()
    (tmp_path / "a.md").write_text("# e")
    assert globbed[1].digest() != before


def test_errors_name_the_place(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(RecordError, match=r"a\.jsonl:2: no JSON"):
        list(find_sources([str(tmp_path)])[0].records())
    (tmp_path / "a.jsonl").write_text('{"content": "fine"}\n')
    with pytest.raises(RecordError, match=r"a\.jsonl:1: no text in 'text' and no list in 'messages'; .*'content'"):
        list(find_sources([str(tmp_path)])[0].records())
    assert list(find_sources([str(tmp_path)], "content")[0].records()) == ["fine"]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(RecordError, match=r"a\.jsonl:1: byte 10 is not UTF-8"):
        list(find_sources([str(tmp_path)])[0].records())
    (tmp_path / "p.parquet").write_text("no")
    with pytest.raises(RecordError, match=r"p\.parquet: no Parquet file"):
        list(find_sources([str(tmp_path / "p.parquet")])[0].records())
    parquet.write_table(pa.table({"content": ["fine"], "id": [1]}), tmp_path / "p.parquet")
    with pytest.raises(RecordError, match=r"p\.parquet: no column 'text' or 'messages'; it has \['content', 'id'\]"):
        list(find_sources([str(tmp_path / "p.parquet")])[0].records())
    for pattern, message in ((tmp_path / "none", "no such file"), (tmp_path / "*.tar", "no files that match")):
        with pytest.raises(RecordError, match=message):
            find_sources([str(pattern)])
    (tmp_path / "x.tar").write_text("no")
    with pytest.raises(RecordError, match=r"x\.tar: files that end in \.txt"):
        find_sources([str(tmp_path / "x.tar")])


def test_tables_may_hold_conversations_as_json(tmp_path: Path) -> None:
    columns = {"messages": [json.dumps(CHAT["messages"])], "tools": [json.dumps([{"type": "function"}])]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    (record,) = find_sources([str(tmp_path)])[0].records()
    assert record == {"messages": CHAT["messages"], "tools": [{"type": "function"}]}
    parquet.write_table(pa.table({"messages": ["hello"]}), tmp_path / "a.parquet")
    with pytest.raises(RecordError, match=r"row 1: 'messages' is a text that is no JSON"):
        list(find_sources([str(tmp_path)])[0].records())


def native_rows() -> list[dict[str, Any]]:
    """Conversations whose tools and messages have different keys, at every depth."""
    parameters: list[dict[str, Any]] = [
        {"type": "object", "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}}, "required": ["city"]},
        {"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}, "b": {"type": "integer"}}},
        {"type": "object", "properties": {}},
    ]
    tools = [{"type": "function", "function": {"name": f"f{n}", "parameters": p}} for n, p in enumerate(parameters)]
    tools[1]["function"]["description"] = "adds"
    call = {"id": "c", "type": "function", "function": {"name": "f1", "arguments": '{"a": 1, "b": 2}'}}
    messages = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "", "reasoning_content": "add", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
        {"role": "assistant", "content": "3", "reasoning_content": "done"},
    ]
    return [{"messages": messages, "tools": tools}, {"messages": messages[:2], "tools": tools[1:]}, CHAT]


def test_native_columns_are_read_as_their_json(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = native_rows()
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    lines, table = find_sources([str(tmp_path)])
    assert list(table.records()) == list(lines.records()) == rows
    encoder = RecordEncoder(PromptEncoder(tokenizer))
    for one, other in zip(encoder.encode(list(lines.records())), encoder.encode(list(table.records())), strict=True):
        assert one.ids.tolist() == other.ids.tolist()


def test_nulls_of_json_are_kept(tmp_path: Path) -> None:
    schema = {"properties": {"a": {"enum": [None, 1], "default": None}}}
    rows = [{"messages": CHAT["messages"], "tools": [schema]}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    columns = {name: [json.dumps(value)] for name, value in rows[0].items()}
    parquet.write_table(pa.table(columns), tmp_path / "b.parquet")
    for source in find_sources([str(tmp_path)]):
        assert list(source.records()) == rows


def test_a_column_decides_between_a_text_and_messages(tmp_path: Path) -> None:
    rows = [CHAT | {"text": "rendered"}, CHAT | {"text": ""}, {"text": "plain", "messages": []}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    both, chat, plain = (entry.record for entry in find_sources([str(tmp_path)])[0].entries())
    assert isinstance(both, RecordError) and str(both).endswith("a.jsonl:1: both 'text' and 'messages'; name one: "
        "--column text or --column messages")  # fmt: skip
    assert chat == rows[1] and plain == "plain"
    (texts,), (talks,) = (find_sources([str(tmp_path)], column) for column in ("text", MESSAGES))
    assert list(texts.records()) == ["rendered", "", "plain"] and list(talks.records()) == rows
    assert len({texts.digest(), talks.digest(), find_sources([str(tmp_path)])[0].digest()}) == 3


def test_values_of_a_table_that_are_no_json_are_named(tmp_path: Path) -> None:
    bad = pa.array([b"\xff"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": pa.concat_arrays([pa.array(["a"]), bad])}), tmp_path / "a.parquet")
    fine, broken = (entry.record for entry in find_sources([str(tmp_path)])[0].entries())
    assert (
        fine == "a"
        and isinstance(broken, RecordError)
        and "a.parquet, row 2: a value that cannot be read" in str(broken)
    )
    with pytest.raises(ValueError, match="no JSON: Object of type bytes"):
        read_conversation({"messages": [{"role": "user", "content": b"x"}, {"role": "assistant", "content": "y"}]})


def test_datasets_of_the_hub_library_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).save_to_disk(str(tmp_path / "saved"))
    (source,) = find_sources([f"hf:{tmp_path / 'saved'}"])
    assert list(source.records(1)) == ["b", "c"] and len(source.digest()) == 64


def test_a_missing_datasets_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(RecordError, match="hf:owner/name: the library `datasets` is not installed"):
        find_sources(["hf:owner/name"])[0].digest()


def test_conversations_keep_the_mask_of_what_the_assistant_said(tokenizer: Tokenizer) -> None:
    text, chat = RecordEncoder(PromptEncoder(tokenizer)).encode(["plain", CHAT])
    assert tokenizer.decode(text.ids.tolist()) == f"{BOS}plain{EOS}" and text.mask is None
    assert chat.mask is not None
    learned = [token for token, flag in zip(chat.ids.tolist(), chat.mask, strict=True) if flag]
    assert tokenizer.decode(learned) == f"2{EOS}4{EOS}"
    assert ASSISTANT in tokenizer.decode(chat.ids.tolist())


def test_reasoning_and_tool_calls_are_targets_and_nulls_are_absent(tokenizer: Tokenizer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    record: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": "go", "tool_calls": None},
            {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
        ],
        "tools": [tool],
    }
    conversation, target = read_conversation(record)
    assert conversation.thinking_mode and target.reasoning_content == "hm"
    (encoded,) = RecordEncoder(PromptEncoder(tokenizer)).encode([record])
    assert encoded.mask is not None
    learned = tokenizer.decode([t for t, flag in zip(encoded.ids.tolist(), encoded.mask, strict=True) if flag])
    assert learned.startswith("hm") and '"add"' in learned
    with pytest.raises(ValueError, match="ends with a message of the assistant"):
        read_conversation({"messages": record["messages"][:1]})
