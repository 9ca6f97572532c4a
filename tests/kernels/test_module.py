"""The native module: its settings, its threads and its checks; operations without a folder in dsv4/kernels."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from .conftest import MODULE
from .tools import noise, poisoned

pytestmark = pytest.mark.skipif(MODULE is None, reason="the native kernels are not built")


def test_exp(kernels: Any) -> None:
    x = torch.cat((torch.linspace(-86.6, 88.7, 9999), torch.tensor([0.0, -0.0, -88.0, -1e30, float("-inf")])))
    y = poisoned(len(x))
    kernels.exp(x, y)
    want = x.double().exp()
    assert ((y - want).abs() / want.clamp(min=1e-37))[:9999].max() < 2.0**-22
    assert y[9999:].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_settings_are_checked(kernels: Any) -> None:
    for count in (0, -1, 100_000):
        with pytest.raises(ValueError, match=f"threads {count}: allowed are 1 to 1024"):
            kernels.set_threads(count)
    with pytest.raises(ValueError, match="instruction set sse9 does not run on this machine"):
        kernels.select("sse9")


def test_outputs_are_never_copied(kernels: Any) -> None:
    for y in (poisoned(2, 4).double(), poisoned(4, 2).t()):
        with pytest.raises(TypeError, match="incompatible"):
            kernels.linear(noise(2, 3), noise(4, 3), y)


def test_single_operations_refuse_invalid_arguments(kernels: Any) -> None:
    for call, message in (
        (lambda: kernels.hadamard(noise(2, 12)), "12 channels; allowed are powers of two"),
        (lambda: kernels.hadamard(noise(8)), "x has 1 dimensions, expected 2"),
        (lambda: kernels.sinkhorn(noise(2, 3, 4), 5, 1e-6), "c: shape [2, 3, 4], expected [2, 3, 3]"),
        (lambda: kernels.sinkhorn(noise(1, 65, 65), 5, 1e-6), "65 streams; allowed are at most 64"),
        (lambda: kernels.fake_quant(noise(2, 8), 0, False), "block 0: allowed are 1 or more"),
        (lambda: kernels.rms_norm(noise(2, 8), noise(8, 2)[:, 0], 1e-6, poisoned(2, 8)), "weight must be contiguous"),
        (lambda: kernels.top_k(noise(2, 8), 9, torch.zeros(2, 9, dtype=torch.int64)), "k 9: allowed are 1 to 8"),
        (lambda: kernels.linear(noise(8), noise(4, 8), poisoned(1, 4)), "x has 1 dimensions, expected 2"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)
    for call in (
        lambda: kernels.hadamard(noise(2, 8).double()),
        lambda: kernels.exp(noise(8), poisoned(8).double()),
        lambda: kernels.fake_quant(noise(8, 2).t(), 8, False),
    ):
        with pytest.raises(TypeError, match="incompatible"):
            call()


def test_subnormal_numbers_are_kept_on_every_calling_thread(kernels: Any) -> None:
    """Torch can make a thread flush subnormals to zero; the kernels' other threads would keep them."""
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


def test_rounds_with_more_and_fewer_tasks_follow_one_another(kernels: Any) -> None:
    """Thousands of rounds, on more threads than processors: each task runs once, in its own round."""
    kernels.set_threads(4)
    x = noise(1, 32)
    shapes = [noise(outputs, 32, seed=outputs) for outputs in (33, 400, 64, 129, 1000)]
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


NO_MORE_READERS = """
import os, resource
import numpy as np
from dsv4 import _native
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20), resource.RLIM_INFINITY))
with open("/dev/zero") as file:
    before = len(os.listdir("/proc/self/fd"))
    for limit in (None, resource.RLIM_INFINITY):
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            _native.ExpertResidency(1 << 20, 1, 1, np.empty((0, 6), np.int64), [file.fileno()], file)
            print("made")
        except RuntimeError as error:
            print("error:", error)
    print(len(os.listdir("/proc/self/fd")) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory as Linux does")
def test_threads_that_an_expert_residency_cannot_have_are_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", NO_MORE_READERS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith("error: Resource temporarily unavailable") and rest == ["made", "0"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory as Linux does")
def test_threads_refused_by_the_system_are_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", NO_MORE_THREADS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("error: Resource temporarily unavailable") and second == "10240.0"
