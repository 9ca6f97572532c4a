"""Reverse KL over the full vocabulary: value, closed-form gradient, zero for equals, memory."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4.post_training import kl, reverse_kl

V = 97


def heads(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher of different width: hidden states and heads."""
    g = torch.Generator().manual_seed(tokens)
    sizes = ((tokens, 24), (V, 24), (tokens, 40), (V, 40))
    return tuple(torch.randn(size, generator=g, dtype=torch.float32).to(dtype) for size in sizes)  # pyright: ignore


def whole(student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """The same by torch's own KL, all logits at once, in double precision."""
    p = (student_hidden.double() @ student_head.double().T).log_softmax(-1)
    q = (teacher_hidden.double() @ teacher_head.double().T).log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("chunk", [1, 3, 4, 1024])
@pytest.mark.parametrize("tokens", [1, 4, 13])
def test_it_has_the_value_and_the_gradient_of_the_definition(tokens: int, chunk: int) -> None:
    arguments = heads(tokens)
    weights = torch.arange(1.0, tokens + 1)
    student = [x.clone().requires_grad_() for x in arguments[:2]]
    got = reverse_kl(*student, *arguments[2:], chunk=chunk)
    assert got.dtype == torch.float32 and got.shape == (tokens,)
    (got * weights).sum().backward()
    exact = [x.clone().double().requires_grad_() for x in arguments[:2]]
    want = whole(*exact, *arguments[2:])
    (want * weights).sum().backward()
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(student, exact, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert (mine.grad.double() - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max()


def test_a_teacher_equal_to_the_student_gives_exactly_zero() -> None:
    hidden, head, *_ = heads(9)
    student = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    loss = reverse_kl(*student, hidden, head, chunk=4)
    loss.sum().backward()
    assert not loss.any() and all(x.grad is not None and not x.grad.any() for x in student)


def test_chunks_do_not_change_the_bits_of_a_token() -> None:
    arguments = heads(13)
    whole_batch = reverse_kl(*arguments, chunk=1024)
    assert torch.equal(
        whole_batch,
        torch.cat([reverse_kl(*(x[i : i + 1] if len(x) == 13 else x for x in arguments)) for i in range(13)]),
    )
    assert torch.equal(whole_batch, reverse_kl(*arguments, chunk=5))


def test_only_a_chunk_of_logits_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = kl.log_probabilities

    def watched(hidden: Tensor, head: Tensor) -> Tensor:
        sizes.append(len(hidden))
        return plain(hidden, head)

    monkeypatch.setattr(kl, "log_probabilities", watched)
    hidden, *rest = heads(13)
    reverse_kl(hidden.requires_grad_(), *rest, chunk=4).sum().backward()
    assert max(sizes) == 4 and sum(sizes) == 13 * 4  # student and teacher, forward and backward


def resident_growth(run: Callable[[], object]) -> int:
    """Bytes by which the process's peak of resident memory grows in `run`."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before = peak()
    run()
    return peak() - before


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def growths(tokens: int, vocab: int, chunks: tuple[int, ...]) -> list[int]:
    """Growth of the peak by forward and backward in chunks of each size."""
    hidden, head = torch.randn(tokens, 8).requires_grad_(), torch.randn(vocab, 8).requires_grad_()
    teacher = (hidden.detach() + 1, head.detach())

    def run(chunk: int) -> None:
        reverse_kl(hidden, head, *teacher, chunk=chunk).sum().backward()

    run(chunks[0])  # gradients are there
    return [resident_growth(lambda chunk=chunk: run(chunk)) for chunk in chunks]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory cannot be measured")
def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    """In a process of its own: runs of other tests have made the C library of this one keep what is freed."""
    tokens, vocab = 1024, 32768
    whole_logits = 4 * tokens * vocab
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        chunked, whole = pool.submit(growths, tokens, vocab, (16, tokens)).result()
    assert chunked < whole_logits / 2
    assert whole > whole_logits  # which the measure sees


def test_bfloat16_arguments_get_gradients_of_their_type() -> None:
    arguments = heads(5, torch.bfloat16)
    hidden = arguments[0].clone().requires_grad_()
    loss = reverse_kl(hidden, *arguments[1:])
    loss.sum().backward()
    assert loss.dtype == torch.float32 and hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    assert torch.allclose(loss.double(), whole(*arguments), rtol=1e-4, atol=1e-4)


def test_its_gradient_has_less_variance_than_the_sampled_estimate() -> None:
    """Over samples of one token per state: the estimate's gradient p-weighted log-ratio against the closed form."""
    hidden, head, teacher_hidden, teacher_head = heads(1)
    log_p = kl.log_probabilities(hidden, head)[0].double()
    difference = log_p - kl.log_probabilities(teacher_hidden, teacher_head)[0].double()
    p = log_p.exp()
    exact = p * (difference - (p * difference).sum())
    # The estimate at token y: difference(y) * d log p(y) / d logits.
    estimates = difference.unsqueeze(1) * (torch.eye(V, dtype=torch.float64) - p)
    mean = (p.unsqueeze(1) * estimates).sum(0)
    assert torch.allclose(mean, exact, atol=1e-12)  # unbiased
    assert (p.unsqueeze(1) * (estimates - mean).square()).sum() > 0.1 * exact.square().sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_hidden": torch.zeros(3, 2, 24)}, "student_hidden is torch.float32 \\(3, 2, 24\\)"),
        ({"teacher_head": torch.zeros(V, 24)}, "teacher_hidden is \\(5, 40\\) and teacher_head \\(97, 24\\)"),
        ({"teacher_hidden": torch.zeros(4, 40)}, "5 tokens and teacher_hidden 4"),
        ({"teacher_head": torch.zeros(96, 40)}, "vocabulary of 97 and teacher_head of 96"),
        ({"chunk": 0}, "chunk is 0; allowed: 1 or more"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, object], message: str) -> None:
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
    arguments: dict[str, object] = dict(zip(names, heads(5), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        reverse_kl(**arguments)  # pyright: ignore[reportArgumentType]
