"""Digests of blocks, and what the router of a cluster knows of its replicas by them."""

from __future__ import annotations

from dsv4.config import PAGE_TOKENS
from dsv4.engine import LLM
from dsv4.engine.cluster.prefix_index import KEPT_REQUESTS, PrefixIndex
from dsv4.prefix_digests import DIGEST_BYTES, block_digests

from .prefixes import CONFIG, IDS, greedy

from ..model.tiny import random_model  # isort: skip

A, B = "a", "b"


def digests(*seeds: int) -> list[bytes]:
    return block_digests([seed for seed in seeds for _ in range(PAGE_TOKENS)], None)


def test_a_digest_stands_for_all_blocks_before_it_and_the_salt() -> None:
    assert [len(digest) for digest in digests(1, 2)] == [DIGEST_BYTES] * 2
    assert digests(1, 2)[:1] == digests(1) and digests(1, 2)[1] != digests(3, 2)[1]
    ids = [1] * (PAGE_TOKENS - 1)
    assert block_digests(ids, None) == []
    assert len({block_digests([*ids, 1], salt)[0] for salt in (None, "", "x")}) == 2 + ("" != None)
    assert block_digests([1 << 40] * PAGE_TOKENS, None) == []


def test_stored_prefixes_have_the_digests_of_their_prompts() -> None:
    llm = LLM(random_model(CONFIG), max_num_batched_tokens=256)
    first, second = IDS[:300], IDS[:150] + IDS[600:900]
    llm.generate([first], greedy(1))
    prefixes = llm.core.scheduler.cache_manager.prefixes
    assert prefixes is not None
    assert set(prefixes.digests(100)) == set(block_digests(first, None))
    llm.generate([second], greedy(1))
    both = {*block_digests(first, None), *block_digests(second, None)}
    assert set(prefixes.digests(100)) == both and len(both) == 4
    assert set(prefixes.digests(3)) == set(block_digests(second, None)), "those used last"
    llm.reset_prefix_cache()
    assert prefixes.digests(100) == []


def test_a_request_counts_until_reports_know_it() -> None:
    index = PrefixIndex()
    index.begin(A, "1", digests(1, 2))
    assert (index.matching(A, digests(1, 2, 3)), index.matching(B, digests(1))) == (2, 0)
    index.report(A, 1, b"")
    index.report(A, 2, b"")
    assert index.matching(A, digests(1, 2)) == 2, "it runs"
    index.end(A, "1")
    index.report(A, 3, b"")  # may have been made before the end
    assert index.matching(A, digests(1, 2)) == 2
    index.report(A, 3, b"")  # the same again
    assert index.matching(A, digests(1, 2)) == 2
    index.report(A, 4, digests(1)[0])
    assert (index.matching(A, digests(1, 2)), index.held(A)) == (1, 1), "the replica has dropped the second block"


def test_two_requests_with_a_block_keep_it_until_both_are_known() -> None:
    index = PrefixIndex()
    index.begin(A, "1", digests(1))
    index.begin(A, "2", digests(1, 2))
    index.end(A, "1")
    for number in range(3):
        index.report(A, number, b"")
    assert index.matching(A, digests(1, 2)) == 2
    index.end(A, "2")
    for number in range(3, 6):
        index.report(A, number, b"")
    assert (index.matching(A, digests(1)), index.held(A)) == (0, 0)


def test_a_hole_ends_what_matches_and_gone_replicas_are_forgotten() -> None:
    index = PrefixIndex()
    first, _, third = digests(1, 2, 3)
    index.report(A, 1, first + third)
    assert index.matching(A, digests(1, 2, 3)) == 1
    index.keep([B])
    assert index.matching(A, [first]) == 0


def test_without_reports_the_record_is_bounded() -> None:
    index = PrefixIndex()
    for number in range(KEPT_REQUESTS + 10):
        index.begin(A, str(number), [number.to_bytes(DIGEST_BYTES, "big")])
        index.end(A, str(number))
    assert index.held(A) == KEPT_REQUESTS
