"""Memory of runs with several processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lightning_peft import engine
from lightning_peft.plan.memory_tracker import MemoryTracker
from lightning_peft.plan.settings import PlanSettings

# Weights that are there while they are computed with, and the buffers in which DDP averages.
GATHERED, BUCKETS = "gathered", "gradient_buckets"
# In the backward pass, the block that computes and the buffer of the next one, whose parts are on
# their way; in the forward pass, which holds less, another buffer (torch.distributed.fsdp).
_BLOCKS_AT_ONCE = 2


@dataclass(frozen=True)
class Gathered:
    """Bytes of weights that a process gathers from all of them."""

    # Those outside of blocks, which stay for the step.
    outside: int = 0
    # All that are gathered for a batch, those of blocks twice.
    batch: int = 0

    def at_start(self, live: Mapping[str, int]) -> dict[str, int]:
        """Returns the bytes by purpose when the weights outside of blocks come.

        They come in a buffer, which is given back when the first block comes. Nothing is computed
        before.
        """
        return {**live, GATHERED: 2 * self.outside} if self.outside else {}


def share_weights(
    module: nn.Module, settings: PlanSettings, tracker: MemoryTracker, names: tuple[str, str]
) -> Gathered:
    """Leaves in ``tracker``, where all weights are, what a process holds and gathers meanwhile.

    ``names`` are the purposes of quantized and of other weights there.
    """
    if not settings.is_sharded:
        return Gathered()
    engine.check_shardable(module)
    sizes: Counter[str | None] = Counter()
    for weight in engine.shared_weights(module):
        share = weight.share(settings.processes)
        tracker.hold(names[0] if weight.is_quantized else names[1], share - weight.bytes)
        sizes[weight.block] += share * settings.processes
    outside = sizes.pop(None, 0)
    tracker.hold(GATHERED, outside + _BLOCKS_AT_ONCE * max(sizes.values(), default=0))
    tracker.forget_peak()
    # Blocks are given back after the forward pass, and gathered once more for the backward pass.
    return Gathered(outside, outside + 2 * sum(sizes.values()))
