"""Compute, memory and network bounds of a training step on GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lightning_peft.errors import ConfigError, itemize
from lightning_peft.plan.work import Work

# TFLOP/s of dense 16-bit products with float32 sums, GB/s of the memory, GB/s that a GPU sends to
# others of its node (NVLink, else PCIe), GB/s that a node sends to others: eight adapters of 400 or
# 200 Gbit/s in the nodes that makers sell with such GPUs, else one of 100 Gbit/s.
_MAKERS = {
    "t4": (65, 320, 16, 12.5),
    "v100-32": (125, 900, 150, 12.5),
    "l4": (121, 300, 32, 12.5),
    "l40s": (362, 864, 32, 12.5),
    "a10": (125, 600, 32, 12.5),
    "a40": (150, 696, 32, 12.5),
    "a100-40": (312, 1555, 300, 200),
    "a100-80": (312, 2039, 300, 200),
    "h100": (989, 3350, 450, 400),
    "h200": (989, 4800, 450, 400),
    "b200": (2250, 8000, 900, 400),
    "rtx3090": (71, 936, 32, 12.5),
    "rtx4090": (165, 1008, 32, 12.5),
    "rtx5090": (210, 1792, 64, 12.5),
    "rtxa6000": (155, 768, 32, 12.5),
}


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs in equal nodes."""

    gpus: int
    nodes: int
    # TFLOP/s of a GPU, and GB/s: of its memory, to the others of its node, and from node to node.
    # None where it is not known.
    tflops: float | None = None
    memory_bandwidth: float | None = None
    link_bandwidth: float | None = None
    network_bandwidth: float | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value!r}: a number above 0"
            for name, value in asdict(self).items()
            if value is not None and not value > 0
        ]
        if problems:
            raise ConfigError("These GPUs cannot be planned with:" + itemize(problems))

    @property
    def processes(self) -> int:
        """One for each GPU."""
        return self.gpus * self.nodes

    @property
    def figures(self) -> dict[str, float | None]:
        """The figures by name."""
        return {name: getattr(self, name) for name in FIGURES}

    @property
    def missing(self) -> list[str]:
        """Names of the figures that bounds of a step need, and that are not known."""
        unused = {"link_bandwidth": self.gpus == 1, "network_bandwidth": self.nodes == 1}
        return [n for n, value in self.figures.items() if value is None and not unused.get(n)]


# The names of the figures that can be given instead of a maker's.
FIGURES = tuple(field.name for field in fields(Cluster))[2:]


@dataclass(frozen=True)
class StepBounds:
    """The least seconds of a step by each bound, at full speed; the largest bounds it."""

    compute: float
    # Reading and writing, each operation for itself.
    memory: float
    # Weights and gradients between GPUs; what hides behind computing is counted.
    interconnect: float

    @property
    def bound(self) -> str:
        """The name of the largest one."""
        return max(asdict(self), key=asdict(self).__getitem__)

    @property
    def seconds(self) -> float:
        """The largest one."""
        return max(asdict(self).values())


def step_bounds(work: Work, cluster: Cluster) -> StepBounds | None:
    """Returns the bounds of a step of one process; ``None`` where a figure is not known.

    All GPUs take it at once, and what a node sends to others passes through its network once.
    """
    if cluster.missing:
        return None
    tflops, memory, link, network = (value or 0.0 for value in cluster.figures.values())
    sent = work.sent(cluster.processes)
    slowest = max(
        sent / link if cluster.gpus > 1 else 0.0, sent / network if cluster.nodes > 1 else 0.0
    )
    return StepBounds(work.flops / (tflops * 1e12), work.moved / (memory * 1e9), slowest / 1e9)


def cluster_of(gpu: str | None, gpus: int, nodes: int, given: Mapping[str, Any]) -> Cluster:
    """Returns the cluster; figures in ``given`` replace those of the maker of ``gpu``."""
    alike = "h100" if gpu == "h100-80" else gpu or ""
    figures = dict(zip(FIGURES, _MAKERS.get(alike, ()), strict=False))
    figures |= {name: value for name, value in given.items() if value is not None}
    return Cluster(gpus, nodes, **figures)
