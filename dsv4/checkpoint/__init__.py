"""Checkpoints: number formats, names, reading, writing, conversion. Official layouts and transformers' folders."""

from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.folder import read_config
from dsv4.checkpoint.reading import iter_float_tensors, load_model
from dsv4.checkpoint.writing import FORMATS, convert, save_model, save_tensors, stored_format

__all__ = [
    "FORMATS",
    "CheckpointError",
    "convert",
    "iter_float_tensors",
    "load_model",
    "read_config",
    "save_model",
    "save_tensors",
    "stored_format",
]
