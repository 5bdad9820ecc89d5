"""Classes that the table does not try, and why; the package treats them like any other."""

from __future__ import annotations

_PARTS = "its parts' sizes depend on each other"
_INPUTS = "takes inputs of its own kind"

NOT_TRIED = {
    "BltForCausalLM": _PARTS,
    "DbrxForCausalLM": "its configuration does not build a model in this transformers",
    "DiaForConditionalGeneration": _INPUTS,
    "DinatForImageClassification": "needs the package natten",
    "Dots3NoteForCausalLM": "has settings for each of its 42 layers",
    "EfficientNetForImageClassification": _PARTS,
    "FunAsrNanoForConditionalGeneration": _PARTS,
    "Gemma3nForConditionalGeneration": "needs the package timm",
    "Gemma4AssistantForCausalLM": "runs on the caches of another model",
    "Gemma4UnifiedAssistantForCausalLM": "runs on the caches of another model",
    "GraniteSpeech5ForCTC": _PARTS,
    "KyutaiSpeechToTextForConditionalGeneration": _PARTS,
    "LevitForImageClassification": _PARTS,
    "MoonshineStreamingForConditionalGeneration": _PARTS,
    "MusicgenForCausalLM": _INPUTS,
    "MusicgenMelodyForCausalLM": _INPUTS,
    "NeoMMEForMaskedLM": _PARTS,
    "ReformerForMaskedLM": (
        "reversible layers pass no gradient to a frozen base: PyTorch refuses the backward pass"
    ),
    "ReformerModelWithLMHead": (
        "reversible layers pass no gradient to a frozen base: PyTorch refuses the backward pass"
    ),
    "ShieldGemma2ForImageClassification": _INPUTS,
    "Siglip2ForImageClassification": _INPUTS,
    "SpeechEncoderDecoderModel": "is made of two models that are given",
    "TimmWrapperForImageClassification": "needs the package timm",
    "VibeVoiceAsrForConditionalGeneration": "is too large with all parts at their smallest",
    "VibeVoiceForConditionalGeneration": "is too large with all parts at their smallest",
    "VoxtralRealtimeForConditionalGeneration": _INPUTS,
}
