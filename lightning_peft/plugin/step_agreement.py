"""Several processes, of which each may be out of memory: asked before they exchange anything.

DDP exchanges gradients inside of the backward pass, where processes with enough memory would wait
for the one without. Here nothing is exchanged there. At the end of each batch, and before what a
step exchanges through the strategy, all processes say whether they had memory; one without says so
the next time that it would have been asked, and all of them leave the batch there. Only then are
gradients averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import nn

from lightning_peft import engine
from lightning_peft.compat.lightning import averages_by_hook, has_static_graph, is_accumulating
from lightning_peft.compat.torch_distributed import broadcast_buffers, exchanges_of
from lightning_peft.errors import UnsupportedError
from lightning_peft.plugin.failure_notice import FailureNotice
from lightning_peft.plugin.launch import can_restart, stale_addresses

# Of the pieces in which gradients are averaged, as DDP's; in bytes.
_BUCKET = 25 * 2**20
_EXCHANGES = ("reduce", "all_gather", "broadcast", "barrier")


class OtherProcessError(torch.OutOfMemoryError):
    """Another process is out of memory."""


class StepAgreement:
    """What the processes of a fit ask each other in each batch, and the mean of their gradients."""

    def __init__(self, trainer: Any, failures: FailureNotice) -> None:
        self._strategy, self._fit = trainer.strategy, trainer.fit_loop
        self._module: nn.Module = trainer.lightning_module
        self._ddp: Any = self._strategy.model
        self._distributed = import_module("torch.distributed")
        # Of the CPU, so that asking does not wait for a GPU.
        self._group = self._distributed.new_group(backend="gloo")
        # Whether all have had memory for the batch, and what comes is exchanged as usual.
        self._settled = True
        self._known, self._serves = 0, False
        self._extend(self._strategy, "on_train_batch_start", self._begin)
        for name in _EXCHANGES:
            self._extend(self._strategy, name, self._exchange)
        self._extend(self._strategy.precision_plugin, "post_backward", self._end)
        self._ddp.require_backward_grad_sync = self._ddp.require_forward_param_sync = False
        self._failures, failures.waits_alone = failures, self._waits_alone

    @staticmethod
    def _extend(owner: Any, name: str, around: Callable[..., Any]) -> None:
        usual = getattr(owner, name)

        def extended(*args: Any, **kwargs: Any) -> Any:
            return around(usual, *args, **kwargs)

        # A function, since Lightning copies what it logs with, and what a partial holds with it.
        owner.__dict__[name] = extended

    def stop(self) -> None:
        """Gives strategy and DDP their own ways back."""
        # What is logged keeps a function of here.
        self._settled, self._failures.waits_alone = True, None
        for name in ("on_train_batch_start", *_EXCHANGES):
            self._strategy.__dict__.pop(name, None)
        self._strategy.precision_plugin.__dict__.pop("post_backward", None)
        self._ddp.require_backward_grad_sync = self._ddp.require_forward_param_sync = True
        self._distributed.destroy_process_group(self._group)

    def begin(self) -> None:
        """Called before a batch is fetched."""
        self._settled = False

    def leaves(self, error: torch.OutOfMemoryError) -> bool:
        """Whether all processes leave the batch after ``error``; else the others are past it."""
        if self._settled:
            return False
        if not isinstance(error, OtherProcessError):
            self._ask(short=True)
        return True

    def _begin(self, usual: Callable[..., Any], *args: Any) -> Any:
        self._ask()
        result = usual(*args)
        # The strategy's own checks exchange something too.
        self.begin_closure()
        return result

    def begin_closure(self) -> None:
        """Called before each closure of a batch; an optimizer may call several."""
        self._known = self._count()

    def _exchange(self, usual: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._settled:
            self._ask()
        before, self._serves = self._count(), True
        result = usual(*args, **kwargs)
        self._known += self._count() - before
        self._serves = False
        return result

    def _end(self, usual: Callable[..., Any], *args: Any) -> Any:
        """Comes between the backward pass and what looks at gradients."""
        reached = self._ask()
        problem = self._waits_alone()
        if problem is not None:
            raise UnsupportedError(problem)
        averages = not is_accumulating(self._fit)
        buckets = self._copies(reached) if averages else []
        if averages:
            # Once more, since copies need memory too.
            self._ask()
        self._settled = True
        if averages:
            self._average(buckets)
            broadcast_buffers(self._ddp)
        return usual(*args)

    def _waits_alone(self) -> str | None:
        if self._settled or self._serves or self._count() == self._known:
            return None
        return (
            "halve_batch_on_oom=True with several processes: training_step, or its backward "
            "pass, exchanges something by torch.distributed (SyncBatchNorm and all_gather "
            "with sync_grads=True do), where a process out of memory would leave the others "
            "waiting. Use self.trainer.strategy.reduce or sync_dist=True, which are served, "
            "or halve_batch_on_oom=False with a smaller batch_size."
        )

    def _count(self) -> int:
        return exchanges_of(self._distributed.group.WORLD)

    def _ask(self, short: bool = False) -> list[bool]:
        """Returns which trained parameters have a gradient in any process.

        Raises:
            OtherProcessError: If a process is out of memory.
        """
        number = (self._strategy.global_rank + 1) * short
        mine = [number, *(p.grad is not None for p in self._trained())]
        answers = torch.tensor(mine, dtype=torch.int32)
        biggest = self._distributed.ReduceOp.MAX
        if short:
            self._failures.report_shortage()
        asked = self._distributed.all_reduce(answers, biggest, self._group, async_op=True)
        if short:
            self._failures.wait_for(asked.is_completed)
            self._failures.end_shortage()
        asked.wait()
        number, *reached = answers.tolist()
        if number and not short:
            raise OtherProcessError(f"process {number - 1} is out of memory")
        return [bool(one) for one in reached]

    def _trained(self) -> list[nn.Parameter]:
        return [param for param in self._module.parameters() if param.requires_grad]

    def _copies(self, reached: list[bool]) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
        """Returns gradients in buckets, each with a copy of its share of the mean.

        A parameter that no process reached has none.
        """
        found = []
        for param, used in zip(self._trained(), reached, strict=True):
            if used and param.grad is None:
                param.grad = torch.zeros_like(param)
            if param.grad is not None:
                found.append(param.grad)
        share = 1 / self._strategy.world_size
        return [
            (bucket, torch.cat([gradient.reshape(-1) for gradient in bucket]).mul_(share))
            for bucket in _buckets(found)
        ]

    def _average(self, buckets: list[tuple[list[torch.Tensor], torch.Tensor]]) -> None:
        """Averages gradients as DDP does."""
        while buckets:
            bucket, flat = buckets.pop()
            self._distributed.all_reduce(flat)
            for gradient, mean in zip(
                bucket, flat.split([one.numel() for one in bucket]), strict=True
            ):
                gradient.copy_(mean.view_as(gradient))


def _buckets(gradients: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yields gradients of one dtype, of about so many bytes together."""
    kinds: dict[torch.dtype, list[torch.Tensor]] = {}
    for gradient in gradients:
        bucket = kinds.setdefault(gradient.dtype, [])
        bucket.append(gradient)
        if sum(one.nbytes for one in bucket) >= _BUCKET:
            yield kinds.pop(gradient.dtype)
    yield from kinds.values()


def process_problems(trainer: Any, batches: tuple[int, float]) -> list[str]:
    """Returns why processes cannot make their batches smaller together.

    ``batches`` is the size of a batch and the number of batches in this process.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    if not strategy.shards_base:
        problems = _ddp_problems(strategy, module)
    elif can_restart():
        problems = stale_addresses()
    else:
        problems = [
            "sharding='fsdp2' without torchrun --max-restarts: processes exchange parts of the "
            "base within a step, where one that is out of memory leaves the others waiting until "
            "all are started again. Start it by torchrun, or give a smaller batch_size"
        ]
    everyone = engine.gathered(batches, trainer.world_size)
    if len(set(everyone)) > 1:
        problems.append(f"other batches in each process (size and number: {everyone})")
    return problems


def _ddp_problems(strategy: Any, module: nn.Module) -> list[str]:
    """Returns why gradients cannot be averaged after the backward pass, or not by DDP alone."""
    problems = []
    if averages_by_hook(strategy):
        problems.append("ddp_comm_hook: gradients are averaged after the backward pass, without it")
    if has_static_graph(strategy):
        problems.append(
            "ddp_kwargs={'static_graph': True}: DDP learns the graph in a backward pass of its "
            "own, and takes part in none here. Leave it out"
        )
    if any(isinstance(one, nn.SyncBatchNorm) for one in module.modules()):
        problems.append(
            "SyncBatchNorm in several processes, which exchange its sums within a step, where one "
            "that is out of memory would leave the others waiting"
        )
    if any(getattr(one, "sparse", False) for one in module.modules()):
        problems.append("embeddings with sparse=True in several processes")
    return problems
