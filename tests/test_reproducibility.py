"""Guarantees of importing the package, and of running under tests, about rounding and uninitialized memory."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
READ = "import dsv4, os; print(os.environ.get('MKL_CBWR'))"


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="MKL is the x86 Linux BLAS")
def test_import_asks_mkl_for_row_independent_rounding_and_respects_the_user() -> None:
    free = {key: value for key, value in os.environ.items() if key != "MKL_CBWR"}
    cpu = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    # On AMD, MKL would accept the setting and not honor it.
    asked = ("AVX512,STRICT", "AVX2,STRICT") if "GenuineIntel" in cpu else ("None",)
    for given, expected in ((free, asked), ({**free, "MKL_CBWR": "AUTO"}, ("AUTO",))):
        found = subprocess.run([sys.executable, "-c", READ], env=given, capture_output=True, text=True, check=True)
        assert found.stdout.strip() in expected


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP is Linux's")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
        ({"DSV4_KERNELS": "reference"}, "None"),
    ],
)
def test_openmps_threads_give_way_to_the_native_ones(given: dict[str, str], expected: str) -> None:
    asked = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "DSV4_KERNELS")
    free = {key: value for key, value in os.environ.items() if key not in asked}
    code = "import dsv4, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    found = subprocess.run([sys.executable, "-c", code], env=free | given, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP is Linux's")
def test_openmps_threads_stay_as_they_are_without_native_kernels(tmp_path: Path) -> None:
    (tmp_path / "dsv4").mkdir()
    for name in ("__init__.py", "lazy.py"):
        shutil.copyfile(ROOT / "dsv4" / name, tmp_path / "dsv4" / name)
    asked = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "DSV4_KERNELS")
    free = {key: value for key, value in os.environ.items() if key not in asked}
    command = [sys.executable, "-S", "-c", "import dsv4, os; print(os.environ.get('GOMP_SPINCOUNT'))"]
    for expected in ("None", "1000"):
        found = subprocess.run(command, cwd=tmp_path, env=free, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == expected
        (tmp_path / "dsv4" / "_native.py").touch()


def test_uninitialized_tensors_are_poisoned_for_the_package_only() -> None:
    ours: dict[str, object] = {"__name__": "dsv4.probe", "torch": torch}
    exec("x = torch.empty(3); i = torch.empty_like(torch.zeros(3, dtype=torch.int64)); n = x.new_empty(2)", ours)
    floats, indices, new = ours["x"], ours["i"], ours["n"]
    assert isinstance(floats, torch.Tensor) and isinstance(indices, torch.Tensor) and isinstance(new, torch.Tensor)
    assert floats.isnan().all() and new.isnan().all() and (indices < -1_000_000).all()
    exec("m = torch.empty(3, device='meta')", ours)
    theirs: dict[str, object] = {"__name__": "elsewhere", "torch": torch}
    exec("torch.full((64,), 2.0); x = torch.empty(64)", theirs)
    assert isinstance(theirs["x"], torch.Tensor) and not theirs["x"].isnan().all()
