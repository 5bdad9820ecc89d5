"""Automatic checks at the start of training: structure, first step and agreement of processes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch

from lightning_peft import engine
from lightning_peft.compat.lightning import averages_models
from lightning_peft.compat.torch import tree_leaves
from lightning_peft.errors import ConfigError, LifecycleError, itemize
from lightning_peft.plugin.adapter_checks import exclusion_advice

log = logging.getLogger(__name__)

_REENTRANT = (
    "Under torch.utils.checkpoint, use_reentrant=True has no gradient where no input needs one, as "
    "behind a frozen embedding: pass use_reentrant=False. "
)

Mode = Literal["cheap", "full", "off"]


class ProcessChecks:
    """Ends all processes with the same error where one of them finds something wrong.

    What is compared is exchanged between batches, which all processes begin equally often: steps of
    optimizers may depend on the process where a module takes them itself.

    Raises:
        LifecycleError: In all processes, with what any of them found.
    """

    def __init__(
        self, strategy: Any, restored: engine.RestoredState, structural: list[str]
    ) -> None:
        self._strategy = strategy
        module = strategy.lightning_module
        mine = structural + engine.own_problems(module, strategy.optimizers, restored)
        facts = {"problems": mine, "trained": engine.checksums_of_trained(module)}
        everyone = engine.gathered(facts, strategy.world_size)
        problems = _problems_of_each(everyone)
        problems += engine.differing_problems("adapters", [one["trained"] for one in everyone])
        if problems:
            raise LifecycleError(
                "The processes cannot train together as they are:" + itemize(problems, 8) + _OFF
            )
        self._bits = engine.GatheredBits(module)
        self._postponed = False
        self._batch: int | None = None

    def note_batch(self, batch: Any) -> None:
        """Remembers the first batch, to be compared after its step."""
        tensors = [
            one
            for one in tree_leaves(batch)
            if type(one) is torch.Tensor and one.layout == torch.strided and one.numel()
        ]
        if self._batch is None and tensors:
            self._batch = hash(tuple(engine.exact_checksum(one) for one in tensors))

    def after_batch(
        self, gradients: Mapping[str, str], infinite: list[str], due: bool, last: bool
    ) -> bool:
        """Compares once all processes have taken a step; returns whether that is done."""
        module = self._strategy.lightning_module
        stepped, unreached = bool(gradients) or not due, "none" in gradients.values()
        everyone = engine.gathered((stepped, unreached), self._strategy.world_size)
        if not all(stepped for stepped, _ in everyone):
            return False
        if any(unreached for _, unreached in everyone) and not (self._postponed or last):
            # In its next pass DDP says what it needs for that, before anything differs for long.
            self._postponed = True
            return False
        problems = engine.gradient_problems(module, gradients, infinite)
        if self._bits.changed:
            names = ", ".join(self._bits.changed[:5])
            problems.append(f"gathering changed bits of the frozen base: {names}")
        facts = {
            "problems": problems,
            "gathered": self._bits.sums,
            "gradients": gradients,
            "trained": engine.checksums_of_trained(module),
            "batch": self._batch,
        }
        self.stop()
        everyone = engine.gathered(facts, self._strategy.world_size)
        problems = _problems_of_each(everyone)
        compared = {"gathered": "bits of the base", "gradients": "layers with gradients"}
        if not averages_models(self._strategy):
            compared["trained"] = "adapters after a step"
        for key, what in compared.items():
            problems += engine.differing_problems(what, [one[key] for one in everyone])
        if problems:
            raise LifecycleError(
                "After the first step the processes do not train together:"
                + itemize(problems, 8)
                + _OFF
            )
        if self._strategy.is_global_zero and {self._batch} == {one["batch"] for one in everyone}:
            _warn_of_same_rows(self._batch)
        return True

    def stop(self) -> None:
        """Takes away all hooks."""
        self._bits.stop()


def _warn_of_same_rows(batch: int | None) -> None:
    if batch is not None:
        log.warning(
            "The first batch is the same in all processes: each of them trains on the same rows, "
            "and several devices are of no use. Lightning gives each process its own rows of a "
            "dataset with a length, unless use_distributed_sampler=False. An iterable dataset has "
            "to do it itself, by the rank (datasets: split_dataset_by_node)."
        )


_OFF = (
    "\nWhat they train would not be what one process trains. If a hook of the module does this on "
    "purpose, pass verify='off'."
)


def _problems_of_each(everyone: list[Any]) -> list[str]:
    ranks: dict[str, list[int]] = {}
    for rank, one in enumerate(everyone):
        for problem in one["problems"]:
            ranks.setdefault(problem, []).append(rank)
    return [
        f"process{'es' if len(some) > 1 else ''} {', '.join(map(str, some))}: {problem}"
        for problem, some in ranks.items()
    ]


class TrainingChecks:
    """Runs at the start of training, and then is gone; the modes are those of ``verify=``.

    Raises:
        ConfigError: If it is another one.
    """

    def __init__(self, mode: Mode) -> None:
        if mode not in get_args(Mode):
            raise ConfigError(f"verify={mode!r}: choose one of {', '.join(get_args(Mode))}.")
        self.mode = mode
        self._full_is_due = False
        self._has_started = False
        self._first_step_is_due = True
        self._first_step: FirstStepCheck | None = None
        self._processes: ProcessChecks | None = None
        self.restored = engine.RestoredState()

    def new_run(self) -> None:
        """Called when a run is set up, before training starts in it."""
        self._has_started, self._first_step_is_due = False, True

    def start(self, strategy: Any) -> None:
        """Checks the structure, and arranges for the rest.

        The values are looked at once in a run. Where training starts again in it, Lightning's tuner
        makes one trial after another from whatever the last one left, and restores the weights.
        """
        self.stop()
        if self.mode == "off":
            return
        problems: list[str] = []
        if not self._has_started:
            problems = engine.structural_problems(strategy.lightning_module)
            if problems and strategy.world_size == 1:
                raise LifecycleError("The adapters cannot train as they are:" + itemize(problems))
            self._full_is_due = self.mode == "full"
        self._has_started = True
        if self._first_step_is_due:
            self._first_step = FirstStepCheck(strategy)
            if strategy.world_size > 1:
                self._processes = ProcessChecks(strategy, self.restored, problems)
        self.restored = engine.RestoredState()

    def before_batch(self, strategy: Any, batch: Any) -> None:
        """Compares processes after their first step; verifies in full before the first batch."""
        self._compare_processes()
        if self._processes is not None:
            self._processes.note_batch(batch)
        if self._full_is_due:
            if batch is None:
                log.warning(
                    "verify='full': training_step fetches its batches itself (dataloader_iter), so "
                    "there is none to verify with. Call lightning_peft.verify(module, batch, step)."
                )
            else:
                _verify_on_all_ranks(strategy, batch)
            # After it: where memory is short, a smaller batch is checked.
            self._full_is_due = False

    def _compare_processes(self, last: bool = False) -> None:
        first = self._first_step
        if self._processes is None or first is None:
            return
        if self._processes.after_batch(first.gradients, first.infinite, first.is_due, last):
            self._processes = None

    @property
    def compared_processes(self) -> bool:
        """Whether processes were compared after their first step, and were the same."""
        return self.mode != "off" and self._has_started and self._processes is None

    def stop(self) -> None:
        """Takes away whatever still waits for a first step."""
        self._full_is_due = False
        if self._processes is not None:
            self._processes.stop()
        self._processes = None
        if self._first_step is not None:
            self._first_step_is_due = self._first_step.is_due
            self._first_step.stop()
        self._first_step = None

    def end(self) -> None:
        """Warns of adapters that no optimizer step ever reached, when training is over."""
        self._compare_processes(last=True)
        if self._first_step is not None:
            self._first_step.warn_missing_steps()
        self.stop()


def verify_in(strategy: Any, batch: Any) -> engine.Verification:
    """Runs :func:`lightning_peft.verify` on a Trainer's module, in the Trainer's precision."""

    def step(module: Any, batch: Any) -> Any:
        with strategy.precision_plugin.train_step_context():
            return engine.default_step(module, batch)

    return engine.verify(strategy.lightning_module, batch, step)


def _verify_on_all_ranks(strategy: Any, batch: Any) -> None:
    verification = verify_in(strategy, batch)
    mine = [c for c in verification.checks if c.passed is False]
    # Here processes leave the batch together where one of them is out of memory.
    strategy.barrier("verify")
    # One rank that stops alone leaves the others waiting for it.
    everyone = engine.gathered(mine, strategy.world_size)
    verification.raise_if_failed()
    failing = [rank for rank, failed in enumerate(everyone) if failed]
    if failing:
        raise LifecycleError(
            f"Adapter verification failed on ranks {failing}; see the errors of those ranks."
        )
    if strategy.is_global_zero:
        doubtful = any("pass step=" in check.detail for check in verification.checks)
        log.log(logging.WARNING if doubtful else logging.INFO, "verify='full':\n%s", verification)


class FirstStepCheck:
    """Looks at the gradients of the adapters after the first step of each optimizer.

    An optimizer is judged when it has stepped, for the layers whose adapters it holds: with
    gradient accumulation, manual optimization or a GradScaler that skips, this may be many batches
    later. A step at which no parameter of any optimizer has a gradient is waited out: training_step
    returned None, which skips the batch, or a closure was not run, which Lightning finds.

    Of a fresh adapter one factor is zero, and the gradient of the other one with it, so layers are
    judged and not tensors.

    Attributes:
        gradients: ``"alive"``, ``"zero"`` or ``"none"`` by the name of a layer that was judged.
        infinite: Names of those with a gradient that is not finite.
    """

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy
        module = strategy.lightning_module
        self._parts: dict[str, dict[str, list[torch.nn.Parameter]]] = {}
        record = engine.require_record(module)
        # Averaged from what trains: no loss has to reach them.
        self._copies = [pair.copy for pair in record.momentum_copies]
        for name, entry in record.parts.items():
            layers = engine.adapted_layers(module.get_submodule(name))
            tensors = {
                entry.qualified(layer_name): [
                    param
                    for param in engine.adapter_parameters(layer).values()
                    if param.requires_grad
                ]
                for layer_name, layer in layers.items()
            }
            self._parts[name] = {
                n: params for n, params in tensors.items() if params and n not in record.unoptimized
            }
        self.gradients: dict[str, str] = {}
        self.infinite: list[str] = []
        self._reported: set[str] = set()
        self._indices = {id(optimizer): i for i, optimizer in enumerate(strategy.optimizers)}
        self._handles = {
            index: optimizer.register_step_post_hook(self._after_step)
            for index, optimizer in enumerate(strategy.optimizers)
            # Lightning takes whatever has groups and states for an optimizer.
            if isinstance(optimizer, torch.optim.Optimizer) and self._layers_of(optimizer)
        }

    @property
    def is_due(self) -> bool:
        """Whether an optimizer is still waited for."""
        return bool(self._handles)

    def _layers_of(self, optimizer: torch.optim.Optimizer) -> dict[str, list[torch.nn.Parameter]]:
        held = engine.held_ids([optimizer])
        return {
            name: params
            for layers in self._parts.values()
            for name, params in layers.items()
            if any(id(param) in held for param in params)
        }

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not any(_has_gradient(one) for one in self._strategy.optimizers):
            return
        if float(getattr(optimizer, "found_inf", None) or 0):
            # A fused step is called, and changes nothing, where a GradScaler found an overflow.
            return
        handle = self._handles.pop(self._indices[id(optimizer)], None)
        if handle is None:
            return
        handle.remove()
        mine = self._layers_of(optimizer)
        for name, params in mine.items():
            grads = [param.grad for param in params if param.grad is not None]
            alive = "alive" if any(bool(grad.any()) for grad in grads) else "zero"
            self.gradients.setdefault(name, alive if grads else "none")
            if not all(bool(grad.isfinite().all()) for grad in grads):
                self.infinite.append(name)
        self._evaluate()

    def _evaluate(self) -> None:
        """Judges the parts of which all layers were seen."""
        seen = [
            part
            for part, layers in self._parts.items()
            if part not in self._reported and layers and not layers.keys() - self.gradients.keys()
        ]
        self._reported |= set(seen)
        unreached = [
            part
            for part in seen
            if all(self.gradients[layer] == "none" for layer in self._parts[part])
            and not engine.inside(part, self._copies)
        ]
        if unreached:
            self.stop()
            module = type(self._strategy.lightning_module).__name__
            raise LifecycleError(
                "After the first step, no gradient has reached any adapter on:"
                + itemize(part or module for part in unreached)
                + "\nThe loss does not depend on them: they are not called in training_step, run "
                "under no_grad, or their output is detached. "
                + _REENTRANT
                + exclusion_advice(unreached, self._parts)
                + "Where a later step will reach them, pass verify='off'."
            )
        layers = [layer for part in seen for layer in self._parts[part]]
        idle = [layer for layer in layers if self.gradients[layer] != "alive"]
        if idle and self._strategy.is_global_zero:
            log.warning(
                "In the first step no gradient reached %d of %d adapted layers: %s%s. That is "
                "right where the module does not use them, or multiplies them by zero at first; "
                "lightning_peft.verify looks closer. %s",
                len(idle),
                len(layers),
                ", ".join(idle[:5]),
                f" and {len(idle) - 5} more" if len(idle) > 5 else "",
                _REENTRANT if "none" in map(self.gradients.get, idle) else "",
            )

    def warn_missing_steps(self) -> None:
        """Warns of optimizers that hold adapters and never stepped."""
        if self._handles and self._strategy.is_global_zero:
            names = [
                f"{index} ({type(self._strategy.optimizers[index]).__name__})"
                for index in self._handles
            ]
            log.warning(
                "Training ended before the first step with a gradient of optimizer %s: the "
                "adapters in it are as they were.",
                ", ".join(names),
            )

    def stop(self) -> None:
        """Removes all hooks."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}


def _has_gradient(optimizer: Any) -> bool:
    return any(param.grad is not None for param in engine.held_parameters(optimizer))
