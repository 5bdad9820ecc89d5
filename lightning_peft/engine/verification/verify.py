"""``verify``: all checks on the user's module and batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.compat.torch import BatchNorm
from lightning_peft.engine.adapters import (
    adapted_layers,
    adapted_layers_of,
    adapter_parameters,
    adapters_have_no_effect,
    disable_adapters,
    refuse_merged,
)
from lightning_peft.engine.backends.registry import backend_of, is_quantized
from lightning_peft.engine.fingerprint import exact_checksum
from lightning_peft.engine.gathering import gathered, group_size
from lightning_peft.engine.layers.mixin import stored_parameter
from lightning_peft.engine.record import AdaptedModuleRecord, adapted_parts, require_record
from lightning_peft.engine.sharding import call_inside, local_part, reshard_base
from lightning_peft.engine.verification.gradients import (
    active_tensors,
    adapters_act_in_evaluation,
    base_passes_gradients,
    gradients_reach_adapters,
    recorded_usage,
    same_gradients,
)
from lightning_peft.engine.verification.probe import (
    ModuleProbe,
    NoLossError,
    Step,
    default_step,
    mutable_parameters,
    perturbed,
    preserved_state,
)
from lightning_peft.engine.verification.result import Check, Verification, abbreviated
from lightning_peft.engine.verification.round_trip import (
    adapter_files_round_trip,
    checkpoint_round_trip,
)

__all__ = ["Check", "Verification", "default_step", "verify"]

REQUIRES_LOSS = (
    "no effect before training",
    "gradients reach every adapter after an evaluation pass",
    "gradients are the same before and after an evaluation pass",
    "adapters act in evaluation as they do in training",
)


def verify(module: nn.Module, batch: Any, step: Step | None = None) -> Verification:
    """Checks adapters by running them: forward in eval and train mode, backward, save and load.

    About a dozen passes, however many layers there are. Trainable parameters, gradients, buffers,
    plain attributes, train modes and random states (Python, NumPy, torch) are put back afterwards.

    Where processes share the frozen base, all of them have to call it.

    Args:
        module: A module with adapters.
        batch: One batch, on the module's device.
        step: ``step(module, batch)`` returns a scalar loss. By default ``training_step`` where the
            module has one, else the ``loss`` of the output, else the mean square of the output. A
            ``training_step`` that steps its optimizers itself gives none: pass ``step``.

    Returns:
        One line per checked property. Where the module gives no loss, the checks that need one
        say so and neither pass nor fail.

    Raises:
        LifecycleError: If the module has no adapters, or merged ones.
    """
    shards = require_record(module).shards
    refuse_merged(module, "Checking")
    own_step = step or default_step
    if shards > 1:
        reshard_base(module)
    # Code that torch.compile made before the check has no room for its hooks.
    with torch.compiler.set_stance("force_eager"), preserved_state(module):
        base = _BaseSnapshot(module)
        probe = ModuleProbe(module, batch, _inside(own_step))
        problems = structural_problems(module)
        count = len(adapted_layers_of(module))
        in_place = Check(
            "adapters are in place and switched on",
            not problems,
            abbreviated(problems) if problems else f"{count} layers",
        )
        try:
            if shards > 1:
                _agree_on_loss(module, batch, own_step)
            checks = _checks_with_loss(probe)
            loss: Callable[[], Tensor | None] = probe.evaluate
        except NoLossError as error:
            why = f"not checkable this way, as {error}: pass step="
            checks = [Check(name, None, why) for name in REQUIRES_LOSS]
            checks.insert(1, base_passes_gradients(module))
            loss = _no_loss
        checks.insert(0, in_place)
        # Before the round trips, which change values themselves.
        unchanged = base.check()
        trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
        # Other values than those of a fresh adapter, which may be all zero.
        with perturbed(module, trainable):
            checks += [checkpoint_round_trip(module, loss), adapter_files_round_trip(module, loss)]
        checks.append(unchanged)
    return Verification(checks)


def _agree_on_loss(module: nn.Module, batch: Any, step: Step) -> None:
    """Runs one pass, and lets all processes do without a loss where one of them has none.

    In other numbers of passes they would wait for each other.
    """
    missing: list[str] = []

    def attempt(one: nn.Module, batch: Any) -> Tensor:
        try:
            return step(one, batch)
        except NoLossError as error:
            # Not through the module's call, whose hooks take part in what others wait for.
            missing.append(str(error))
            return torch.zeros(())

    ModuleProbe(module, batch, _inside(attempt)).evaluate()
    for rank, why in enumerate(gathered(missing, group_size())):
        if why:
            raise NoLossError(f"{why[0]} in process {rank}")


def _no_loss() -> None:
    return None


def _inside(step: Step) -> Step:
    return lambda module, batch: call_inside(module, partial(step, module, batch))


def _checks_with_loss(probe: ModuleProbe) -> list[Check]:
    module = probe.module
    tensors = active_tensors(module)
    with perturbed(module, tensors):
        # The only passes before any evaluation pass, which could spoil those after it.
        before, again = probe.gradients(tensors), probe.gradients(tensors)
    with recorded_usage(module) as first:
        loss = probe.evaluate()
    no_op = _no_effect_before_training(probe, loss)
    through = base_passes_gradients(module)
    with perturbed(module, tensors):
        with recorded_usage(module) as then:
            loss = probe.evaluate()
        after = probe.gradients(tensors)
        reach = gradients_reach_adapters(probe, after)
        act = adapters_act_in_evaluation(probe, after, first, loss, then)
        same = same_gradients(before, again, after)
        _take_a_step(probe)
    return [no_op, through, reach, same, act]


def _no_effect_before_training(probe: ModuleProbe, on: Tensor) -> Check:
    name = "no effect before training"
    if not adapters_have_no_effect(probe.module):
        return Check(name, None, "the adapters are trained, or of a kind that starts elsewhere")
    with disable_adapters(probe.module):
        off = probe.evaluate()
    if not (on.isfinite() and off.isfinite()):
        return Check(name, None, f"the loss is {on.item():g} with and {off.item():g} without them")
    difference = (on - off).abs().item()
    # Other kernels may run with adapters than without, as in nn.TransformerEncoderLayer.
    dtypes = {p.dtype for p in probe.module.parameters() if p.is_floating_point()}
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes)
    passed = difference <= min(32 * rounding, 0.01) * off.abs().item()
    return Check(name, passed, f"loss differs by {difference:g} from the base's")


def _take_a_step(probe: ModuleProbe) -> None:
    """Trains everything trainable by one optimizer step, which must not touch the base."""
    trainable = {n: p for n, p in probe.module.named_parameters() if p.requires_grad}
    if not trainable:
        return
    gradients = probe.gradients(trainable)
    for name, param in trainable.items():
        param.grad = gradients[name]
    torch.optim.AdamW(trainable.values(), lr=1e-2).step()
    probe.evaluate(keep_buffers=True)
    for param in trainable.values():
        param.grad = None


class _BaseSnapshot:
    """The frozen base of a module, bit for bit: parameters, and buffers of the same layers.

    Batch norms that train update their statistics; those are in every checkpoint.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        may_change = mutable_parameters(module)
        self.tensors = {n: p for n, p in module.named_parameters() if n not in may_change}
        frozen = {id(param) for param in self.tensors.values()}
        for prefix, child in module.named_modules():
            own = [param for param in child._parameters.values() if param is not None]
            updating = isinstance(child, BatchNorm) and child.training
            if any(id(param) in frozen for param in own) and not updating:
                self.tensors |= {
                    f"{prefix}.{name}" if prefix else name: buffer
                    for name, buffer in child._buffers.items()
                    if buffer is not None
                }
        self.sums = {n: exact_checksum(local_part(t)) for n, t in self.tensors.items()}

    def check(self) -> Check:
        """Compares the base with what it was."""
        if require_record(self.module).shards > 1:
            # No backward pass did it.
            reshard_base(self.module)
        now = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        changed = [
            name
            for name, value in self.sums.items()
            if name not in now or exact_checksum(local_part(now[name])) != value
        ]
        detail = f"changed: {abbreviated(changed)}" if changed else f"{len(self.sums)} tensors"
        return Check("base unchanged by evaluation, training and a step", not changed, detail)


REPLACED = (
    "has no adapter any more: another layer was put in its place. Build it in `__init__`, `setup` "
    "or `configure_model`, or leave it out by `exclude_modules`"
)


def structural_problems(module: nn.Module) -> list[str]:
    """Returns the problems of the adapters, without a pass through the module.

    Each problem names a layer by its name inside ``module``. Found are: adapted layers that were
    replaced or switched off, layers that are no longer quantized, or are in bitsandbytes' form
    without a backward pass, and adapter tensors that are not finite or on another device than
    their layer.
    """
    problems: list[str] = []
    for entry, part in adapted_parts(module):
        problems += _layer_problems(part, entry) + _quantization_problems(part, entry)
        problems += _tensor_problems(part, entry)
    return problems


def _layer_problems(part: nn.Module, entry: AdaptedModuleRecord) -> list[str]:
    layers = adapted_layers(part)
    targets = {target for info in entry.adapters.values() for target in info.targets}
    gone = [f"{entry.qualified(t)}: {REPLACED}" for t in sorted(targets - {*layers})]
    off = [
        f"{entry.qualified(n)}: the adapter is switched off"
        for n, layer in layers.items()
        if layer.disable_adapters
    ]
    return gone + off


def _quantization_problems(part: nn.Module, entry: AdaptedModuleRecord) -> list[str]:
    modules = dict(part.named_modules())
    problems = []
    for name in entry.quantized:
        # Around a layer that PEFT wrapped, the quantized one is one name further down.
        layer: Any = modules.get(f"{name}.base_layer", modules.get(name))
        if layer is None or bool(getattr(layer, "merged_adapters", None)):
            continue
        if not is_quantized(layer):
            problems.append(f"{entry.qualified(name)}: is not quantized any more")
            continue
        stored = stored_parameter(layer)
        backend = backend_of(stored)
        problem = None if backend is None else backend.storage_problem(stored)
        problems += [f"{entry.qualified(name)}: {problem}"] if problem else []
    return problems


def _tensor_problems(part: nn.Module, entry: AdaptedModuleRecord) -> list[str]:
    problems = []
    layers = adapted_layers(part)
    tensors = adapter_parameters(part)
    for layer in layers.values():
        own = {id(param) for param in adapter_parameters(layer).values()}
        mine = {n: param for n, param in tensors.items() if id(param) in own}
        elsewhere = {p.device for p in layer.parameters() if id(p) not in own}
        for tensor, param in mine.items():
            where = entry.qualified(tensor)
            if elsewhere and param.device not in elsewhere:
                devices = " and ".join(sorted(map(str, elsewhere)))
                problems.append(f"{where}: is on {param.device} and its layer on {devices}")
            elif not param.is_meta and not bool(torch.isfinite(param).all()):
                problems.append(f"{where}: has values that are not finite")
    return problems
