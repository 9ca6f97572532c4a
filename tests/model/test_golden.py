"""Golden numbers: mHC, YaRN, fake quantization, and the Hadamard matrix."""

import numpy as np
import pytest
import torch

from dsv4.config import ModelConfig
from dsv4.kernels.hadamard import hadamard
from dsv4.kernels.mhc.reference import hc_head, hc_weights
from dsv4.kernels.quant import fake_quant_fp8
from dsv4.kernels.rope import rotate, rotation
from dsv4.model.rope import inverse_frequencies

from .restatement import hadamard_matrix

FLASH = ModelConfig.preset("flash")

PRE = (0.2058714, 0.6681888, 0.4255585, 0.5866186)
POST = (1.3969304, 0.7457045, 1.3627075, 0.7086874)
COMB = (
    (0.1380227, 0.5629032, 0.1610502, 0.1380229),
    (0.3082052, 0.0239623, 0.3596264, 0.3082051),
    (0.0925065, 0.3772713, 0.4377145, 0.0925067),
    (0.4612646, 0.0358621, 0.0416079, 0.4612643),
)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 6e-8), (torch.float32, 4e-7)])
def test_mhc_weights_are_the_golden_ones(dtype: torch.dtype, tolerance: float) -> None:
    i = torch.arange(24)
    mix = (0.3 * ((7 * i % 11) - 5)).to(dtype)[None].repeat(3, 1)
    base = (0.2 * ((5 * i % 7) - 3)).to(dtype)
    scale = torch.tensor((0.5, 0.8, 1.2), dtype=dtype)
    for got, want in zip(hc_weights(mix, scale, base, FLASH), (PRE, POST, COMB), strict=True):
        apart = got.double() - torch.tensor(want, dtype=torch.float64)
        assert apart.abs().max() < tolerance
        assert got.dtype == dtype


def test_mhc_sums_are_one_less_eps() -> None:
    """The last step is a column normalization with eps in the denominator; row sums have converged to the same."""
    mix = torch.randn(5, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, zero = torch.ones(3, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)
    _, _, comb = hc_weights(mix, one, zero, FLASH)
    assert (comb.sum(1) - (1 - FLASH.hc_eps)).abs().max() < 1e-11
    assert (comb.sum(2) - (1 - FLASH.hc_eps)).abs().max() < 1e-3


def test_mhc_head_weights_are_not_normalized() -> None:
    """fn 0 and base 0: each stream weighs sigmoid(0) + eps, so four equal streams come out doubled."""
    config = ModelConfig.preset("nano")
    streams = torch.randn(3, 1, config.hidden_size).expand(-1, 4, -1)
    fn, base = torch.zeros(4, 4 * config.hidden_size), torch.zeros(4)
    out = hc_head(streams, fn, torch.ones(1), base, config)
    assert torch.allclose(out, 4 * (0.5 + config.hc_eps) * streams[:, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("pair", "speed"),
    [
        (0, 1.0),
        (1, 0.687656022),
        (8, 0.05),
        (15, 0.00363553858),
        (16, 0.002265625),
        (20, 2.96977778e-4),
        (24, 1.953125e-5),
        (25, 5.37231267e-6),
        (31, 5.68052904e-7),
    ],
)
def test_yarn_frequencies_are_the_golden_ones(pair: int, speed: float) -> None:
    frequencies = inverse_frequencies(FLASH, compressed=True)
    assert frequencies.shape == (32,) and frequencies.dtype == torch.float32
    assert float(frequencies[pair]) == pytest.approx(speed, rel=2e-7)


def test_frequencies_without_yarn_are_powers_of_theta() -> None:
    want = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    assert np.allclose(inverse_frequencies(FLASH, compressed=False).double().numpy(), want, rtol=1e-7)


def test_rotation_turns_trailing_pairs_and_does_not_scale() -> None:
    """Against complex numbers in float64 from the fp32 angle; the first channels keep their bits."""
    frequencies = inverse_frequencies(FLASH, compressed=True)
    positions = torch.tensor([0, 1, 1000, 1048575])
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    y = rotate(x, *rotation(frequencies, positions))
    assert torch.equal(y[:, :448], x[:, :448])
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-6)
    angle = (positions.float()[:, None] * frequencies).double()
    want = torch.view_as_complex(x[:, 448:].double().view(4, 32, 2)) * torch.polar(torch.ones_like(angle), angle)
    assert torch.allclose(y[:, 448:].double(), torch.view_as_real(want).flatten(1), atol=1e-6)


def test_fake_quantization_gives_its_documented_example() -> None:
    x = torch.tensor([0.3, -1.7, 5.0, 100.0])
    for block in (4, 64, 128):
        assert fake_quant_fp8(x, block).tolist() == [0.3125, -1.75, 5.0, 96.0]


@pytest.mark.parametrize("n", [1, 2, 32, 128])
def test_hadamard_is_sylvesters_matrix_and_its_own_inverse(n: int) -> None:
    """Sylvester's matrix over sqrt(n): orthogonal, symmetric, its own inverse."""
    matrix = hadamard(torch.eye(n))
    assert np.abs(matrix.double().numpy() - hadamard_matrix(n)).max() < 1e-7
    assert torch.allclose(matrix @ matrix.mT, torch.eye(n), atol=1e-6)
    x = torch.randn(3, 5, n, generator=torch.Generator().manual_seed(n))
    assert torch.allclose(hadamard(hadamard(x)), x, atol=1e-6)
    assert torch.allclose((hadamard(x) * hadamard(x)).sum(-1), (x * x).sum(-1), rtol=1e-5)


def test_hadamard_refuses_other_sizes() -> None:
    with pytest.raises(AssertionError, match="Hadamard size 48 is not a power of two"):
        hadamard(torch.zeros(2, 48))
