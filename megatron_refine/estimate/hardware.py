"""The machine that an estimate is for. The figures are vendors' peaks; how much of them is reached is a range."""

from pathlib import Path

from pydantic import Field

from megatron_refine.config import Section, read_as


class Hardware(Section):
    """Defaults: nodes of eight H100 SXM (NVIDIA's data sheets), a 400 Gb/s port each. Bandwidths are one direction."""

    name: str = "H100"
    peak_flops: float = Field(989e12, gt=0, description="dense bf16 matmul FLOP/s of a GPU")
    peak_fp32_flops: float = Field(67e12, gt=0, description="the same in fp32, for train.precision=fp32")
    memory_bytes: float = Field(80e9, gt=0, description="of a GPU")
    usable: float = Field(0.9, gt=0, le=1, description="share of the memory for tensors; the rest: CUDA, NCCL, gaps")
    memory_bandwidth: float = Field(3.35e12, gt=0, description="bytes/s")
    gpus_per_node: int = Field(8, ge=1)
    node_bandwidth: float = Field(450e9, gt=0, description="bytes/s of a GPU to others of its node: NVLink 4")
    node_latency: float = Field(5e-6, gt=0, description="seconds of a hop of a collective within a node")
    network_bandwidth: float = Field(50e9, gt=0, description="bytes/s of a GPU to other nodes")
    network_latency: float = Field(15e-6, gt=0, description="seconds of a hop between nodes")
    reached_bandwidth: float = Field(0.75, gt=0, le=1, description="share of a link that a collective reaches")
    slow: float = Field(0.30, gt=0, le=1, description="share of peak_flops that a step's matmuls reach, at worst")
    fast: float = Field(0.55, gt=0, le=1, description="at best")
    launch: float = Field(6e-6, ge=0, description="seconds to start a kernel, for which decoding waits")

    def peak(self, precision: str) -> float:
        """FLOP/s of a GPU in train.precision."""
        return self.peak_flops if precision == "bf16" else self.peak_fp32_flops


def read_hardware(path: Path | None) -> Hardware:
    """A YAML file of these keys, or the defaults. Raises ConfigError."""
    return read_as(path, Hardware) if path else Hardware()
