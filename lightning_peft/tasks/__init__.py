"""LightningModules and callbacks of the recipes; they know nothing of adapters."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_peft.plugin.namespace import for_imported

if TYPE_CHECKING:
    from lightning_peft.tasks.callbacks import BestCheckpoint as BestCheckpoint
    from lightning_peft.tasks.callbacks import LogSamples as LogSamples
    from lightning_peft.tasks.callbacks import StopEarly as StopEarly
    from lightning_peft.tasks.causal_lm import CausalLM as CausalLM
    from lightning_peft.tasks.image_classification import ImageClassifier as ImageClassifier
    from lightning_peft.tasks.preference import PreferenceTuning as PreferenceTuning
    from lightning_peft.tasks.reward import RewardModel as RewardModel
    from lightning_peft.tasks.sequence_to_sequence import Seq2SeqLM as Seq2SeqLM
    from lightning_peft.tasks.speech_recognition import SpeechRecognizer as SpeechRecognizer
    from lightning_peft.tasks.text_classification import TextClassifier as TextClassifier
    from lightning_peft.tasks.time_series import Forecaster as Forecaster
    from lightning_peft.tasks.token_classification import TokenClassifier as TokenClassifier

_HOMES = {
    "BestCheckpoint": "callbacks",
    "CausalLM": "causal_lm",
    "Forecaster": "time_series",
    "ImageClassifier": "image_classification",
    "LogSamples": "callbacks",
    "Seq2SeqLM": "sequence_to_sequence",
    "SpeechRecognizer": "speech_recognition",
    "PreferenceTuning": "preference",
    "RewardModel": "reward",
    "StopEarly": "callbacks",
    "TextClassifier": "text_classification",
    "TokenClassifier": "token_classification",
}

__all__ = [
    "BestCheckpoint",
    "CausalLM",
    "Forecaster",
    "ImageClassifier",
    "LogSamples",
    "Seq2SeqLM",
    "SpeechRecognizer",
    "PreferenceTuning",
    "RewardModel",
    "StopEarly",
    "TextClassifier",
    "TokenClassifier",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return for_imported(getattr(import_module(f"{__name__}.{_HOMES[name]}"), name))
