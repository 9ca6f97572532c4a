"""Choice of the kernels: the variables that force it, the line that reports it, and installs that cannot build them."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from dsv4.cli import main
from dsv4.kernels import backends, cpu

ROOT = Path(__file__).parents[2]
# A stand-in for dsv4._native on a machine that runs two instruction sets.
FAKE = """
import sys, types
fake = types.ModuleType("dsv4._native")
state = {"isa": None, "threads": None}
fake.isas = lambda: ["portable", "avx2"]
fake.select = lambda isa: state.update(isa=isa)
fake.set_threads = lambda n: state.update(threads=n)
fake.threads = lambda: state["threads"]
sys.modules["dsv4._native"] = fake
"""
# No module, and no reason recorded by the install that these tests run in.
MISSING = f"""
import sys, dsv4
dsv4.__path__[:] = [{str(ROOT / "dsv4")!r}]
sys.modules["dsv4._native"] = None
"""
BROKEN = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "dsv4._native":
            raise ImportError("wrong ELF class")
sys.meta_path.insert(0, Finder())
"""
DESCRIBE = "from dsv4.kernels import backends, cpu; print(backends.name(), '|', backends.describe())\n"


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python process with these DSV4_ variables and no others."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DSV4_")} | variables
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def printed(code: str, **variables: str) -> str:
    done = run(code, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_best_instruction_set_and_torchs_threads() -> None:
    code = (
        FAKE + "import torch; torch.set_num_threads(3)\n" + DESCRIBE + "print(backends.native_module() is fake, state)"
    )
    assert printed(code).splitlines() == [
        "native | kernels: native (avx2, 3 threads)",
        "True {'isa': 'avx2', 'threads': 3}",
    ]


def test_the_variables_choose() -> None:
    assert printed(FAKE + DESCRIBE, DSV4_ISA="portable", DSV4_THREADS="1", DSV4_KERNELS="native") == (
        "native | kernels: native (portable, 1 thread)"
    )
    assert printed(FAKE + DESCRIBE, DSV4_KERNELS="reference") == (
        "reference | kernels: reference, because DSV4_KERNELS=reference"
    )
    assert "(avx2, " in printed(FAKE + DESCRIBE, DSV4_ISA="", DSV4_THREADS="", DSV4_KERNELS="")


def test_threads_follow_torch_unless_the_variable_is_set() -> None:
    code = (
        FAKE
        + (
            "import torch; torch.set_num_threads(3)\n" + DESCRIBE + "fake.set_threads(0); cpu.follow_torch_threads()\n"
            "print(state['threads'])\n"  # torch's count is unchanged: nothing to set
            "torch.set_num_threads(2); cpu.follow_torch_threads(); print(state['threads'])"
        )
    )
    assert printed(code).splitlines()[1:] == ["0", "2"]
    assert printed(code, DSV4_THREADS="5").splitlines()[1:] == ["0", "0"]


def test_more_threads_than_the_kernels_take_are_not_followed() -> None:
    code = FAKE + "import torch; torch.get_num_threads = lambda: 2000\n" + DESCRIBE
    assert printed(code) == "native | kernels: native (avx2, 1024 threads)"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("DSV4_KERNELS", "fast", "DSV4_KERNELS is 'fast'; allowed: native, reference"),
        ("DSV4_ISA", "sse", "DSV4_ISA is 'sse'; allowed: portable, avx2, avx512, avx512_vnni, avx512_bf16, amx"),
        ("DSV4_ISA", "avx512", "DSV4_ISA is avx512, which this machine cannot run; it can: portable, avx2"),
        ("DSV4_THREADS", "0", "DSV4_THREADS is '0'; allowed: 1 to 1024"),
        ("DSV4_THREADS", "-1", "DSV4_THREADS is '-1'; allowed: 1 to 1024"),
        ("DSV4_THREADS", "two", "DSV4_THREADS is 'two'; allowed: 1 to 1024"),
        ("DSV4_THREADS", "1025", "DSV4_THREADS is '1025'; allowed: 1 to 1024"),
        ("DSV4_THREADS", "9" * 5000, f"DSV4_THREADS is '{'9' * 5000}'; allowed: 1 to 1024"),
    ],
)
def test_an_invalid_value_is_an_error(variable: str, value: str, message: str) -> None:
    code = FAKE + (
        "from dsv4.kernels import backends\n"
        "for _ in range(2):\n"  # a failed choice is not cached
        "    try: backends.native_module()\n"
        "    except RuntimeError as error: print(error)\n"
    )
    assert printed(code, **{variable: value}).splitlines() == [message, message]


def test_forcing_native_kernels_that_are_missing_is_an_error() -> None:
    done = run(MISSING + DESCRIBE, DSV4_KERNELS="native")
    assert done.returncode == 1
    assert "KernelChoiceError: DSV4_KERNELS is native, but the native kernels are missing: dsv4._native" in done.stderr


def test_a_missing_module_is_logged_once_and_the_reference_runs() -> None:
    done = run(MISSING + DESCRIBE + "backends.native_module(); backends.describe()")
    line = "kernels: reference, because dsv4._native is not installed; pip install builds it, in a checkout make setup"
    assert (done.stdout, done.stderr) == (f"reference | {line}\n", f"{line}\n")


def test_a_module_that_does_not_load_is_reported() -> None:
    line = printed(BROKEN + DESCRIBE)
    assert line == "reference | kernels: reference, because dsv4._native cannot be loaded: wrong ELF class"


def test_the_reason_recorded_by_the_install_is_reported(tmp_path: Path) -> None:
    (tmp_path / "_native_reason.txt").write_text("the C++ build failed: x.cpp:1:1: error: no\n")
    code = MISSING + f"dsv4.__path__.insert(0, {str(tmp_path)!r})\n" + DESCRIBE
    assert printed(code) == "reference | kernels: reference, because the C++ build failed: x.cpp:1:1: error: no"


def test_generate_says_why_the_reference_runs_and_nothing_else() -> None:
    code = "from dsv4.cli import main; main(['generate', '1, 2,', '--max-tokens', '1', '--temperature', '0'])"
    done = run(MISSING + code)
    assert done.stderr.startswith("kernels: reference, because dsv4._native is not installed")
    assert len(done.stderr.splitlines()) == 1 and "kernels" not in done.stdout
    assert run(MISSING + code, DSV4_KERNELS="reference").stderr == (
        "kernels: reference, because DSV4_KERNELS=reference\n"
    )


def test_a_wrong_variable_is_one_line_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "_choice", None)
    monkeypatch.setenv("DSV4_KERNELS", "fast")
    assert main(["generate", "x"]) == 2
    assert capsys.readouterr().err == ("dsv4 generate: error: DSV4_KERNELS is 'fast'; allowed: native, reference\n")


def test_describing_the_reference_does_not_load_torch() -> None:
    code = "import sys; from dsv4.kernels import backends; backends.describe(); print('torch' in sys.modules)"
    assert printed(MISSING + code) == "False"


def test_every_operation_has_its_three_files_and_its_line_in_the_table() -> None:
    folders = {p.parent.name for p in (ROOT / "dsv4" / "kernels").glob("*/__init__.py")}
    assert folders == set(backends.NATIVE)
    for name in folders:
        assert {"reference.py", "native.py"} <= {p.name for p in (ROOT / "dsv4" / "kernels" / name).iterdir()}, name


@pytest.mark.parametrize(
    ("operation", "name"), [(operation, name) for operation, rung in backends.NATIVE.items() for name in rung.isas]
)
def test_the_rule_for_running_natively(operation: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native kernels run unless DSV4_KERNELS is "reference"; a recorded gradient needs a backward."""
    rung, dtype = backends.NATIVE[operation], getattr(torch, name)
    isas = rung.isas[name]
    plain, recorded = torch.ones(2, dtype=dtype), torch.ones(2, dtype=dtype, requires_grad=True)
    module = types.ModuleType("native")
    isa = (isas or ("avx2",))[0]
    monkeypatch.setattr(module, "selected", lambda: isa, raising=False)
    native = cpu.Native(module, isa, False)
    for choice, uses in (
        (backends._Choice(None, reason="DSV4_KERNELS=reference"), False),
        (backends._Choice(native), True),
        (backends._Choice(native, requested=True), True),
    ):
        monkeypatch.setattr(backends, "_choice", choice)
        assert backends.uses_native(operation, plain, None) == uses
        assert backends.uses_native(operation, plain, recorded) == (uses and rung.backward)
        with torch.no_grad():
            assert backends.uses_native(operation, recorded) == uses
        assert not backends.uses_native(operation, plain.double())
        assert not backends.uses_native(operation, plain.to("meta"))
        with monkeypatch.context() as other:
            other.setattr(module, "selected", lambda: "portable")
            assert backends.uses_native(operation, plain) == (uses and isas is None)


def install(folder: Path, **variables: str) -> Path:
    """A copy of the project, installed from its folder into a fresh environment -> that environment's Python."""
    python = folder / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    # Dependencies come from the current environment, after the fresh environment's own packages.
    here = [path for path in sys.path if path.endswith("site-packages")]
    (next((folder / "venv" / "lib").glob("*/site-packages")) / "zz_here.pth").write_text("\n".join(here))
    done = subprocess.run(
        [python, "-m", "pip", "install", "--no-deps", "--force-reinstall", folder / "project"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return python


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("dsv4", "models", "native"):
        shutil.copytree(ROOT / name, tmp_path / "project" / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / "project")
    return tmp_path / "project"


def described(python: Path) -> str:
    code = "import dsv4.config as c; assert 'site-packages' in str(c.nano_path())\n" + DESCRIBE
    done = subprocess.run([python, "-c", code], cwd=python.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_an_install_without_a_compiler_works_and_says_so(project: Path) -> None:
    python = install(project.parent, CXX="/nonexistent/c++")
    assert described(python) == (
        "reference | kernels: reference, because no working C++ compiler was found when dsv4 was installed"
    )
    done = subprocess.run(
        [python, "-m", "dsv4", "generate", "1, 2, 3,", "--max-tokens", "4"],
        cwd=project.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.slow
def test_an_install_with_broken_cpp_works_and_says_where(project: Path) -> None:
    with (project / "native" / "python" / "module.cpp").open("a") as file:
        file.write("\nint broken = ;\n")
    line = described(install(project.parent))
    assert line.startswith("reference | kernels: reference, because the C++ build failed: native/python/module.cpp:")
    assert ": error: " in line
