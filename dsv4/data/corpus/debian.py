"""Packages of a Debian mirror: index, resumable downloads with checksums, files, licences."""

from __future__ import annotations

import hashlib
import lzma
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsv4.checkpoint.atomic import new_file

_BLOCK = 1 << 18
_TIMEOUT = 60  # seconds


class DownloadError(OSError):
    """A file is not on the mirror, or is not what the index says."""


@dataclass(frozen=True)
class DebianPackage:
    """One entry of the index."""

    name: str
    version: str
    filename: str
    size: int
    sha256: str


def read_index(text: str) -> dict[str, DebianPackage]:
    """Packages of the text of a Packages file, by name."""
    found: dict[str, DebianPackage] = {}
    for stanza in text.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", stanza, flags=re.M))
        if "Filename" in fields:
            name = fields["Package"]
            found[name] = DebianPackage(
                name, fields["Version"], fields["Filename"], int(fields["Size"]), fields["SHA256"]
            )
    return found


def fetch_index(mirror: str, suite: str) -> dict[str, DebianPackage]:
    """Fetch the main section's index for amd64, checked against the suite's Release file."""
    release = _get(f"{mirror}/dists/{suite}/Release").decode()
    path = "main/binary-amd64/Packages.xz"
    expected = re.search(rf"^ ([0-9a-f]{{64}}) +\d+ {re.escape(path)}$", release, flags=re.M)
    if expected is None:
        raise DownloadError(f"{mirror}/dists/{suite}/Release has no {path}")
    data = _get(f"{mirror}/dists/{suite}/{path}")
    if hashlib.sha256(data).hexdigest() != expected[1]:
        raise DownloadError(f"{mirror}/dists/{suite}/{path} is not what the Release file says; try again later")
    return read_index(lzma.decompress(data).decode())


def fetch_package(mirror: str, package: DebianPackage, folder: Path) -> Path:
    """Fetch a package into `folder`, from where an earlier call stopped. DownloadError if its sha256 is wrong."""
    target = folder / Path(package.filename).name
    if target.is_file() and _sha256(target) == package.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    if not part.is_file() or part.stat().st_size != package.size:
        _continue(f"{mirror}/{package.filename}", part)
    if part.stat().st_size < package.size:
        size = part.stat().st_size
        raise DownloadError(f"{mirror}/{package.filename}: ended after {size} of {package.size} bytes; try again")
    found = _sha256(part)
    if found != package.sha256:
        part.unlink()
        raise DownloadError(f"{mirror}/{package.filename}: sha256 {found}; the index has {package.sha256}")
    part.replace(target)
    return target


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the files of a package into `folder`."""
    done = subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DownloadError(f"{archive}: dpkg-deb -x failed: {done.stderr.strip()}")


def read_licences(copyright_text: str) -> list[str]:
    """Names of the licences in a debian/copyright file: its short ones if it is machine-readable (DEP-5), else the SPDX
    or common-licenses names of those whose words are in it."""
    fields = re.findall(r"^License: *(\S.*)$", copyright_text, flags=re.M)
    if fields and re.search(r"^Format:", copyright_text, flags=re.M):
        return sorted({" ".join(field.split()) for field in fields})
    short = [field.strip() for field in fields if _SHORT_NAME.fullmatch(field.strip())]
    text = " ".join(copyright_text.split())
    common = re.findall(r"/usr/share/common-licenses/([A-Za-z0-9.+-]*[A-Za-z0-9+])", text)
    named = [name for name, words in _NAMED.items() if re.search(words, text, flags=re.I)]
    return sorted({*short, *common, *named}) or ["see its copyright file"]


# A field without spaces, or licences joined by and, or, with.
_SHORT_NAME = re.compile(r"[A-Za-z0-9.+-]+(,? (and|or|with|exception|[A-Z0-9][A-Za-z0-9.+-]*))*")

_BSD = r"Redistribution and use in source and binary forms, with or without modification, are permitted"
_NAMED = {
    "public-domain": r"public[ -]domain",
    "GFDL": r"GNU Free Documentation License",
    "WordNet": r"WordNet.*(software|database)",
    "PostgreSQL": r"PostgreSQL (Licen[sc]e|Database Management System)",
    "PSF-2.0": r"PSF LICENSE AGREEMENT FOR PYTHON|PYTHON SOFTWARE FOUNDATION LICENSE",
    "BSD-4-Clause": _BSD + r"(?:(?!Redistribution and use).)*?All advertising materials",
    "BSD-3-Clause": _BSD
    + r"(?:(?!Redistribution and use|advertising materials).)*?(?:Neither the names?|endorse or promote)",
    "BSD-2-Clause": _BSD
    + r"(?:(?!Redistribution and use|Neither the name|endorse or promote|advertising).)*?(?:IS|ARE) PROVIDED "
    r"(?:(?!Redistribution and use|Neither the name|endorse or promote|advertising).)*?(?:SUCH DAMAGE|$)",
    "MIT": r"Permission is hereby granted, free of charge, to any person obtaining a copy of this software",
    "ISC": r"Permission to use, copy, modify, and(/or)? distribute this software for any purpose with or without fee",
    "HPND": r"Permission to use, copy, modify, and distribute this software and its documentation",
    "Zlib": r"This software is provided 'as-is', without any express or implied warranty",
    "Apache-2.0": r"Apache License,? Version 2\.0",
    "CC-BY-SA-3.0": r"Creative Commons Attribution[- ]Share ?Alike 3\.0",
    "MPL-2.0": r"Mozilla Public License,? (v\. ?|version )2\.0",
    "Verbatim-copies": r"make and distribute verbatim copies of this (document|manual) provided the copyright notice",
}


def copyright_files(folder: Path) -> Iterator[Path]:
    """The copyright files of an unpacked package."""
    return iter(sorted(path for path in (folder / "usr/share/doc").glob("*/copyright") if path.is_file()))


def borrowed_licences(folder: Path) -> list[str]:
    """Copyright file of an unpacked package whose documents are another's: a link to that one's folder."""
    links = sorted(path.readlink().name for path in (folder / "usr/share/doc").glob("*") if path.is_symlink())
    return [f"see the copyright file of {name}" for name in links]


def _continue(url: str, part: Path) -> None:
    """Append to `part` what it lacks of `url`."""
    start = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            mode = "ab" if answer.status == 206 else "wb"
            with part.open(mode) as file:
                while block := answer.read(_BLOCK):
                    file.write(block)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left to fetch: the checksum decides
            raise DownloadError(f"{url}: {error}") from error
    except urllib.error.URLError as error:
        raise DownloadError(f"{url}: {error.reason}") from error


def _get(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            return answer.read()
    except urllib.error.URLError as error:
        raise DownloadError(f"{url}: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
