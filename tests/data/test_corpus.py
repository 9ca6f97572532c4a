"""The corpus: each format's text, unique lines, downloads that go on, packages made once, the card."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import runpy
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dsv4.data.corpus import debian, formats
from dsv4.data.corpus.build import Wanted, choose_files, ordered
from dsv4.data.corpus.debian import (
    DownloadError,
    borrowed_licences,
    copyright_files,
    fetch_package,
    read_index,
    read_licences,
)
from dsv4.data.corpus.formats import read_documents, sample_archive
from dsv4.data.corpus.unique_lines import SeenLines

RECIPE = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "corpus.py"))
HTML = """<html><head><title>T</title><script>var x = 1;</script></head><body><nav>Home | Up</nav><main>
<h1>Title</h1><p>First&nbsp;paragraph with <b>bold</b> words.</p><pre>  code
    deeper</pre><ul><li>one item of a list</li></ul></main></body></html>"""


def document(tmp_path: Path, name: str, data: bytes) -> list[str]:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return read_documents(path)


def test_html_keeps_content_and_layout(tmp_path: Path) -> None:
    (text,) = document(tmp_path, "a.html", HTML.encode())
    assert "First paragraph with bold words." in text and "  code\n    deeper" in text and "one item" in text
    assert "var x" not in text and "Home" not in text


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_man_pages_are_rendered_ragged(tmp_path: Path) -> None:
    page = ".TH F 2 2024 x\n.SH NAME\nf \\- does \\fBthings\\fP\n.SH D\n" + "some words of text " * 40 + "\n"
    (text,) = document(tmp_path, "man2/f.2.gz", gzip.compress(page.encode()))
    assert "f - does things" in text and "\x1b" not in text and "\b" not in text
    body = text.split("\nD\n")[1]
    assert "  " not in body.strip().replace("\n       ", "")[:300]
    assert document(tmp_path, "man2/g.2.gz", gzip.compress(b".so man2/f.2\n")) == []


def test_info_nodes_lose_headers_and_menus(tmp_path: Path) -> None:
    info = (
        "This is x.info\n\x1f\nFile: x.info,  Node: Top,  Up: (dir)\n\nIntro\n*****\n\nSee *note Part::.\n\n"
        "* Menu:\n\n* Part::  a part\n\x1f\nFile: x.info,  Node: Part,  Prev: Top\n\n1 Part\n\nWords.\n"
        "\x1f\nTag Table:\n"
    )
    first, second = document(tmp_path, "x.info.gz", gzip.compress(info.encode()))
    assert first == "Intro\n*****\n\nSee Part.\n" and second == "1 Part\n\nWords.\n"


@pytest.mark.skipif(shutil.which("pod2text") is None, reason="pod2text is not installed")
def test_pod_is_rendered(tmp_path: Path) -> None:
    assert "NAME\n    x - a B thing" in document(tmp_path, "x.pod", b"=head1 NAME\n\nx - a B<B> thing\n")[0]


def test_dictionaries_give_an_entry_per_text(tmp_path: Path) -> None:
    entries = ["00-database-info\n  about", "apple\n  A fruit.", "bee\n  An insect."]
    data = "\n".join(entries).encode()
    lines, start = [], 0
    for entry in entries:
        word = entry.partition("\n")[0].replace("-", "")
        lines.append(f"{word}\t{formats._ALPHABET[start]}\t{formats._ALPHABET[len(entry)]}")
        start += len(entry) + 1
    lines.append(lines[1].replace("apple", "apples"))  # another word with the same entry
    (tmp_path / "d.index").write_text("\n".join(sorted(lines)) + "\n")
    assert document(tmp_path, "d.dict.dz", gzip.compress(data)) == ["apple\n  A fruit.\n", "bee\n  An insect.\n"]


def test_metamath_keeps_comments_and_statements_without_proofs(tmp_path: Path) -> None:
    source = "$( Header $)\n$c wff $.\n$( The axiom\n   of x. $)\nax-1 $a |- x $.\n"
    source += "${ h $e |- z $.\n$( A theorem. $)\nth $p |- y $= ( a ) ABC $.\n$( [1-Jan] $) $}"
    assert document(tmp_path, "s.mm", source.encode()) == [
        "The axiom of x.\nax-1 $a |- x $.\n",
        "A theorem.\nth $p |- y $.\n",
    ]


def test_other_files_are_text_code_or_nothing(tmp_path: Path) -> None:
    assert document(tmp_path, "a.txt.xz", lzma.compress("é".encode())) == ["é"]
    assert document(tmp_path, "README", "caf\xe9".encode("latin-1")) == ["café"]
    assert document(tmp_path, "a.py", b"x = 1\n") == ["x = 1\n"]
    assert document(tmp_path, "fortunes/art", b"one\n%\ntwo\n") == ["one", "two\n"]
    for name, data in (("a.png", b"x"), ("a.txt", b"a\0b"), ("b.txt", b"x" * 4_000_001), ("c.txt", b" \n")):
        assert document(tmp_path, name, data) == []


def test_source_archives_are_sampled_by_name(tmp_path: Path) -> None:
    path = tmp_path / "linux.tar.xz"
    with tarfile.open(path, "w:xz") as archive:
        for n in range(60):
            for suffix in (".c", ".txt"):
                entry = tarfile.TarInfo(f"linux/{n}{suffix}")
                entry.size = 4
                archive.addfile(entry, io.BytesIO(b"int;"))
    names = [name for name, text in sample_archive(path, 3) if text == "int;"]
    assert 8 < len(names) < 35 and all(name.endswith(".c") for name in names)
    assert names == [name for name, _ in sample_archive(path, 3)]


def test_lines_are_kept_once_within_and_across_packages() -> None:
    long, other = "a line that is long enough to count", "another line that is long enough too"
    seen = SeenLines()
    assert seen.clean(f"Head\n{long}\n\n\n\n  {long}\n{other}", whole=False) == f"Head\n{long}\n\n{other}\n"
    hashes = seen.finish_package()
    fresh = "a third line, which nobody has seen, of many words and more"
    assert seen.clean(f"{long}\n{fresh}\nHead", whole=False) == f"{fresh}\nHead\n"
    assert seen.clean(f"{long}\n{fresh}", whole=False) == ""
    resumed = SeenLines()
    resumed.add(hashes)
    assert resumed.clean(f"{long}\n{fresh}\nHead", whole=False) == f"{fresh}\nHead\n"
    ruler = "=" * 40
    assert seen.clean(f"{fresh} one\n{ruler}\n{fresh} two\n{ruler}", whole=False).count(ruler) == 2
    code = f"{long};\n{long};\n"
    assert seen.clean(code, whole=True) == code and seen.clean(code, whole=True) == ""
    assert seen.clean("\ud800 " + fresh + fresh, whole=False).startswith("? ")


def test_licences_are_read_from_both_kinds_of_copyright_files() -> None:
    assert read_licences("Files: *\nLicense: MIT\n text\n\nFiles: a\nLicense:  GPL-2+  \n") == ["GPL-2+", "MIT"]
    assert read_licences("see /usr/share/common-licenses/GPL-3. It is public domain.") == ["GPL-3", "public-domain"]
    assert read_licences("all mine") == ["see its copyright file"]
    assert read_licences("Format: x\nLicense: BSD-3-Clause and Expat\n text") == ["BSD-3-Clause and Expat"]


BSD = "Redistribution and use in source and binary forms, with or without\nmodification, are permitted provided that: "
PROVIDED = "THIS SOFTWARE IS PROVIDED AS IS, AND NOBODY IS LIABLE FOR ANY DAMAGES, EVEN IF TOLD OF SUCH DAMAGE."


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("License:\n\nPSF LICENSE AGREEMENT FOR PYTHON 3.13\n", ["PSF-2.0"]),
        (f"License: {BSD} 1. 2. {PROVIDED}", ["BSD-2-Clause"]),
        (f"License: {BSD} 3. Neither the name of X may be used to endorse it. {PROVIDED}", ["BSD-3-Clause"]),
        (f"{BSD} 3. All advertising materials must say so. {PROVIDED}", ["BSD-4-Clause"]),
        (f"{BSD} 1. 2. {PROVIDED} {BSD} 3. Neither the name of X. {PROVIDED}", ["BSD-2-Clause", "BSD-3-Clause"]),
        ("License: Permission  is  hereby granted,  free of charge, to any person\nobtaining a copy of this software",
         ["MIT"]),
        ("License: This software is provided 'as-is', without any express or implied\nwarranty.", ["Zlib"]),
        ("License: Permission to use, copy, modify, and distribute this software for any\npurpose with or without fee",
         ["ISC"]),
        ("License: Permission to use, copy, modify, and distribute this software and its\ndocumentation", ["HPND"]),
        ("Permission to make and distribute verbatim copies of\n this document provided the copyright notice",
         ["Verbatim-copies"]),
        ("License: GPL-2+\nLicense: By obtaining, using, and/or copying this software", ["GPL-2+"]),
    ],
)  # fmt: skip
def test_licences_in_prose_are_named_by_their_words(text: str, names: list[str]) -> None:
    assert read_licences(text) == names


def test_documents_of_another_package_have_its_copyright(tmp_path: Path) -> None:
    (tmp_path / "usr/share/doc").mkdir(parents=True)
    (tmp_path / "usr/share/doc/manpages-dev").symlink_to("manpages")
    assert list(copyright_files(tmp_path)) == []
    assert borrowed_licences(tmp_path) == ["see the copyright file of manpages"]


class Mirror(ThreadingHTTPServer):
    """Serves `files`, with ranges; `cut` bytes are the most that one answer has."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut, self.ranges = 10**9, list[str]()
        super().__init__(("127.0.0.1", 0), _Files)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Files(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        data = self.server.files.get(self.path.removeprefix("/"))
        if data is None:
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        if asked:
            self.server.ranges.append(asked)
            data = data[int(asked.removeprefix("bytes=").removesuffix("-")) :]
        data = data[: self.server.cut]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    server = Mirror()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def publish(mirror: Mirror, packages: dict[str, bytes], suite: str = "test") -> None:
    stanzas: list[str] = []
    for name, data in packages.items():
        mirror.files[f"pool/{name}_1_all.deb"] = data
        stanzas.append(
            f"Package: {name}\nVersion: 1\nDescription: x\n y: z\nFilename: pool/{name}_1_all.deb\n"
            f"Size: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"
        )
    index = lzma.compress("\n".join(stanzas).encode())
    path = "main/binary-amd64/Packages.xz"
    mirror.files[f"dists/{suite}/{path}"] = index
    digest = hashlib.sha256(index).hexdigest()
    mirror.files[f"dists/{suite}/Release"] = f"SHA256:\n {digest} {len(index)} {path}\n".encode()


def test_downloads_go_on_and_are_checked(mirror: Mirror, tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    publish(mirror, {"a": data})
    package = debian.fetch_index(mirror.url, "test")["a"]
    mirror.cut = 4000
    with pytest.raises(DownloadError, match="pool/a_1_all.deb: ended after 4000 of 10240 bytes"):
        fetch_package(mirror.url, package, tmp_path)
    mirror.cut = 10**9
    target = fetch_package(mirror.url, package, tmp_path)
    assert target.read_bytes() == data and mirror.ranges == ["bytes=4000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["a_1_all.deb"]
    mirror.files.clear()
    assert fetch_package(mirror.url, package, tmp_path) == target
    target.write_bytes(b"damaged")
    with pytest.raises(DownloadError, match="404"):
        fetch_package(mirror.url, package, tmp_path)
    mirror.files["pool/a_1_all.deb"] = data[::-1]
    with pytest.raises(DownloadError, match="pool/a_1_all.deb: sha256 .*; the index has"):
        fetch_package(mirror.url, package, tmp_path)
    assert list(read_index("Package: x\n\nPackage: y\n")) == []


def test_a_wrong_index_is_refused(mirror: Mirror) -> None:
    publish(mirror, {"a": b"x"})
    mirror.files["dists/test/main/binary-amd64/Packages.xz"] = b"other"
    with pytest.raises(DownloadError, match="Packages.xz is not what the Release file says"):
        debian.fetch_index(mirror.url, "test")
    with pytest.raises(DownloadError, match="dists/none/Release"):
        debian.fetch_index(mirror.url, "none")


def make_deb(tmp_path: Path, name: str, files: dict[str, str]) -> bytes:
    root = tmp_path / "made" / name
    for path, text in {**files, "DEBIAN/control": CONTROL.format(name=name)}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    target = root.with_suffix(".deb")
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", root, target], check=True, capture_output=True)
    return target.read_bytes()


CONTROL = "Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: x <x@y>\nDescription: x\n"
SHARED = "This line is in both packages and long enough."
WANTED = (Wanted("train-doc", "prose", exclude=("*/skipped/*",)), Wanted("held-doc", "prose", held_out=True))


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")
def test_the_recipe_makes_a_corpus_and_goes_on_with_it(mirror: Mirror, tmp_path: Path) -> None:
    doc = "usr/share/doc/train-doc"
    own = "A line that only the training package has, with more words to it."
    packages = {
        "train-doc": make_deb(
            tmp_path,
            "train-doc",
            {
                f"{doc}/a.txt": f"{SHARED}\n{own}\n", f"{doc}/skipped/b.txt": own + " skipped",
                f"{doc}/copyright": "License: MIT\n", f"{doc}/changelog": "no\n" * 90,
            },
        ),
        "held-doc": make_deb(tmp_path, "held-doc", {"usr/share/doc/held-doc/h.txt": f"{SHARED}\nHeld out words.\n"}),
    }  # fmt: skip
    publish(mirror, packages)
    out, quiet = tmp_path / "corpus", Console(quiet=True)

    def build() -> list[Any]:
        return RECIPE["build"](ordered(WANTED), out, mirror.url, "test", 1, quiet)

    made = build()
    assert [(entry.name, entry.split, entry.documents) for entry in made] == [
        ("held-doc", "validation", 1), ("train-doc", "train", 1),
    ]  # fmt: skip
    line = json.loads((out / "train/prose/train-doc.jsonl").read_text())
    assert line == {"text": own + "\n", "package": "train-doc", "path": f"{doc}/a.txt"}
    assert SHARED in (out / "validation/prose/held-doc.jsonl").read_text()
    card = json.loads((out / "card.json").read_text())
    assert [entry["licences"] for entry in card["packages"]] == [["see its copyright file"], ["MIT"]]
    assert card["totals"]["train"] == {"packages": 1, "documents": 1, "bytes": len(own) + 1}
    assert "| train-doc | 1 | prose | train | MIT | 1 |" in (out / "card.md").read_text()
    assert (out / "licences/train-doc.txt").read_text() == "License: MIT\n"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl")}
    (out / "train/prose/train-doc.jsonl").unlink()  # as if killed before its end
    again = build()
    assert again == made and {p: p.stat().st_mtime_ns for p in out.rglob("held*.jsonl")}.items() <= before.items()
    assert json.loads((out / "train/prose/train-doc.jsonl").read_text()) == line
    (out / "state/held-doc.json").write_text("{")
    with pytest.raises(ValueError, match="held-doc.json is damaged; remove it"):
        build()


def test_lists_of_packages_and_wrong_names(tmp_path: Path) -> None:
    chosen = RECIPE["choose"]([], tmp_path)
    assert len({package.name for package in chosen}) == len(chosen) >= 38
    held = [package.held_out for package in chosen]
    assert held == sorted(held, reverse=True) and 2 <= sum(held) < 8
    with pytest.raises(ValueError, match="packages nope are not in the list; allowed: "):
        RECIPE["choose"](["nope"], tmp_path)
    made = tmp_path / "corpus" / "state"
    made.mkdir(parents=True)
    (made / "dict-foldoc.json").write_text("{}")
    added = [package.name for package in RECIPE["choose"](["dict-devil", "debian-faq"], made.parent)]
    assert added[0] == "debian-faq" and {*added} == {"debian-faq", "dict-devil", "dict-foldoc"}
    assert len(RECIPE["choose"]([], made.parent)) == len(chosen)
    shutil.rmtree(made.parent)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "changelog.txt").write_text("x")
    (tmp_path / "doc").mkdir()
    (tmp_path / "doc" / "changelog.gz").write_text("x")
    assert choose_files(Wanted("x", "y"), tmp_path) == [tmp_path / "a.txt", tmp_path / "changelog.txt"]
