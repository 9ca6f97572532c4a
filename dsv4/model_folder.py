"""Resolve a user's model argument (folder, "nano", owner/name on the Hugging Face Hub) to a folder."""

from __future__ import annotations

from pathlib import Path

from dsv4.config import nano_path
from dsv4.hub import fetch_model, hub_name
from dsv4.presets import PRESETS

ALLOWED = "a model folder, 'nano', or owner/name[@revision] of the Hugging Face Hub"


def resolve_model(model: str | Path | None = None, revision: str | None = None) -> Path:
    """Folder of a model: an existing path first, then "nano" (also None), then owner/name, which is downloaded.

    A Path, and a text with slashes that is not a name, is returned unchecked: its reader reports errors. HubError if a
    download fails; ValueError for any other text, or for a revision without a name.
    """
    name = hub_name("nano" if model is None else model, revision)
    if name is not None:
        return fetch_model(name)
    if model is None:
        return nano_path()
    folder = Path(model)
    if isinstance(model, Path) or folder.exists() or len(folder.parts) > 1 or folder.is_absolute():
        return folder
    if model == "nano":
        return nano_path()
    if model in PRESETS:
        raise ValueError(f"{model!r} is a shape without weights; allowed: {ALLOWED}")
    raise ValueError(f"{model!r} is no folder here; allowed: {ALLOWED}")


def model_name(folder: Path) -> str:
    """Name of the model in a folder: the repository's name for a folder in the hub's cache, else the folder's."""
    folder = folder.resolve()
    repository = folder.parents[1].name if len(folder.parents) > 1 else ""
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]  # models--owner--name/snapshots/commit
    return folder.name
