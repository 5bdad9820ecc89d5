"""What the process of a run holds besides tensors: libraries, compiled kernels, freed blocks."""

from __future__ import annotations

from lightning_peft.plan import margins
from lightning_peft.plan.memory_tracker import ACTIVATIONS, DEQUANTIZATION, LOGITS
from lightning_peft.plan.trace import Trace

OVERHEAD, KERNELS, HEAP = "overhead", "kernels", "heap"
PROCESS = (OVERHEAD, KERNELS, HEAP)


def process_bytes(traced: Trace, device: str, end: int = 1) -> dict[str, int]:
    """Returns the bytes of the process by purpose.

    The kernels are those of one length of batches at least, and as many as are kept at most; how
    many lengths there are is only known when a run is over.

    Args:
        traced: The step.
        device: ``"cpu"`` or ``"cuda"``, where only the overhead is counted.
        end: 0 for the least, 1 for what is usual, 2 for the most.
    """
    found = {OVERHEAD: margins.OVERHEAD[device][end], KERNELS: 0, HEAP: 0}
    if device == "cpu":
        most = margins.KERNELS_KEPT if traced.products else 0
        kept = (min(traced.products, most), most // 2, most)[end]
        moving = sum(traced.at_peak.get(one, 0) for one in (ACTIVATIONS, LOGITS, DEQUANTIZATION))
        found[KERNELS] = kept * margins.KERNEL_BYTES
        found[HEAP] = round(moving * margins.HEAP[end])
    return found
