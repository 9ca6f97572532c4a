"""Native kernels against the reference, on every instruction set that this machine has, outputs poisoned with NaN."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.hadamard.reference import hadamard
from dsv4.kernels.quant.reference import fake_quant_fp4, fake_quant_fp8
from dsv4.kernels.sinkhorn.reference import sinkhorn
from dsv4.kernels.topk.reference import top_k_lowest_index

MODULE = backends.native_module()
pytestmark = pytest.mark.skipif(MODULE is None, reason="the native kernels are not built")
SHAPES = [
    (1, 512, 1024),
    (1, 40, 17),
    (2, 33, 50),
    (5, 257, 16),
    (6, 300, 15),
    (7, 64, 97),
    (13, 31, 160),
    (97, 520, 130),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"))


def layouts(weight: Tensor) -> list[Tensor]:
    """The same weight alone, and as a slice of something larger."""
    wide = torch.cat((weight, weight), dim=1)[:, : weight.shape[1]]
    return [weight, wide]


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_linear(kernels: Any, rows: int, inputs: int, outputs: int) -> None:
    x, weight = random(rows, inputs), random(outputs, inputs, seed=1)
    want = x.double() @ weight.double().t()
    bits: Tensor | None = None
    for layout in layouts(weight):
        for threads in (1, 2, 3):
            kernels.set_threads(threads)
            y = poisoned(rows, outputs)
            kernels.linear(x, layout, y)
            assert (y - want).abs().max() < 2e-6 * inputs**0.5 * want.abs().max()
            assert bits is None or torch.equal(y, bits), "layout and threads change no bit"
            bits = y
    assert bits is not None
    for row in range(0, rows, max(1, rows // 5)):
        alone = poisoned(1, outputs)
        kernels.linear(x[row : row + 1], weight, alone)
        assert torch.equal(alone[0], bits[row]), "nor do the other rows"


@pytest.mark.parametrize("inputs", [1, 30, 64, 333])
def test_linear_adds_in_the_documented_order(kernels: Any, inputs: int) -> None:
    """Eight sums, joined in pairs. Products of BF16 numbers are exact in fp32, so that only the additions round."""
    x, weight = random(5, inputs).bfloat16().float(), random(35, inputs, seed=1).bfloat16().float()
    products = x[:, None] * weight
    sums = [torch.zeros(5, 35) for _ in range(8)]
    for k in range(inputs):
        sums[4 * (k % 2) + k // 4 % 4] += products[..., k]
    want = ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]))
    got = poisoned(5, 35)
    kernels.linear(x, weight, got)
    assert torch.equal(got, want)


def test_linear_skips_no_row_and_touches_no_neighbour(kernels: Any) -> None:
    x, weight = random(9, 70), random(21, 70, seed=1)
    frame = poisoned(11, 21)
    kernels.linear(x, weight, frame[1:10])
    assert frame[1:10].isfinite().all() and frame[0].isnan().all() and frame[10].isnan().all()


def test_linear_refuses_wrong_shapes(kernels: Any) -> None:
    with pytest.raises(ValueError, match=r"y: shape \[2, 5\], expected \[2, 4\]"):
        kernels.linear(random(2, 3), random(4, 3), poisoned(2, 5))
    with pytest.raises(ValueError, match=r"x: shape \[2, 3\], expected \[2, 7\]"):
        kernels.linear(random(2, 3), random(4, 7), poisoned(2, 4))


@pytest.mark.parametrize("width", [1, 7, 16, 63, 64, 65, 200, 512])
def test_rms_norm(kernels: Any, width: int) -> None:
    x, weight = random(5, width), random(width, seed=1)
    for w in (weight, None):
        y = poisoned(5, width)
        kernels.rms_norm(x, w, 1e-6, y)
        assert torch.allclose(y, torch.rms_norm(x, (width,), w, 1e-6), rtol=2e-6, atol=1e-7)


def test_exp(kernels: Any) -> None:
    x = torch.cat((torch.linspace(-86.6, 88.7, 9999), torch.tensor([0.0, -0.0, -88.0, -1e30, float("-inf")])))
    y = poisoned(len(x))
    kernels.exp(x, y)
    want = x.double().exp()
    assert ((y - want).abs() / want.clamp(min=1e-37))[:9999].max() < 2.0**-22
    assert y[9999:].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("streams", [2, 3, 4, 5])
def test_sinkhorn(kernels: Any, streams: int) -> None:
    logits = 3 * random(50, streams, streams)
    got = logits.clone()
    kernels.sinkhorn(got, 20, 1e-6)
    assert torch.allclose(got, sinkhorn(logits, 20, 1e-6), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("width", [1, 31, 64, 100, 128, 129, 300])
def test_rounding_to_fp8_and_fp4(kernels: Any, width: int) -> None:
    scales = torch.tensor([1e-6, 1e-3, 1.0, 448.0, 1e6]).unsqueeze(1)
    x = random(5, width) * scales
    x[2, 0] = 0.0
    for block, fp4 in ((64, False), (128, False), (32, True)):
        got = x.clone()
        kernels.fake_quant(got, block, fp4)
        want = fake_quant_fp4(x, block) if fp4 else fake_quant_fp8(x, block)
        assert torch.equal(got, want)


def test_every_fp8_and_fp4_rounding_boundary(kernels: Any) -> None:
    """All e4m3 values, the ties between neighbours, what lies beside the ties; a block's scale is 1 with 448 in it."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].unique()
    ties = (codes[1:] + codes[:-1]) / 2
    values = torch.cat((codes, ties, ties.nextafter(torch.tensor(1e9)), ties.nextafter(torch.tensor(-1e9))))
    x = torch.cat((values, torch.tensor([448.0]))).unsqueeze(0)
    got = x.clone()
    kernels.fake_quant(got, x.shape[1], False)
    assert torch.equal(got, fake_quant_fp8(x, x.shape[1]))
    assert torch.equal(got[0, : len(codes)], codes)


@pytest.mark.parametrize("width", [1, 2, 32, 64, 128])
def test_hadamard(kernels: Any, width: int) -> None:
    x = random(3, width)
    got = x.clone()
    kernels.hadamard(got)
    assert torch.allclose(got, hadamard(x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("width", "k"), [(1, 1), (7, 7), (20, 3), (300, 64), (1023, 16), (1024, 1024), (5000, 64)])
def test_top_k(kernels: Any, width: int, k: int) -> None:
    scores = (random(30, width) * 4).round() / 4  # many ties, signed zeros among them
    index = torch.full((30, k), -9, dtype=torch.int64)
    kernels.top_k(scores, k, index)
    assert torch.equal(index, top_k_lowest_index(scores, k))


def test_settings_are_checked(kernels: Any) -> None:
    for count in (0, -1, 100_000):
        with pytest.raises(ValueError, match=f"threads {count}: allowed are 1 to 1024"):
            kernels.set_threads(count)
    with pytest.raises(ValueError, match="instruction set sse9 does not run on this machine"):
        kernels.select("sse9")


def test_what_is_written_to_is_never_a_copy(kernels: Any) -> None:
    for y in (poisoned(2, 4).double(), poisoned(4, 2).t()):
        with pytest.raises(TypeError, match="incompatible"):
            kernels.linear(random(2, 3), random(4, 3), y)


def test_no_rows(kernels: Any) -> None:
    kernels.rms_norm(random(0, 8), None, 1e-6, poisoned(0, 8))
    kernels.linear(random(0, 8), random(4, 8), poisoned(0, 4))


def test_single_operations_refuse_what_they_cannot_take(kernels: Any) -> None:
    for call, message in (
        (lambda: kernels.hadamard(random(2, 12)), "12 channels; allowed are powers of two"),
        (lambda: kernels.hadamard(random(8)), "x has 1 dimensions, expected 2"),
        (lambda: kernels.sinkhorn(random(2, 3, 4), 5, 1e-6), "c: shape [2, 3, 4], expected [2, 3, 3]"),
        (lambda: kernels.sinkhorn(random(1, 65, 65), 5, 1e-6), "65 streams; allowed are at most 64"),
        (lambda: kernels.fake_quant(random(2, 8), 0, False), "block 0: allowed are 1 or more"),
        (lambda: kernels.rms_norm(random(2, 8), random(8, 2)[:, 0], 1e-6, poisoned(2, 8)), "weight must be contiguous"),
        (lambda: kernels.top_k(random(2, 8), 9, torch.zeros(2, 9, dtype=torch.int64)), "k 9: allowed are 1 to 8"),
        (lambda: kernels.linear(random(8), random(4, 8), poisoned(1, 4)), "x has 1 dimensions, expected 2"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)
    for call in (
        lambda: kernels.hadamard(random(2, 8).double()),
        lambda: kernels.exp(random(8), poisoned(8).double()),
        lambda: kernels.fake_quant(random(8, 2).t(), 8, False),
    ):
        with pytest.raises(TypeError, match="incompatible"):
            call()


def test_subnormal_numbers_count_whoever_calls(kernels: Any) -> None:
    """Torch can have a thread take them for zero; the kernels' other threads would not."""
    x, weight = torch.full((40, 32), 2.0**-130), torch.full((300, 32), 0.5)
    want = torch.full((40, 300), 2.0**-126)
    assert torch.set_flush_denormal(True)
    try:
        for threads in (1, 2):
            kernels.set_threads(threads)
            got = poisoned(40, 300)
            kernels.linear(x, weight, got)
            kernels.linear(x[:1], weight, got[:1])
            assert torch.equal(got, want)
    finally:
        torch.set_flush_denormal(False)


def test_rounds_of_more_and_of_fewer_tasks_follow_one_another(kernels: Any) -> None:
    """Thousands, on more threads than there are processors: each task runs once, in its own round."""
    kernels.set_threads(4)
    x = random(1, 32)
    shapes = [random(outputs, 32, seed=outputs) for outputs in (33, 400, 64, 129, 1000)]
    wants = [poisoned(1, len(weight)) for weight in shapes]
    for weight, want in zip(shapes, wants, strict=True):
        kernels.linear(x, weight, want)
    for turn in range(4000):
        got = poisoned(1, len(shapes[turn % 5]))
        kernels.linear(x, shapes[turn % 5], got)
        assert torch.equal(got, wants[turn % 5])


NO_MORE_THREADS = """
import resource
import torch
from dsv4 import _native
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
x, weight, y = torch.ones(2, 8), torch.ones(640, 8), torch.empty(2, 640)
for threads in (1000, 2):
    _native.set_threads(threads)
    try:
        _native.linear(x, weight, y)
        print(float(y.sum()))
    except RuntimeError as error:
        print("error:", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory as Linux does")
def test_threads_that_the_system_refuses_are_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", NO_MORE_THREADS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("error: Resource temporarily unavailable") and second == "10240.0"
