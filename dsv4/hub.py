"""Repositories of the Hugging Face Hub: names, downloads into the hub's own cache, headers of remote weights.

huggingface_hub does the work; it is imported on the first look-up. Its environment variables apply: HF_ENDPOINT,
HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import errno
import glob
import re
import shutil
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from dsv4.safetensors_headers import INDEX_NAME, SINGLE_NAME, Header, HeaderEntry, read_headers, weight_files

# Files that dsv4 reads from a model folder besides index and weights.
SETTINGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?", re.ASCII)
_HEADER_READERS = 8  # connections at a time


class HubError(ValueError):
    """A repository that cannot be downloaded or read: its name, the reason, and a remedy if there is one."""

    def __init__(self, name: HubName, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"{name}: {reason}")


class HubName(NamedTuple):
    """A repository, `owner/name`, and a branch, tag or commit of it; None for the main branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def hub_name(model: str | Path, revision: str | None = None) -> HubName | None:
    """Parse owner/name[@revision]; None for a Path, for an existing path and for any other text.

    ValueError for a revision without a name, or for two different revisions.
    """
    is_text = isinstance(model, str) and not Path(model).exists()
    match = _NAME.fullmatch(model) if is_text and isinstance(model, str) else None
    if match is None:
        if revision is not None:
            raise ValueError(f"revision is {revision!r}, but {str(model)!r} is no name of a repository: owner/name")
        return None
    named = match["revision"]
    if None not in (named, revision) and named != revision:
        raise ValueError(f"revision is {revision!r}, but {model!r} names {named!r}; give one of them")
    return HubName(match["repository"], named or revision)


def fetch_model(name: HubName) -> Path:
    """Download a repository's settings, tokenizer, index and listed weights; returns their folder in the hub's cache.

    Files already in the cache are not downloaded again, and a broken connection is resumed. Progress is shown if stderr
    is a terminal. HubError if anything is missing or fails.
    """
    folder = fetch_settings(name)
    weights = weight_files(folder)
    if not _are_there(folder, weights):
        _check_listing(name, folder, weights)
        _snapshot(name._replace(revision=folder.name), weights, show=True, asked=name)
    return folder


def fetch_settings(name: HubName) -> Path:
    """Download a repository's settings, tokenizer and index, without weights; returns their folder in the cache."""
    folder = _snapshot(name, (*SETTINGS, INDEX_NAME), show=False)
    if not (folder / "config.json").is_file():
        raise HubError(name, _absent("config.json"))
    return folder


def fetch_headers(name: HubName, folder: Path) -> dict[str, Header]:
    """Read the headers of a repository's weights by range requests: file -> header; empty without safetensors files.

    `folder`: returned by `fetch_settings`; it names the commit. Weights that it holds are read from it.
    """
    from huggingface_hub import parse_safetensors_file_metadata
    from huggingface_hub.errors import EntryNotFoundError

    files = weight_files(folder)
    if _are_there(folder, files):
        return read_headers(folder)

    def read(file: str) -> Header:
        found = parse_safetensors_file_metadata(name.repository, file, revision=folder.name)
        ends = {tensor: (info.dtype, *info.data_offsets) for tensor, info in found.tensors.items()}
        return {tensor: HeaderEntry(dtype, end - start) for tensor, (dtype, start, end) in ends.items()}

    with in_words(name), ThreadPoolExecutor(_HEADER_READERS) as readers:
        try:
            return dict(zip(files, readers.map(read, files), strict=True))
        except EntryNotFoundError:
            if files != [SINGLE_NAME]:
                raise
            return {}


def _snapshot(name: HubName, files: Sequence[str], show: bool, asked: HubName | None = None) -> Path:
    """Download the files that exist in the repository. `asked`: the name for messages.

    `show`: let the library show progress and its warnings.
    """
    import huggingface_hub
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    if not show:
        logging.set_verbosity_error()  # it warns if no file matches; the caller reports that itself
    try:
        with in_words(asked or name):
            # The library's annotations are incomplete for a strict checker.
            folder = cast(Any, huggingface_hub).snapshot_download(
                name.repository,
                revision=name.revision,
                allow_patterns=[glob.escape(file) for file in files],
                tqdm_class=_bar(show and sys.stderr.isatty()),
            )
    finally:
        logging.set_verbosity(level)
    return Path(folder)


def _bar(show: bool) -> Any:
    """Class of progress bars for the library, whose own bars are shown in files and pipes too."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options |= {} if show else {"disable": True}
            super().__init__(*arguments, **options)  # pyright: ignore[reportUnknownMemberType]  # tqdm has few types

    return Bar


def _are_there(folder: Path, files: Sequence[str]) -> bool:
    return all((folder / file).is_file() for file in files)


def _check_listing(name: HubName, folder: Path, files: Sequence[str]) -> None:
    """HubError if the repository lacks a file, or if the disk is too small for the files not yet in the cache."""
    from huggingface_hub import model_info

    with in_words(name):
        listed = model_info(name.repository, revision=folder.name, files_metadata=True).siblings or []
    blobs = folder.parents[1] / "blobs"
    found = {file.rfilename: file for file in listed}
    needed = 0
    for wanted in files:
        if wanted not in found:
            raise HubError(name, _absent(wanted))
        file = found[wanted]
        blob = file.lfs.sha256 if file.lfs is not None else file.blob_id
        needed += 0 if blob and (blobs / blob).exists() else file.size or 0
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise HubError(name, f"{_FULL}: it takes {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free in {folder}")


def _absent(file: str) -> str:
    return f"the repository has no {file}; a model of config.json and safetensors files is needed"


_FULL = "no space left on the disk for the hub's cache (HF_HOME moves it)"


@contextmanager
def in_words(name: HubName) -> Generator[None]:
    """Translate any error of the library, which has many unrelated classes, into a HubError of one line."""
    try:
        yield
    except Exception as error:
        raise HubError(name, _reason(name, error)) from error


def _reason(name: HubName, error: Exception) -> str:
    from huggingface_hub import constants, errors

    place = f"{constants.ENDPOINT}/{name.repository}"
    cached = f"the cache {constants.HF_HUB_CACHE} does not hold all of it"
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    said = " ".join(str(cause or error).split("\n\n")[0].split()) or type(cause or error).__name__
    match error:
        case errors.GatedRepoError():
            return f"the repository is gated: accept its terms at {place} and set HF_TOKEN to a token of that account"
        case errors.RepositoryNotFoundError():
            return f"no such repository at {place}, or a private one that HF_TOKEN opens; nor is it a folder here"
        case errors.RevisionNotFoundError():
            return f"no such revision; allowed: a branch, a tag or a commit of {place}"
        case errors.RemoteEntryNotFoundError():
            return _absent(str(error.response.url).rpartition("/")[2])
        case errors.HFValidationError():
            return f"no name of a repository: {said}"
        case OSError(errno=errno.ENOSPC):
            return _FULL
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return f"HF_HUB_OFFLINE is set, and {cached}"
        case errors.LocalEntryNotFoundError():
            return f"{constants.ENDPOINT} cannot be reached ({said}), and {cached}"
        case errors.HfHubHTTPError():
            return f"{constants.ENDPOINT} answers {error.response.status_code}: {error.server_message or said}"
        case _:
            return f"fetching from {constants.ENDPOINT} has failed: {said}"
