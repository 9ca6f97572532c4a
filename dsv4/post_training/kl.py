"""Reverse KL divergence of a student's distribution from a teacher's, over the full vocabulary, from hidden states.

Per token KL = sum_v p(v) (log p(v) - log q(v)), p the student's and q the teacher's next-token probabilities. The
gradient with respect to the student's logits is p (log p - log q - KL) (report, On-Policy Distillation): closed form,
so that logits are made again in the backward, a chunk of tokens at a time, and never kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.kernels.linear import linear
from dsv4.post_training.head_gradient import HeadGradient, row_chunks

CHUNK = 1024  # tokens whose logits are in memory at a time


def reverse_kl(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, chunk: int = CHUNK
) -> Tensor:
    """KL(student || teacher) per token, fp32 [T], differentiable in the student's arguments.

    Hidden states [T, d] are those that the heads [V, d] read: after the read-out of the streams and the final norm.
    Teacher and student may differ in d. Computed in fp32; memory grows with `chunk` times V, not with T times V. Equal
    arguments give exactly 0 and a zero gradient. ValueError for shapes that do not fit, or a chunk below 1.
    """
    _check(student_hidden, student_head, teacher_hidden, teacher_head, chunk)
    return _ReverseKL.apply(student_hidden, student_head, teacher_hidden.detach(), teacher_head.detach(), chunk)


def log_probabilities(hidden: Tensor, head: Tensor) -> Tensor:
    """Log-probabilities fp32 [T, V] of hidden states [T, d] under a head [V, d]: the sampler's, bit for bit."""
    return linear(hidden.float(), head.float()).log_softmax(-1)


class _ReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(hidden, head, teacher_hidden, teacher_head)
        ctx.chunk = chunk
        out = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for rows in row_chunks(len(hidden), chunk):
            log_p = log_probabilities(hidden[rows], head)
            out[rows] = (log_p.exp() * log_p.sub_(log_probabilities(teacher_hidden[rows], teacher_head))).sum(-1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, head, teacher_hidden, teacher_head = ctx.saved_tensors
        found = HeadGradient(hidden, head, ctx.needs_input_grad[:2])
        for rows in row_chunks(len(hidden), ctx.chunk):
            log_p = log_probabilities(hidden[rows], head)
            p = log_p.exp()
            difference = log_p.sub_(log_probabilities(teacher_hidden[rows], teacher_head))
            d_logits = difference.sub_((p * difference).sum(-1, keepdim=True)).mul_(p).mul_(grad[rows].unsqueeze(1))
            found.add(rows, d_logits)
        return (*found.result(), None, None, None)


def _check(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, chunk: int
) -> None:
    named = {
        "student_hidden": student_hidden,
        "student_head": student_head,
        "teacher_hidden": teacher_hidden,
        "teacher_head": teacher_head,
    }
    for name, tensor in named.items():
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; allowed: floating point, 2 dimensions")
    for side in ("student", "teacher"):
        hidden, head = named[f"{side}_hidden"], named[f"{side}_head"]
        if hidden.shape[1] != head.shape[1]:
            raise ValueError(
                f"{side}_hidden is {tuple(hidden.shape)} and {side}_head {tuple(head.shape)}; the last sizes must agree"
            )
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(
            f"student_hidden has {len(student_hidden)} tokens and teacher_hidden {len(teacher_hidden)}; "
            "allowed: as many"
        )
    if len(student_head) != len(teacher_head):
        raise ValueError(
            f"student_head has a vocabulary of {len(student_head)} and teacher_head of {len(teacher_head)}; "
            "allowed: the same"
        )
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; allowed: 1 or more tokens")
