"""What a module says of its adapters where the user says nothing: ``adapter_defaults()``."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lightning_peft import engine

if TYPE_CHECKING:
    from lightning_peft.arguments import LoRAArguments
    from lightning_peft.plugin.injection_settings import InjectionSettings

HOOK = "adapter_defaults"


@dataclass(frozen=True)
class AdapterDefaults:
    """Submodules of the pretrained model that a module treats in another way than the rest.

    Attributes:
        left: Names of submodules that get no adapter and stay as precise as they are, unless
            ``target_modules`` names them.
        saved: Names of submodules that are trained in full, as those of ``modules_to_save``.
        dense: Names of further submodules that are not quantized.
    """

    left: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()


def with_adapter_defaults(
    settings: InjectionSettings, arguments: LoRAArguments, module: Any
) -> InjectionSettings:
    """Returns settings with what ``module`` says by a method ``adapter_defaults``.

    It is not asked where the user names the parts to adapt; a ready config is taken as it is.
    """
    hook = getattr(module, HOOK, None)
    if hook is None or settings.adapt is not None:
        return settings
    defaults: AdapterDefaults = hook()
    wanted = getattr(settings.peft_config, "target_modules", None)
    left = [name for name in defaults.left if not names_part(wanted, name)]
    peft_config, quantization = settings.peft_config, settings.quantization_config
    if arguments.peft_config is None:
        peft_config = copy.copy(peft_config)
        peft_config.exclude_modules = _excluded(peft_config.exclude_modules, left)
        saved = [*(peft_config.modules_to_save or []), *defaults.saved]
        peft_config.modules_to_save = list(dict.fromkeys(saved)) or None
    if quantization is not None and getattr(arguments, "quantization_config", None) is None:
        backend = engine.backend_for(quantization)
        dense = [*backend.skip_modules(quantization), *left, *defaults.dense]
        quantization = copy.copy(quantization)
        setattr(quantization, backend.skip_argument, list(dict.fromkeys(dense)) or None)
    return replace(settings, peft_config=peft_config, quantization_config=quantization)


def names_part(wanted: str | Iterable[str] | None, part: str) -> bool:
    """Whether ``target_modules`` has a step of the name of a submodule, such as its own."""
    steps = "|".join(re.escape(step) for step in part.split(".") if step != "model")
    word = re.compile(rf"(?<![A-Za-z0-9_])(?:{steps})(?![A-Za-z0-9_])")
    entries = [wanted] if isinstance(wanted, str) else list(wanted or ())
    return any(word.search(entry) for entry in entries)


def _excluded(given: str | Iterable[str] | None, left: list[str]) -> Any:
    """Returns ``exclude_modules`` with what is given and what is left."""
    if not left:
        return given
    patterns = [rf"(.*\.)?{re.escape(name)}(\..*)?" for name in left]
    if isinstance(given, str):
        return "|".join([f"(?:{given})", *patterns])
    # As PEFT reads a list: the last steps of a name.
    return "|".join([*(rf"(.*\.)?{re.escape(name)}" for name in given or ()), *patterns])
