"""Names in docs/ exist: files, functions, links, tensors, formats, error statuses; the commands there parse."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dsv4.analysis.inventory import tensor_inventory
from dsv4.checkpoint import FORMATS
from dsv4.cli import build_parser
from dsv4.commands.recipe_flags import parse
from dsv4.config import ModelConfig
from dsv4.server import errors

from .readme_commands import arguments, blocks, commands

ROOT = Path(__file__).parents[1]
# The log describes the past; all other pages describe the present.
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md") if path.name != "LOG.md"}
# A file below dsv4/ or the root, and a name in it: `model/rope.py:inverse_frequencies`, `dsv4/cli.py`.
NAMED = re.compile(r"(?<![\w./-])((?:[\w-]+/)+[\w-]+\.(?:py|md|json|txt|h|cpp))(?::([A-Za-z_]\w*(?:\.\w+)*))?")
COMMANDS = [(page, command) for page, text in PAGES.items() for command in commands(text)]


def find(path: str) -> Path | None:
    return next((full for full in (ROOT / path, ROOT / "dsv4" / path) if full.exists()), None)


def names(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """Names defined by statements: functions, classes with their members, constants; no imported names."""
    found: set[str] = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.add(prefix + node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {prefix + node.name, *names(node.body, f"{prefix}{node.name}.")}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
    return found


@cache
def defined(path: Path) -> set[str]:
    return names(ast.parse(path.read_text(encoding="utf-8")).body)


def wrong_names(text: str) -> list[str]:
    wrong: list[str] = []
    for path, name in NAMED.findall(text):
        file = find(path)
        if file is None:
            wrong.append(f"{path} does not exist")
        elif name and name not in defined(file):
            wrong.append(f"{path} defines no {name}")
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_named_files_and_functions_exist(page: str) -> None:
    # Except for the page that a command writes, and the one of other programs' configurations.
    assert page in ("benchmarks.md", "clients.md") or len(NAMED.findall(PAGES[page])) >= 10
    assert not wrong_names(PAGES[page]), "\n".join(wrong_names(PAGES[page]))


def test_a_wrong_name_in_a_page_is_found() -> None:
    assert not wrong_names("`model/rope.py:inverse_frequencies` `dsv4/cli.py`, `model/moe.py:MoE.forward`.")
    assert wrong_names("`engine/llm.py:LLM.x`") == ["engine/llm.py defines no LLM.x"]
    assert wrong_names("model/rope.py:Tensor, model/none.py:f") == [
        "model/rope.py defines no Tensor",
        "model/none.py does not exist",
    ]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", PAGES[page]):
        assert (ROOT / "docs" / target).exists(), target
        text = PAGES.get(target or page, "")
        headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, flags=re.M)}
        assert not anchor or anchor in headings, f"{target}#{anchor}"


def test_the_readme_links_every_page() -> None:
    linked = set(re.findall(r"\]\(docs/([\w.-]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert linked >= set(PAGES)


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[command for _, command in COMMANDS])
def test_every_command_of_a_page_parses(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = build_parser().parse_args(arguments(command))
    if options.command == "train":
        parse(options.recipe, options.arguments)
    elif options.command == "eval":
        pytest.importorskip("reasoning_gym")
        from dsv4.commands import eval as command_line
        from dsv4.commands.terminal import eval as program
        from dsv4.commands.terminal import eval_domains

        class Parsed(Exception):
            pass

        def evaluate(*_: Any, **__: Any) -> None:
            raise Parsed

        monkeypatch.setattr(program, "evaluate", evaluate)
        monkeypatch.setattr(program, "resolve_model", Path)
        monkeypatch.setattr(eval_domains, "LLM", evaluate)
        monkeypatch.setattr(eval_domains, "resolve_model", lambda _: Path())
        monkeypatch.setattr(eval_domains, "check_ladder", lambda *_: None)  # of the folder, which is none
        with pytest.raises(Parsed):
            command_line.run(options)


def test_the_pages_have_commands() -> None:
    assert {page for page, _ in COMMANDS} >= {"model.md", "training.md", "checkpoints.md"}
    others = [text for page, text in PAGES.items() if page != "clients.md"]  # whose blocks tests/clients runs
    assert not [language for text in others for language, _ in blocks(text) if language], (
        "code in a language is not run here: show commands, or put it into the README"
    )


def table(page: str, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without its own two header lines."""
    section = PAGES[page].split(f"\n## {heading}\n")[1]
    lines = re.search(r"(?:^\|.*\n)+", section, flags=re.M)
    assert lines
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()[2:]]


def test_the_tensor_table_is_the_inventory() -> None:
    """Names with numbers replaced by N (layers, MTP) and E (experts), as in the table."""
    named = {
        name
        for row in table("checkpoints.md", "Names")
        for span in re.findall(r"`([^`]+)`", row[0])
        for name in expand(span)
    }
    config = ModelConfig.preset("nano")
    stored: set[str] = set()
    for spec in tensor_inventory(config, "official"):
        name = re.sub(r"^mtp\.\d+\.", "mtp.N.", re.sub(r"^layers\.\d+\.", "layers.N.", spec.name))
        stored.add(re.sub(r"\.experts\.\d+\.", ".experts.E.", name))
    weights = {name for name in stored if not name.endswith(".scale")}
    # An MTP block holds a layer's tensors too; its table rows name only what it adds.
    layers = {name.removeprefix("layers.N.") for name in weights if name.startswith("layers.N.")}
    assert named == {name for name in weights if name.removeprefix("mtp.N.") not in layers}


def expand(span: str) -> list[str]:
    """`a.{b,c}.d` -> a.b.d, a.c.d."""
    braces = re.search(r"\{([^{}]*)\}", span)
    if not braces:
        return [span]
    return [
        name
        for part in braces[1].split(",")
        for name in expand(span[: braces.start()] + part.strip() + span[braces.end() :])
    ]


def test_the_format_table_has_every_format() -> None:
    assert [row[0].strip("`") for row in table("checkpoints.md", "Formats")] == list(FORMATS)


def test_the_error_table_has_every_status() -> None:
    statuses = {int(status) for row in table("request.md", "Errors") for status in re.findall(r"\b\d{3}\b", row[0])}
    assert statuses == {400, 499, *errors._KINDS}


def test_environment_variables_are_documented() -> None:
    read = {
        name for path in (ROOT / "dsv4").rglob("*.py") for name in re.findall(r"\"(DSV4_[A-Z_]+)\"", path.read_text())
    }
    pages = "".join([*PAGES.values(), (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")])
    assert len(read) > 5 and not {name for name in read if f"`{name}" not in pages}
