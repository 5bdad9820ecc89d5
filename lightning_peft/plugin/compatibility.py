"""Unsupported combinations, found before training."""

from __future__ import annotations

from typing import Any

from lightning_peft import engine
from lightning_peft.compat.lightning import pruned_parameters, start_method_of, trainer_of
from lightning_peft.errors import UnsupportedError, itemize
from lightning_peft.plugin.averaging import AVERAGING_CALLBACKS
from lightning_peft.plugin.unfreezing import finetuning_problems

# By name, since each Lightning package has its own classes.
REFUSED_CALLBACKS = {
    "QuantizationAwareTraining": "it replaces layers of the frozen base, which no checkpoint holds",
}
PRUNING_CALLBACK = "ModelPruning"


def check_compatibility(module: Any, strategy: Any, quantized: bool) -> None:
    """Looks at the strategy, its devices and plugins, and the callbacks."""
    problems = []
    precisions = {cls.__name__ for cls in type(strategy.precision_plugin).__mro__}
    if "BitsandbytesPrecision" in precisions:
        problems.append(
            "plugins=BitsandbytesPrecision: it would quantize the adapters too and freeze "
            "everything. Remove it: QLoRAStrategy quantizes the base itself"
        )
    if "DoublePrecision" in precisions and quantized:
        problems.append(
            "precision='64-true': products with quantized weights are computed in 16 and 32 bits. "
            "Use another precision, or LoRA without quantization"
        )
    devices = getattr(strategy, "parallel_devices", None) or [strategy.root_device]
    problems += [
        f"device {kind!r}: neither bitsandbytes' kernels nor the adapters were ever tested "
        "there. Use accelerator='gpu' or 'cpu'"
        for kind in sorted({device.type for device in devices} & {"mps", "xla"})
    ]
    start_method = start_method_of(strategy)
    if start_method != "popen":
        problems.append(
            f"start_method={start_method!r}: the trained adapters would stay in the processes "
            "it starts and be lost with them. Use strategy='ddp', from a script"
        )
    callbacks = getattr(trainer_of(module), "callbacks", [])
    processes = len(devices) * getattr(strategy, "num_nodes", 1)
    problems += finetuning_problems(callbacks, processes, AVERAGING_CALLBACKS)
    for callback in callbacks:
        problems += [
            f"callback {type(callback).__name__}: {REFUSED_CALLBACKS[cls.__name__]}. Remove it"
            for cls in type(callback).__mro__
            if cls.__name__ in REFUSED_CALLBACKS
        ]
    if problems:
        raise UnsupportedError("Adapters cannot be trained together with:" + itemize(problems))


def check_pruning(module: Any) -> None:
    """Looks at what Lightning's pruning callbacks have chosen, once adapters are there."""
    params = dict(module.named_parameters(remove_duplicate=False))
    frozen = {id(params[n]): n for n in engine.require_record(module).frozen if n in params}
    problems = []
    for callback in getattr(trainer_of(module), "callbacks", []):
        if PRUNING_CALLBACK not in [cls.__name__ for cls in type(callback).__mro__]:
            continue
        chosen = [layer._parameters.get(name) for layer, name in pruned_parameters(callback)]
        names = [frozen[id(param)] for param in chosen if id(param) in frozen]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(
                f"callback {type(callback).__name__}, which would change weights of the frozen "
                f"base: {', '.join(names[:3])}{more}. No checkpoint holds them. Prune before the "
                "fit, or name layers that train in full in its `parameters_to_prune`, such as a "
                "head"
            )
    if problems:
        raise UnsupportedError("Adapters cannot be trained together with:" + itemize(problems))
