"""LoRA and QLoRA for any LightningModule, in one argument: ``Trainer(strategy=QLoRAStrategy())``.

Importing this package is cheap: its parts load on first use. The names ``"lora"`` and ``"qlora"``
are registered with Lightning as soon as Lightning is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_peft.plugin.registration import register

if TYPE_CHECKING:
    from lightning_peft.data.images import ImageData as ImageData
    from lightning_peft.data.preference import PreferenceData as PreferenceData
    from lightning_peft.data.sequence_to_sequence import Seq2SeqData as Seq2SeqData
    from lightning_peft.data.series import SeriesData as SeriesData
    from lightning_peft.data.speech import SpeechData as SpeechData
    from lightning_peft.data.supervised import SupervisedData as SupervisedData
    from lightning_peft.data.text_classification import (
        TextClassificationData as TextClassificationData,
    )
    from lightning_peft.data.token_classification import (
        TokenClassificationData as TokenClassificationData,
    )
    from lightning_peft.engine.adapters import disable_adapters as disable_adapters
    from lightning_peft.engine.adapters import set_adapter as set_adapter
    from lightning_peft.engine.files.adapter_files import save_adapter as save_adapter
    from lightning_peft.engine.files.adapter_loading import load_adapter as load_adapter
    from lightning_peft.engine.injection import inject as inject
    from lightning_peft.engine.merging import merge as merge
    from lightning_peft.engine.merging import unmerge as unmerge
    from lightning_peft.engine.reporting import report as report
    from lightning_peft.engine.unloading import unload as unload
    from lightning_peft.engine.verification.verify import verify as verify
    from lightning_peft.plan.prediction import plan_memory as plan_memory
    from lightning_peft.plugin.callbacks import LoRACallback as LoRACallback
    from lightning_peft.plugin.callbacks import QLoRACallback as QLoRACallback
    from lightning_peft.plugin.loading import load_from_checkpoint as load_from_checkpoint
    from lightning_peft.plugin.namespace import use_namespace as use_namespace
    from lightning_peft.plugin.strategies import LoRAStrategy as LoRAStrategy
    from lightning_peft.plugin.strategies import QLoRAStrategy as QLoRAStrategy

__version__ = "0.1.0"

_HOMES = {
    "engine.files.adapter_files": ("save_adapter",),
    "engine.files.adapter_loading": ("load_adapter",),
    "data.sequence_to_sequence": ("Seq2SeqData",),
    "data.speech": ("SpeechData",),
    "data.preference": ("PreferenceData",),
    "data.images": ("ImageData",),
    "data.series": ("SeriesData",),
    "data.supervised": ("SupervisedData",),
    "data.text_classification": ("TextClassificationData",),
    "data.token_classification": ("TokenClassificationData",),
    "engine.adapters": ("disable_adapters", "set_adapter"),
    "engine.injection": ("inject",),
    "engine.merging": ("merge", "unmerge"),
    "engine.reporting": ("report",),
    "engine.unloading": ("unload",),
    "engine.verification.verify": ("verify",),
    "plan.prediction": ("plan_memory",),
    "plugin.callbacks": ("LoRACallback", "QLoRACallback"),
    "plugin.loading": ("load_from_checkpoint",),
    "plugin.namespace": ("use_namespace",),
    "plugin.strategies": ("LoRAStrategy", "QLoRAStrategy"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ImageData",
    "LoRACallback",
    "LoRAStrategy",
    "PreferenceData",
    "QLoRACallback",
    "QLoRAStrategy",
    "SeriesData",
    "Seq2SeqData",
    "SpeechData",
    "SupervisedData",
    "TextClassificationData",
    "TokenClassificationData",
    "disable_adapters",
    "inject",
    "load_adapter",
    "load_from_checkpoint",
    "merge",
    "plan_memory",
    "report",
    "save_adapter",
    "set_adapter",
    "unload",
    "unmerge",
    "use_namespace",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f"{__name__}.{_HOME_OF[name]}")
    value = getattr(home, name)
    if _HOME_OF[name].startswith(("plugin.callbacks", "data.")):
        # Looked up again each time: which Lightning is imported may have changed.
        return import_module(f"{__name__}.plugin.namespace").for_imported(value)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register()
