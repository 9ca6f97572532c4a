"""The package's shape: imports point up one list, modules stay readable, importing it is cheap."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dsv4"

# A module may import from its own entry and from earlier ones.
ORDER = (
    *("config", "analysis", "usage", "kernels", "cache", "model", "checkpoint", "tokenizer", "engine", "conversation"),
    *("server", "data", "parallel", "training", "post_training", "evals", "migration", "commands", "cli"),
)
# Modules beside config.py that count as part of it, and the entry point, which counts as the command line.
ALIASES = {
    **dict.fromkeys(
        (
            *("checks", "config_json", "config_keys", "hub", "lazy", "model_folder", "notices", "options", "presets"),
            *("prefix_digests", "safetensors_headers", "text", "tools"),
        ),
        "config",
    ),
    "__main__": "cli",
}
MAX_LINES = 400
LONGER: dict[str, str] = {}  # module -> reason for its length
NAMELESS = {"utils.py", "helpers.py", "misc.py", "common.py"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every import in a module, including those in functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def entry(name: str) -> str | None:
    """ORDER entry of a full module name; None for other packages and for dsv4 itself."""
    parts = name.split(".")
    if parts[0] != "dsv4" or len(parts) == 1:
        return None
    return ALIASES.get(parts[1], parts[1])


def upward_imports(source: str, module: str) -> list[str]:
    own = entry(module)
    found: list[str] = []
    for line, name in imported(ast.parse(source), module):
        target = entry(name)
        if own is None or target is None or target == "__version__":
            continue
        if target not in ORDER:
            found.append(f"{module}:{line} imports {name}, which has no place in ORDER")
        elif ORDER.index(target) > ORDER.index(own):
            found.append(f"{module}:{line} imports {name}: {own} may not import {target}")
    return found


def test_imports_point_up_the_list() -> None:
    wrong: list[str] = []
    for path in modules():
        # A package keeps its __init__ part, so that relative imports count levels as in any module.
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if module == "dsv4.__init__":
            continue  # the lazy public names, from every layer
        assert entry(module) in ORDER, f"{module} has no place in ORDER"
        wrong += upward_imports(path.read_text(encoding="utf-8"), module)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "module", "ok"),
    [
        ("from dsv4.engine import LLM", "dsv4.model.core", False),
        ("def f():\n    import dsv4.server.app", "dsv4.engine.llm", False),
        ("from ..training import loop", "dsv4.model.core", False),
        ("from dsv4.config import ModelConfig\nimport torch", "dsv4.model.core", True),
        ("from . import norm\nfrom .norm import RMSNorm", "dsv4.model.core", True),
        ("import dsv4.helpers", "dsv4.cli", False),
    ],
)
def test_an_upward_import_is_found(source: str, module: str, ok: bool) -> None:
    assert (upward_imports(source, module) == []) == ok


def test_no_module_imports_itself_through_others() -> None:
    """TYPE_CHECKING imports count: a module stands above the modules whose types it names."""
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in modules()
    }
    uses = {name: set[str]() for name in names}
    for name, path in names.items():
        package = name + ".__init__" if path.name == "__init__.py" else name
        for _, target in imported(ast.parse(path.read_text(encoding="utf-8")), package):
            module = target if target in names else target.rpartition(".")[0]
            # A package that re-exports a module's names stands beside it, as config.py's parts stand beside config.py.
            if (
                module in names
                and not name.startswith(module + ".")
                and ALIASES.get(module.split(".")[1]) != entry(name)
            ):
                uses[name].add(module)
    del uses["dsv4"]  # the lazy public names, from every layer
    try:
        tuple(graphlib.TopologicalSorter({name: found - {"dsv4"} for name, found in uses.items()}).static_order())
    except graphlib.CycleError as error:
        raise AssertionError("import circle: " + " <- ".join(error.args[1])) from None


def floors(package: str) -> dict[str, int]:
    """Modules of a folder -> length of the longest chain of imports within the folder that ends at the module."""
    paths = {path.stem: path for path in (PACKAGE / package).glob("*.py") if path.stem != "__init__"}
    below: dict[str, set[str]] = {}
    for name, path in paths.items():
        found = (full.split(".") for _, full in imported(ast.parse(path.read_text(encoding="utf-8")), name))
        below[name] = {parts[2] for parts in found if parts[:2] == ["dsv4", package] and len(parts) > 2} & {*paths}
    order = graphlib.TopologicalSorter(below).static_order()
    known: dict[str, int] = {}
    for name in order:
        known[name] = 1 + max((known[other] for other in below[name]), default=0)
    return known


def test_the_engine_has_at_most_seven_floors() -> None:
    heights = floors("engine")
    assert heights["config"] == 1 and heights["llm"] > heights["core"] > heights["request"]
    assert max(heights.values()) <= 7, sorted(heights.items(), key=lambda item: item[1])


def test_no_module_is_too_long_or_nameless() -> None:
    for path in modules():
        name = str(path.relative_to(ROOT))
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_LINES or name in LONGER, f"{name} has {lines} lines; split it, or say why in LONGER"
        assert path.name not in NAMELESS, f"{name}: name a module for its job"
    for name in LONGER:
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) > MAX_LINES, f"{name} needs no exception"


def test_importing_the_package_does_not_load_torch() -> None:
    code = "import sys, dsv4, dsv4.cli; dsv4.ModelConfig; dir(dsv4); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_public_name_resolves() -> None:
    code = "import dsv4; [getattr(dsv4, name) for name in dsv4.__all__]; dsv4.post_training.reverse_kl"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_public_name_lists_the_known() -> None:
    import dsv4

    with pytest.raises(AttributeError, match="no attribute 'LLMs'; public names: AsyncEngine, CheckpointError, LLM"):
        dsv4.LLMs  # noqa: B018
