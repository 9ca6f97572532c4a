"""Token counts of a run's shards, and the loads of hash-routed layers whose tables are balanced by them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.data.records import find_sources
from dsv4.data.shard_loader import RowShape
from dsv4.data.shards import ShardError, ShardFolder
from dsv4.data.tokenizing import ShardWriter
from dsv4.model.initialization import deal_experts
from dsv4.model_folder import nano_path
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.special import ASSISTANT
from dsv4.training.hash_routing import balanced_table
from dsv4.training.sources import TASKS, MixtureSource, PartPaths
from dsv4.training.token_counts import PIECE_TOKENS, count_folder, count_run, keep_counts, read_counts

NANO = ModelConfig.preset("nano")
ALL = 1 << 25
DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Shards of two of three paragraphs of the documentation, and of the third."""
    parts: tuple[list[str], list[str]] = ([], [])
    for page in sorted(DOCS.glob("*.md")):
        for number, paragraph in enumerate(page.read_text().split("\n\n")):
            parts[number % 3 == 0].append(paragraph)
    folder = tmp_path_factory.mktemp("docs")
    for name, paragraphs in zip("ab", parts, strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs))
        ShardWriter(find_sources([str(folder / f"{name}.jsonl")]), nano_path(), folder / name, 2 * PIECE_TOKENS).run()
    return folder / "a", folder / "b"


def largest_load(table: Tensor, counts: np.ndarray) -> float:
    """Tokens of the fullest expert over their mean."""
    weights = torch.from_numpy(counts).double().repeat_interleave(table.shape[1])
    load = torch.zeros(NANO.n_routed_experts).double().index_add_(0, table.flatten(), weights)
    return float(load.max() / load.mean())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_loads_of_held_out_text_are_even(folders: tuple[Path, Path], seed: int) -> None:
    counts, held_out = (count_folder(folder, NANO.vocab_size, ALL) for folder in folders)
    few = np.bincount(ShardFolder(folders[0]).token_arrays()[0][: PIECE_TOKENS // 2], minlength=NANO.vocab_size)

    def balanced(by: np.ndarray) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return balanced_table(by.tolist(), NANO.n_routed_experts, NANO.num_experts_per_tok, generator)

    ordinary = deal_experts(NANO, torch.Generator().manual_seed(seed))  # every id counts the same
    assert largest_load(balanced(counts), counts) < 1.001
    assert largest_load(balanced(counts), held_out) < 1.2
    assert min(largest_load(table, held_out) for table in (ordinary, balanced(few))) > 1.2


def test_all_tokens_of_a_folder_are_counted_or_pieces_from_all_of_it(folders: tuple[Path, Path]) -> None:
    shards = ShardFolder(folders[0])
    ids = np.concatenate(shards.token_arrays())
    assert len(shards.token_arrays()) > 1
    counts = count_folder(folders[0], NANO.vocab_size, ALL)
    assert np.array_equal(counts, np.bincount(ids, minlength=NANO.vocab_size))
    half = count_folder(folders[0], NANO.vocab_size, most=ids.size / 2)
    assert 0.4 < half.sum() / len(ids) < 0.6 and bool((half <= counts).all())
    wanted = sum(
        np.bincount(array[start : start + PIECE_TOKENS], minlength=NANO.vocab_size)
        for array in shards.token_arrays()
        for start in (0, 2 * PIECE_TOKENS)
    )
    assert np.array_equal(half, wanted)
    with pytest.raises(ShardError, match="id [0-9]+; the model's vocabulary has 100"):
        count_folder(folders[0], 100, ALL)


def test_parts_count_by_their_shares_and_stages_by_their_tokens(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = folders

    def source(**weights: float) -> MixtureSource:
        places = {"a": (a,), "b": (b,), TASKS: ()}
        parts = tuple(PartPaths(name, places[name], weight) for name, weight in weights.items())
        return MixtureSource(nano_path(), parts, 1, RowShape(64, 64))

    stages = [(source(a=3.0, b=1.0), 1000.0), (source(b=1.0), 500.0)]
    share_a, share_b = (count_folder(f, NANO.vocab_size, ALL) / ShardFolder(f).index.counts.tokens for f in folders)
    counts = count_run(stages, NANO.vocab_size)
    assert np.allclose(counts, 750 * share_a + 750 * share_b) and counts.sum() == pytest.approx(1500)
    both = MixtureSource(nano_path(), (PartPaths("both", (a, b)),), 1, RowShape(64, 64))
    together = [ShardFolder(folder).index.counts.tokens for folder in folders]
    monkeypatch.setattr("dsv4.training.token_counts.COUNTED_TOKENS", 1)  # samples of folders stand for all their tokens
    few_a, few_b = (count_folder(folder, NANO.vocab_size, 1) for folder in folders)
    expected = (together[0] * few_a / few_a.sum() + together[1] * few_b / few_b.sum()) / sum(together)
    assert np.allclose(count_run([(both, 1.0)], NANO.vocab_size), expected)
    monkeypatch.setattr("dsv4.training.token_counts.TASK_TOKENS", 2000)
    keep_counts(tmp_path, [(source(b=1.0, tasks=1.0), 10.0)], NANO.vocab_size)
    found = read_counts(tmp_path)
    assert found.sum() == pytest.approx(10)
    assistant = Tokenizer.from_pretrained(nano_path()).special_id(ASSISTANT)
    assert share_b[assistant] == 0 < found[assistant]
    monkeypatch.setattr("dsv4.training.token_counts.count_run", lambda *_: pytest.fail("counted again"))
    keep_counts(tmp_path, stages, NANO.vocab_size)
    assert np.array_equal(read_counts(tmp_path), found)
