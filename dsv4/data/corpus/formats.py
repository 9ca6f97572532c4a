"""Plain texts of documentation files: HTML, man pages, info, POD, dictd, Metamath, source code, text."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from resiliparse.extract.html2text import extract_plain_text  # pyright: ignore[reportMissingModuleSource]

from dsv4.data.stable_hash import stable_hash

MOST_BYTES = 4_000_000  # larger files are indexes, logs and tables; dictionaries and databases are exempt
CODE = (".py", ".c", ".h", ".rs", ".cpp", ".hpp")
_TEXT = (".txt", ".md", ".rst", ".adoc", ".asciidoc", ".texi", ".text", ".sgml")
_COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
# Selectors of what is no text in the generators' pages: Sphinx, DocBook, Doxygen, rustdoc, MediaWiki, texinfo, Antora.
_NAVIGATION = [
    *("nav", "footer", "header nav", "noscript", "button", "select", "form", "svg", "[role=navigation]"),
    *("[role=search]", "[role=banner]", ".related", ".sphinxsidebar", ".sidebar", ".headerlink", ".navheader"),
    *(".navfooter", ".rst-versions", ".wy-nav-side", ".bd-sidebar", ".bd-header", ".prev-next-area", ".skip-link"),
    *("#toc", ".toc", ".contents.local", "#navigation", "#mw-navigation", ".printfooter", ".catlinks", "#cpp-head"),
    *(".nav-header", ".nav-panel", ".header .nav", "rustdoc-toolbar", ".src", ".t-navbar", ".editsection"),
    *(
        "#column2",
        "#footer",
        "#preamble",
        ".navbar",
        ".menu",
        ".breadcrumbs",
        ".breadcrumb",
        "#sidebar",
        ".layout_menu",
    ),
]
_MAN_SECTION = re.compile(r"\.[1-9][a-z]*$")
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"  # of dictd's numbers


def read_documents(path: Path) -> list[str]:
    """Texts of a file, most often one; none of a file of another kind, or one that is empty or too large."""
    name = path.name
    if name.endswith((".dict.dz", ".dict")):
        return list(_dictionary(path))
    if name.endswith(".mm"):
        return list(_metamath(_decode(path.read_bytes())))
    reader = _reader(path)
    if reader is None or path.stat().st_size > MOST_BYTES:
        return []
    data = path.read_bytes()
    if path.suffix in _COMPRESSED:
        data = _COMPRESSED[path.suffix](data)
    if len(data) > MOST_BYTES or b"\0" in data[:1000]:
        return []
    return [text for text in reader(_decode(data)) if text.strip()]


def is_whole(path: Path) -> bool:
    """True for texts that are kept whole: the lines of source code and of synonyms' definitions repeat for a reason."""
    return path.suffix in CODE or path.name.endswith((".dict.dz", ".dict"))


def sample_archive(path: Path, every: int, suffixes: tuple[str, ...] = (".c", ".h")) -> Iterator[tuple[str, str]]:
    """(name, text) of one in `every` source files of a tar archive, chosen by their names."""
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            if not member.isfile() or not member.name.endswith(suffixes) or member.size > MOST_BYTES:
                continue
            if stable_hash("sample", member.name) % every == 0:
                file = archive.extractfile(member)
                assert file is not None
                yield member.name, _decode(file.read())


def _reader(path: Path) -> Callable[[str], list[str]] | None:
    """Reader of a file by its name without a compression's suffix."""
    plain = path.with_suffix("") if path.suffix in _COMPRESSED else path
    suffix = plain.suffix.lower()
    if suffix in (".html", ".htm", ".xhtml"):
        return _html
    if _MAN_SECTION.search(plain.name) and path.parent.name.startswith("man"):
        return _man
    if suffix == ".info" or re.search(r"\.info-\d+$", plain.name):
        return _info
    if suffix == ".pod":
        return _pod
    if suffix in _TEXT or suffix in CODE or (not suffix and plain.name.startswith(("README", "FAQ", "TUTORIAL"))):
        return lambda text: [text]
    if path.parent.name == "fortunes" and not suffix:
        return lambda text: text.split("\n%\n")
    return None


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _html(text: str) -> list[str]:
    """Text with its line breaks, lists and preformatted blocks, without navigation."""
    # The library's own choice of the main content leaves out lists within it.
    plain = extract_plain_text(text, preserve_formatting=True, alt_texts=False, skip_elements=_NAVIGATION)
    return [plain.replace("\xa0", " ")]


def _man(text: str) -> list[str]:
    if text.startswith(".so ") and text.count("\n") < 3:
        return []  # another name of a page
    options = ("-Tutf8", "-mandoc", "-t", "-P-cbou", "-rLL=100n", "-rHY=0", "-Kutf8")
    ragged = re.sub(r"^(\.(?:SH|SS|Sh|Ss|PP|TP|IP|P|LP|HP)\b.*)$", r".ad l\n\1", text, flags=re.M)
    return [re.sub(r"\n{3,}", "\n\n", _filter(("groff", *options), ragged))]


def _pod(text: str) -> list[str]:
    return [_filter(("pod2text", "--width=100", "--utf8"), text)]


def _filter(command: tuple[str, ...], text: str) -> str:
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"{command[0]} is not installed, which this package's files need")
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    return done.stdout.decode("utf-8", "replace")


def _info(text: str) -> list[str]:
    """The nodes of an info file, without headers and menus."""
    nodes: list[str] = []
    for node in text.split("\x1f")[1:]:
        header, _, body = node.lstrip("\n").partition("\n")
        if header.startswith("File:") and not header.startswith("File: ."):
            body = re.sub(r"^\* Menu:\n(?:.*\n)*?(?=\n[^*\n ]|\Z)", "", body, flags=re.M)
            nodes.append(re.sub(r"\*[Nn]ote ([^:]*)::", r"\1", body).strip() + "\n")
    return nodes


def _dictionary(path: Path) -> Iterator[str]:
    """Entries of a dictd dictionary: the index beside it has the offset and length of each."""
    data = path.read_bytes()
    if path.suffix == ".dz":
        data = gzip.decompress(data)
    index = path.with_name(path.name.removesuffix(".dz").removesuffix(".dict") + ".index")
    spans = {tuple(map(_number, line.split("\t")[1:3])) for line in index.read_text("utf-8").splitlines() if line}
    words = {line.split("\t")[0] for line in index.read_text("utf-8").splitlines() if line.startswith("00")}
    for start, length in sorted(spans):
        text = _decode(data[start : start + length]).strip()
        if text.partition("\n")[0].replace("-", "") not in words:  # entries about the database itself
            yield text + "\n"


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _ALPHABET.index(digit)
    return value


def _metamath(text: str) -> Iterator[str]:
    """Statements of a Metamath database with the comments before them; proofs, compressed to letters, are left out."""
    without_proofs = re.sub(r"\$=.*?\$\.", "$.", text, flags=re.S)
    parts = re.split(r"\$\((.*?)\$\)", without_proofs, flags=re.S)  # text, comment, text, comment, ..., text
    for comment, following in zip(parts[1::2], parts[2::2], strict=True):
        statement = re.search(r"(\S+\s+\$[ap]\s[^$]*\$\.)", following)
        if statement:
            yield f"{' '.join(comment.split())}\n{' '.join(statement[1].split())}\n"
