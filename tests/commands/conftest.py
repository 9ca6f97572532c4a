"""Fixtures: commands run on the engine tests' stand-in model."""

from ..engine.conftest import model, scripted, text_folder

__all__ = ["model", "scripted", "text_folder"]
