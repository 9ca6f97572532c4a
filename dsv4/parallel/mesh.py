"""Process group of the launcher's environment, and one device mesh with named dimensions.

torchrun, or anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, starts the processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dsv4.analysis.degrees import DIMENSIONS, Degrees

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT_SECONDS = 600.0  # of a collective whose other ranks do not come


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """True if a launcher started this process as one of several."""
    return int(environment.get("WORLD_SIZE", "1")) > 1


@contextmanager
def process_group(device: str = "cpu", timeout: float = TIMEOUT_SECONDS) -> Iterator[torch.device]:
    """Join the launcher's processes within; yields this rank's device. Collectives fail after `timeout` seconds.

    ValueError if the environment names no group. The group is destroyed at the end.
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(f"{', '.join(missing)} not set: start the processes by torchrun --nproc-per-node N")
    own = torch.device(device)
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(own)
    # With GPUs gloo too: flags and numbers of the loop are on the host, which nccl does not reduce.
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield own
    finally:
        dist.destroy_process_group()


def make_mesh(degrees: Degrees, device: str = "cpu") -> DeviceMesh:
    """Mesh with the dimensions `DIMENSIONS`, each of its degree, over all ranks of the process group."""
    degrees.check(dist.get_world_size(), degrees.expert, degrees.pipeline)
    sizes = tuple(getattr(degrees, name) for name in DIMENSIONS)
    return init_device_mesh(device, sizes, mesh_dim_names=DIMENSIONS)


def dense_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """One-dimensional mesh of the ranks that hold the same layers: those over which dense weights are sharded."""
    return mesh["data", "context", "expert"]._flatten("dense")


def expert_shard_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """One-dimensional mesh of the ranks that hold the same experts, over which those are sharded."""
    return mesh["data", "context"]._flatten("expert_shard")


def batch_rank(mesh: DeviceMesh) -> int:
    """Number of this rank among those with batches of their own, 0 to Degrees.batches - 1."""
    return mesh.get_local_rank("data") * mesh["expert"].size() + mesh.get_local_rank("expert")
