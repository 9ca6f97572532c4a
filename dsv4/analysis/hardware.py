"""Machines that training is planned for: memory, dense product rates, bandwidths. Per GPU, decimal units.

Rates are those without sparsity, which data sheets often double. `link` is one direction of all of a GPU's NVLinks or
Infinity Fabric links; `network` a 400 Gbit/s adapter per GPU. Sources, vendors' tables as others quote them:

- H100 SXM: https://glennklockwood.com/garden/processors/h100, from NVIDIA's white paper.
- H200 SXM: the H100's processor, with 141 GB at 4.8 TB/s: https://www.aiminingco.com/gpu/h200/specs.
- B200 of an HGX board at 1,000 W: https://glennklockwood.com/garden/processors/B200, from NVIDIA's brief. 180 GB as in
  systems delivered: https://brent-newsom-nvidia.github.io/AIPS-Boom/wiki/NVIDIA-DGX-B200. PyTorch measured a bus of
  7.7 TB/s in place of the 8 given: https://github.com/pytorch/ao/pull/4002.
- MI300X: BF16, FP8, memory: https://raw.githubusercontent.com/alpharomercoma/MI300X-vs-H200 (REPORT.md,
  METHODOLOGY.md); links: https://www.emergentmind.com/topics/amd-mi300x-gpu; FP32 from 304 units at 2.1 GHz with 256
  operations each per cycle.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.analysis.precision import Precision

EFFICIENCY = 0.35
"""Share of the dense BF16 rate that a run reaches. DeepSeek-V3's report has 2.664M H800 hours for 14.8T tokens of 37B
active parameters: 6 * 37e9 * 14.8e12 operations, 343 TFLOP/s per GPU of 989."""

PRICE = 2.0  # US dollars per GPU and hour, as DeepSeek-V3's report assumes for the H800


@dataclass(frozen=True)
class Machine:
    """A kind of GPU, or a CPU: bytes, FLOPs per second and bytes per second."""

    name: str
    memory: float
    fp32: float
    bf16: float
    fp8: float
    memory_bandwidth: float
    link: float
    network: float = 50e9
    gpus_per_node: int = 8
    runtime: float = 2e9  # memory of the driver, the libraries and the communicators
    efficiency: float = EFFICIENCY
    price: float = PRICE

    def rate(self, precision: Precision) -> float:
        """Dense products per second in a precision."""
        return {"fp32": self.fp32, "bf16": self.bf16, "fp8": self.fp8}[precision]

    def bandwidth(self, ranks: int) -> float:
        """Bytes per second and direction of a GPU in a group of `ranks` neighbors."""
        return self.link if ranks <= self.gpus_per_node else self.network


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("H100", 80e9, 66.9e12, 989.4e12, 1978.9e12, 3.35e12, 450e9),
        Machine("H200", 141e9, 66.9e12, 989.4e12, 1978.9e12, 4.8e12, 450e9),
        Machine("B200", 180e9, 80e12, 2250e12, 4500e12, 8e12, 900e9),
        Machine("MI300X", 192e9, 163.4e12, 1307.4e12, 2614.9e12, 5.3e12, 448e9),
    )
}

CPU_EFFICIENCY = 0.5
"""Assumed share of the rate of large fp32 products that steps on a CPU reach; two runs beside it: docs/training.md."""


def cpu(memory: float, rate: float) -> Machine:
    """This machine's processor, on which all products run in fp32 at `rate`."""
    return Machine(
        "cpu", memory, rate, rate, rate, 20e9, 20e9, 20e9, 1, runtime=0.35e9, efficiency=CPU_EFFICIENCY, price=0.0
    )
