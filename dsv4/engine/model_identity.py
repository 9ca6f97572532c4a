"""Identity of a model as far as bits in its cache depend on it: config, weights, numerics, storage, kernels."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dsv4 import __version__
from dsv4.cache import Cache
from dsv4.cache.disk.packing import page_layout
from dsv4.kernels import backends
from dsv4.kernels.stored import StoredTensor
from dsv4.model.stacks import native_tensors
from dsv4.model.transformer import Transformer

HASHED_BYTES = 1 << 30  # of weights that are read whole, about a second; of more the files are sampled
SAMPLE_BYTES = 1 << 16
SAMPLES = 32  # per file


def model_identity(model: Transformer, cache: Cache, files: list[Path] | None) -> bytes:
    """Bytes that two models share only if they compute the same bits into caches of the same form.

    Weights of up to HASHED_BYTES are hashed whole. Of larger ones, `files` stand for them if given: names, sizes, times
    of change and samples, so that a copied folder counts as another model; else they are hashed whole as well.
    """
    tensors = list(_contents(model))
    if files is None or sum(tensor.nbytes for _, tensor in tensors) <= HASHED_BYTES:
        weights = _hash_tensors(tensors)
    else:
        weights = _sample_files(files)
    about = {
        "config": dataclasses.asdict(model.config),
        "numerics": model.numerics,
        "weights": weights,
        "pages": page_layout(cache),
        "state": {name: [str(t.dtype), list(t.shape)] for name, t in cache.snapshot(0).fields().items()},
        "kernels": _kernels(model),
        "byteorder": sys.byteorder,
        "dsv4": __version__,
    }
    return json.dumps(about, sort_keys=True, default=str).encode()


def _contents(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors as they lie in memory; of encoded ones the codes and the scales."""
    for name, tensor in native_tensors(model).items():
        if isinstance(tensor, StoredTensor):
            kind, codes, scales = tensor.parts
            yield f"{name} {kind}", codes
            if scales is not None:
                yield f"{name} scales", scales
        else:
            yield name, tensor.detach()


def _hash_tensors(tensors: list[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sample_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\0".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(0, status.st_size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _kernels(model: Transformer) -> list[str]:
    """The code and the machine, as far as roundings depend on them."""
    about = [model.backend.name, str(backends.requested()), platform.machine(), model.device.type, torch.__version__]
    native = backends.native_module()
    if native is not None:
        about += [native.selected(), hashlib.sha256(Path(str(native.__file__)).read_bytes()).hexdigest()]
    if model.backend.name != "native":
        about += [torch.backends.cpu.get_cpu_capability(), os.environ.get("MKL_CBWR", "")]
        about.append(torch.get_float32_matmul_precision())
    if model.device.type == "cuda":
        about.append(torch.cuda.get_device_name(model.device))
    return about
