"""Files of a loaded model: scales are views of them, and changes to them are noticed."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dsv4.checkpoint import CheckpointError, convert, load_model, save_model
from dsv4.checkpoint.folder import Checkpoint
from dsv4.checkpoint.mapped import LOADED_SCALES, MappedFiles, mapped_files
from dsv4.config import nano_path
from dsv4.kernels import backends

SECONDS = 120


def first_shard(folder: Path) -> Path:
    return folder / "model-00001-of-00003.safetensors"


def test_replaced_or_deleted_files_show_no_change(official_folder: Path) -> None:
    """Another file under the same name, or none: the mapping is still that of the old file."""
    with Checkpoint(official_folder) as checkpoint:
        files, shard = MappedFiles(checkpoint), first_shard(official_folder)
        assert files.change() is None
        shutil.copy(shard, official_folder / "new")
        (official_folder / "new").replace(shard)
        assert files.change() is None
        shutil.rmtree(official_folder)
        assert files.change() is None


def test_a_file_written_to_or_cut_is_noticed(official_folder: Path) -> None:
    with Checkpoint(official_folder) as checkpoint:
        files, shard = MappedFiles(checkpoint), first_shard(official_folder)
        size = shard.stat().st_size
        with shard.open("rb+") as handle:
            handle.write(b"x")
        os.utime(shard, ns=(0, 1))  # on a file system with a coarse clock too
        assert files.change() == f"{shard.resolve()} was written to since it was opened"
        os.truncate(shard, size - 5)
        assert files.change() == f"{shard.resolve()} was cut from {size} to {size - 5} bytes since it was opened"


def test_a_link_is_followed(official_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for file in official_folder.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    with Checkpoint(tmp_path / "links") as checkpoint:
        files = MappedFiles(checkpoint)
        os.truncate(first_shard(official_folder), 9)
        assert "was cut from" in str(files.change())


@pytest.mark.parametrize("work", ["load", "convert"])
def test_a_file_written_to_while_it_is_read_is_refused(
    work: str, official_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Checkpoint.parameter

    def touch(self: Checkpoint, name: str, device: Any = "cpu") -> torch.Tensor:
        os.utime(first_shard(official_folder), ns=(0, 1))
        return original(self, name, device)

    monkeypatch.setattr(Checkpoint, "parameter", touch)
    with pytest.raises(
        CheckpointError, match="expected files that do not change while they are read; found .* written"
    ):
        if work == "load":
            load_model(official_folder)
        else:
            convert(official_folder, tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", ["stored", "widened"])
def test_loading_copies_no_scale(weights: str, official_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloned: list[torch.dtype] = []
    original = torch.Tensor.clone
    monkeypatch.setattr(
        torch.Tensor, "clone", lambda self, *a, **k: (cloned.append(self.dtype), original(self, *a, **k))[1]
    )
    model = load_model(official_folder, weights=weights)
    assert torch.float8_e8m0fnu not in cloned and not isinstance(getattr(model, LOADED_SCALES), dict)


def same_tensors(a: Path, b: Path) -> bool:
    first, second = ({n: t for f in sorted(p.glob("*.safetensors")) for n, t in load_file(f).items()} for p in (a, b))
    return first.keys() == second.keys() and all(
        torch.equal(t.view(torch.uint8), second[n].view(torch.uint8)) for n, t in first.items()
    )


@pytest.mark.parametrize("after", ["nothing", "delete", "replace", "widen", "copy"])
@pytest.mark.parametrize("weights", ["stored", "widened"])
def test_a_save_writes_the_scales_that_were_read(
    weights: str, after: str, official_folder: Path, tmp_path: Path
) -> None:
    """Also for another writer's encoding, after the folder is deleted, and with the model prepared for training."""
    shutil.copytree(official_folder, tmp_path / "kept")
    model = load_model(official_folder, weights=weights)
    if after == "delete":
        shutil.rmtree(official_folder)
    elif after == "replace":
        convert(tmp_path / "kept", official_folder, "bf16", overwrite=True)
    elif after == "widen":
        model.requires_grad_(True)
    elif after == "copy":
        model = copy.deepcopy(model)
    save_model(model, model.config, tmp_path / "again")
    assert same_tensors(tmp_path / "again", tmp_path / "kept")


def test_scales_of_a_file_that_was_written_to_are_not_used(official_folder: Path) -> None:
    model = load_model(official_folder, weights="widened")
    scales = getattr(model, LOADED_SCALES)
    assert scales.get("layers.0.attn.wq_a.weight") is not None and scales.get("norm.weight") is None
    os.utime(first_shard(official_folder), ns=(0, 1))
    assert scales.get("layers.0.attn.wq_a.weight") is None


def test_a_model_watches_its_files_while_weights_are_views_of_them(official_folder: Path) -> None:
    model = load_model(official_folder, weights="stored")
    assert mapped_files(model) is not None and mapped_files(copy.deepcopy(model)) is not None
    assert mapped_files(pickle.loads(pickle.dumps(getattr(model, "mapped_files")))) is None  # noqa: B009
    model.requires_grad_(True)
    assert mapped_files(model) is None
    assert mapped_files(load_model(official_folder, weights="widened")) is None and mapped_files(object()) is None


CUT = """
import os, sys
from pathlib import Path
import torch, dsv4
from dsv4.kernels import backends
folder = Path(sys.argv[1])
(file,) = folder.glob("*.safetensors")
if sys.argv[2] == "convert":
    from dsv4.checkpoint import convert
    convert(folder, folder / "out", "fp32", progress=lambda done, total: os.truncate(file, 4096))
else:
    model = dsv4.load(folder)
    os.truncate(file, 4096)
    model(torch.tensor([[1, 2, 3]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say where files are mapped")
@pytest.mark.parametrize("work", ["forward", "convert"])
def test_a_file_cut_short_ends_the_process_with_a_last_line_that_names_it(work: str, tmp_path: Path) -> None:
    if backends.native_module() is None:
        pytest.skip("the reference kernels do not watch")
    for file in nano_path().iterdir():
        shutil.copy(file, tmp_path)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", CUT, str(tmp_path), work],
        capture_output=True, text=True, env=environment, timeout=SECONDS, check=False,
    )  # fmt: skip
    (file,) = tmp_path.glob("*.safetensors")
    assert done.returncode == -signal.SIGBUS
    assert done.stderr.splitlines()[-1].startswith(
        f"dsv4: the process ends (SIGBUS): {file.resolve()} is mapped into it"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say where files are mapped")
def test_a_sent_signal_ends_a_process_that_watches_its_mapped_files() -> None:
    code = """
import os, signal, dsv4
from dsv4.config import nano_path
model = dsv4.load(nano_path())
os.kill(os.getpid(), signal.SIGBUS)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=SECONDS, check=False)
    assert done.returncode == -signal.SIGBUS
