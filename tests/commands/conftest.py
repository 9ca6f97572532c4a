"""The commands run on the engine's stand-in model."""

from ..engine.conftest import model, scripted, text_folder

__all__ = ["model", "scripted", "text_folder"]
