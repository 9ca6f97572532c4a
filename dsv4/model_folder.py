"""What a user calls a model -> the folder that it lies in: a folder, the embedded nano, or a repository by name."""

from __future__ import annotations

from pathlib import Path

from dsv4.config import nano_path
from dsv4.hub import fetch_model, hub_name
from dsv4.presets import PRESETS

ALLOWED = "a model folder, 'nano', or owner/name[@revision] of the Hugging Face Hub"


def resolve_model(model: str | Path | None = None, revision: str | None = None) -> Path:
    """The folder of a model: what exists here first, then "nano" (as None), then a name, which is fetched.

    A Path, and a text with a slash that is no name, is returned as it is, for the reader to say what is wrong with it.
    HubError for a name that cannot be fetched, ValueError for other texts and for a revision of what is no name.
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
    """How the model in a folder is called: a repository's name in the hub's cache, else the folder's."""
    folder = folder.resolve()
    repository = folder.parents[1].name if len(folder.parents) > 1 else ""
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]  # models--owner--name/snapshots/commit
    return folder.name
