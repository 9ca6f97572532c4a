"""Build a training corpus from Debian's documentation packages, with a data card.

A killed call goes on where it was: with the packages that it had not finished, and within a download. Needs dpkg-deb;
groff for man pages, pod2text for Perl's. Then: dsv4 data tokenize corpus/train --out shards
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dsv4.checkpoint.atomic import DiskFullError
from dsv4.commands.recipe_flags import parse
from dsv4.data.corpus.build import Builder, Made, Wanted, ordered
from dsv4.data.corpus.card import write_card
from dsv4.data.corpus.debian import DownloadError, fetch_index

# In the order in which lines are kept: the first package with a line has it.
PACKAGES = (
    # Words and definitions
    Wanted("dict-wn", "dictionaries"),
    Wanted("dict-foldoc", "dictionaries"),
    Wanted("dict-jargon", "dictionaries"),
    Wanted("dict-vera", "dictionaries"),
    Wanted("dict-devil", "dictionaries"),
    Wanted("dict-elements", "dictionaries"),
    Wanted("dict-gcide", "dictionaries"),
    # Prose
    Wanted("anarchism", "prose", include=("*/html/*",)),
    Wanted("debian-history", "prose", include=("*.en.html", "*/docs/*")),
    Wanted("debian-faq", "prose", held_out=True, include=("*.en.html", "*.en.txt*")),
    Wanted("fortunes", "prose", include=("*/fortunes/*",)),
    Wanted("debian-reference-en", "prose", include=("*.html",)),
    Wanted("maint-guide", "prose", held_out=True, include=("*.en.html",)),
    Wanted("debmake-doc", "prose", include=("*.en.html",)),
    Wanted("developers-reference", "prose", include=("*/developers-reference/*.html",)),
    Wanted("debian-policy", "prose", include=("*.html",)),
    Wanted("debian-handbook", "prose", include=("*/html/en-US/*",)),
    Wanted("installation-guide-amd64", "prose", include=("*/en/*.html",)),
    # Manuals
    Wanted("manpages", "manuals"),
    Wanted("manpages-dev", "manuals"),
    Wanted("bash-doc", "manuals", include=("*.html", "*.info*")),
    Wanted("zsh-doc", "manuals", include=("*.html", "*.info*")),
    Wanted("autoconf-doc", "manuals", include=("*.info*",)),
    Wanted("m4-doc", "manuals", include=("*.info*", "*.html")),
    Wanted("git-doc", "manuals", include=("*.html",)),
    Wanted("gnuplot-doc", "manuals"),
    Wanted("vim-doc", "manuals"),
    Wanted("cmake-doc", "manuals", include=("*.html", "*.rst")),
    Wanted("sqlite3-doc", "manuals", held_out=True, include=("*.html",)),
    Wanted("postgresql-doc-17", "manuals", include=("*.html",)),
    Wanted("apache2-doc", "manuals", include=("*/en/*.html", "*.html.en")),
    Wanted("bind9-doc", "manuals", include=("*.html", "*.rst*")),
    Wanted("octave-doc", "manuals", include=("*.html",)),
    Wanted("r-doc-html", "manuals"),
    Wanted("linux-doc-6.12", "manuals", include=("*.html", "*.rst*", "*.txt*"), exclude=("*/translations/*",)),
    # Languages and libraries
    Wanted("perl-doc", "programming", include=("*.pod",)),
    Wanted("python3.13-doc", "programming", include=("*/html/*.html",)),
    Wanted("python-django-doc", "programming", include=("*.html",), exclude=("*/_modules/*",)),
    Wanted("cppreference-doc-en-html", "programming", include=("*.html",)),
    Wanted("php-doc", "programming", include=("*.html",)),
    Wanted("erlang-doc", "programming", include=("*.html",)),
    Wanted("nodejs-doc", "programming", held_out=True, include=("*.html",)),
    Wanted("rust-doc", "programming", include=("*.html",), exclude=("*/src/*", "*/help.html")),
    Wanted("python-numpy-doc", "programming", include=("*.html",), exclude=("*/_modules/*",)),
    Wanted("python-sympy-doc", "programming", include=("*.html",), exclude=("*/_modules/*",)),
    Wanted("python-scipy-doc", "programming", include=("*.html",), exclude=("*/_modules/*",)),
    # Mathematics and code
    Wanted("metamath-databases", "mathematics", include=("*/set.mm",)),
    Wanted("libpython3.13-stdlib", "code", include=("*.py",), exclude=("*/idlelib/*", "*/test/*")),
    Wanted("linux-source-6.12", "code", sample=24),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; 0 when the corpus and its card are written."""
    options = parse("corpus", arguments)
    console = Console()
    try:
        wanted = choose(options.packages, options.out)
        made = build(wanted, options.out, options.mirror, options.suite, options.workers, console)
    except (DownloadError, DiskFullError, FileNotFoundError, ValueError) as error:
        raise SystemExit(f"corpus: {error}") from error
    total = sum(entry.bytes for entry in made)
    console.print(f"{len(made)} packages, {total:,} bytes of text: {options.out}/card.md", highlight=False)
    return 0


def choose(names: list[str], out: Path) -> list[Wanted]:
    """Packages of the list with these names and those of the corpus in `out`; all without names.

    ValueError for another name. A package's lines depend on the packages before it, so those of the corpus count too.
    """
    known = {package.name: package for package in PACKAGES}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"packages {', '.join(unknown)} are not in the list; allowed: {', '.join(known)}")
    there = {path.stem for path in (out / "state").glob("*.json")}
    return ordered([package for package in PACKAGES if not names or package.name in {*names, *there}])


def build(wanted: list[Wanted], out: Path, mirror: str, suite: str, workers: int, console: Console) -> list[Made]:
    """Add the packages to the corpus in `out`; the card is written after each."""
    index = fetch_index(mirror, suite)
    missing = [package.name for package in wanted if package.name not in index]
    if missing:
        raise DownloadError(f"{mirror}, suite {suite}: no package {', '.join(missing)}")
    out.mkdir(parents=True, exist_ok=True)
    builder = Builder(out, mirror, workers)
    made: list[Made] = []
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(wanted))
        for package in wanted:
            bar.update(task, description=package.name)
            entry, earlier = builder.add(package, index[package.name], time.monotonic)
            made.append(entry)
            write_card(out, made, suite, mirror)
            took = "made earlier" if earlier else f"{entry.seconds:.0f} s"
            bar.console.print(
                f"{entry.name}: {entry.documents:,} texts, {entry.bytes:,} bytes, {took}", highlight=False
            )
            bar.advance(task)
    return made


if __name__ == "__main__":
    sys.exit(main())
