"""FP8 and FP4 fake quantization: every rung against a search in the tables of all codes."""

import numpy as np
import pytest
import torch

from dsv4.kernels.quant import fake_quant_fp4, fake_quant_fp8

from .number_formats import E2M1, E4M3, fake_fp4, fake_fp8
from .tools import noise


def test_every_code_is_kept(rung: str) -> None:
    """A block with all values of the format, scaled by any power of two in range, is returned unchanged."""
    for table, quantize, exponents in (
        (E4M3, lambda x: fake_quant_fp8(x, 256), range(-8, 20)),
        (E2M1, fake_quant_fp4, range(-120, 100)),
    ):
        codes = torch.from_numpy(np.concatenate((table, -table))).float()
        for e in exponents:
            assert torch.equal(quantize(codes * 2.0**e), codes * 2.0**e), e


def test_ties_go_to_the_even_code(rung: str) -> None:
    for table, quantize in ((E4M3, lambda x: fake_quant_fp8(x, 256)), (E2M1, fake_quant_fp4)):
        middle = (table[:-1] + table[1:]) / 2
        even = np.where(np.arange(len(middle)) % 2 == 0, table[:-1], table[1:])
        x = torch.from_numpy(np.concatenate((middle, -middle, table[-1:]))).float()  # the last sets scale 1
        want = torch.from_numpy(np.concatenate((even, -even, table[-1:]))).float()
        assert torch.equal(quantize(x), want)
        above = torch.nextafter(x[: len(middle)], torch.tensor(float("inf")))
        assert torch.equal(quantize(torch.cat((above, x[-1:])))[:-1], torch.from_numpy(table[1:]).float())


@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 130, 448])
def test_random_values(rung: str, width: int) -> None:
    x = noise(57, width, seed=width) * 10 ** noise(57, 1, seed=width + 1)
    x[0] = 0.0
    x[1] = 1e-7
    x[2, 0] = -0.0
    for block in (64, 128):
        assert np.array_equal(fake_quant_fp8(x, block).double().numpy(), fake_fp8(x.numpy(), block))
    assert np.array_equal(fake_quant_fp4(x).double().numpy(), fake_fp4(x.numpy()))


def test_scale_at_the_edge_of_a_power_of_two(rung: str) -> None:
    """amax = 448 * 2^e just fits; one step more doubles the scale (and coarsens the small values)."""
    for e in (-5, 0, 3):
        edge = torch.tensor([448.0 * 2.0**e, 2.0 ** (e - 9)])
        assert torch.equal(fake_quant_fp8(edge, 2), edge)
        more = torch.nextafter(edge[:1], torch.tensor(float("inf")))
        assert fake_quant_fp8(torch.cat((more, edge[1:])), 2).tolist() == [448.0 * 2.0**e, 0.0]


def test_blocks_do_not_see_each_other(rung: str) -> None:
    x = noise(3, 192)
    x[:, 64:128] *= 1e4
    whole = fake_quant_fp8(x, 64)
    for part in (slice(0, 64), slice(64, 128), slice(128, 192)):
        assert torch.equal(whole[:, part], fake_quant_fp8(x[:, part], 64))


@pytest.mark.parametrize("quantize", [fake_quant_fp4, lambda x: fake_quant_fp8(x, 128)])
def test_gradient_passes_straight_through_and_the_dtype_stays(quantize) -> None:  # type: ignore[no-untyped-def]
    x = noise(5, 40).requires_grad_()
    pull = noise(5, 40, seed=1)
    (grad,) = torch.autograd.grad(quantize(x), x, pull)
    assert torch.equal(grad, pull)
    low = noise(5, 40).bfloat16()
    assert quantize(low).dtype == torch.bfloat16
    assert torch.equal(quantize(low).float(), quantize(low.float()).bfloat16().float())
