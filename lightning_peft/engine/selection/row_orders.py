"""Row orders of fused layers, by model class."""

from __future__ import annotations

from typing import Any

QKV, _GATE_UP = ("q", "k", "v"), ("gate", "up")
PIECES = (*QKV, *_GATE_UP)
# Rows that are one piece after the other in most classes. Not here: `query_key_value` and DeBERTa's
# `in_proj`, which go from head to head.
ORDERED = {
    **dict.fromkeys(("qkv", "qkv_proj", "to_qkv", "Wqkv", "c_attn"), QKV),
    "gate_up_proj": _GATE_UP,
}
# Classes with another order, also where a copy or subclass of them is elsewhere.
OTHER_ORDERS = {
    "CodeGenAttention": "four groups of heads, each with its queries, values and keys",
    "MiniMaxLightningAttention": "head by head, each with its query, key and value",
    "Phi4MultimodalAudioMLP": "first up, then gate",
}
# Attentions that go from head to head: GPT-BigCode's, and timm's in MaxViT and TinyViT.
_BY_HEAD = {"multi_query": False, "head_first": True}
_BY_HEAD_MODULES = ("timm.models.tiny_vit",)
# Classes of transformers whose code was read, but for the orders above.
_READ = """
    blip.BlipAttention blip_2.Blip2Attention cohere_compass.CohereCompassVisionAttention
    dbrx.DbrxAttention decision_transformer.DecisionTransformerGPT2Attention
    deepseek_ocr2.DeepseekOcr2SamVisionAttention
    deepseek_ocr2.DeepseekOcr2SamVisionSdpaAttention dia.DiaMLP dots3_note.Dots3NoteAudioMLP
    dots3_note.Dots3NoteVisionAttention ernie4_5_vl_moe.Ernie4_5_VLMoeVisionAttention
    esmfold2.EsmFold2SwiGLU exaone4_5.Exaone4_5_VisionAttention
    florence2.Florence2VisionChannelAttention florence2.Florence2VisionWindowAttention
    glm.GlmMLP glm4.Glm4MLP glm4v.Glm4vTextMLP glm4v.Glm4vVisionAttention
    glm4v_moe.Glm4vMoeVisionAttention glm5_next.Glm5NextVisionAttention
    glm_image.GlmImageTextMLP glm_image.GlmImageVisionAttention glm_ocr.GlmOcrTextMLP
    glm_ocr.GlmOcrVisionAttention got_ocr2.GotOcr2VisionAttention gpt2.GPT2Attention
    gpt_bigcode.GPTBigCodeAttention hiera.HieraMaskUnitAttention imagegpt.ImageGPTAttention
    instructblip.InstructBlipAttention instructblipvideo.InstructBlipVideoAttention
    mgp_str.MgpstrAttention minimax_m3_vl.MiniMaxM3VLDenseMLP modernbert.ModernBertAttention
    mpt.MptAttention openai.Attention phi3.Phi3Attention phi3.Phi3MLP
    phi4_multimodal.Phi4MultimodalAttention phi4_multimodal.Phi4MultimodalMLP
    pp_formulanet.PPFormulaNetVisionAttention pp_ocrv5_mobile_rec.PPOCRV5MobileRecAttention
    pp_ocrv5_server_rec.PPOCRV5ServerRecAttention pp_ocrv6_small_rec.PPOCRV6SmallRecAttention
    qwen2_5_vl.Qwen2_5_VLVisionAttention qwen2_vl.VisionAttention qwen3_5.Qwen3_5VisionAttention
    qwen3_5_moe.Qwen3_5MoeVisionAttention qwen3_omni_moe.Qwen3OmniMoeVisionAttention
    qwen3_vl.Qwen3VLVisionAttention qwen3_vl_moe.Qwen3VLMoeVisionAttention
    qwen4_exp.Qwen4ExpVisionAttention sam.SamVisionAttention sam.SamVisionSdpaAttention
    sam2.Sam2MultiScaleAttention sam_hq.SamHQVisionAttention sam_hq.SamHQVisionSdpaAttention
    seggpt.SegGptAttention slanext.SLANeXtVisionAttention timesformer.TimesformerSelfAttention
    unlimited_ocr.UnlimitedOcrSamVisionAttention
    unlimited_ocr.UnlimitedOcrSamVisionSdpaAttention vitdet.VitDetAttention zamba2.Zamba2MLP
"""
CHECKED = frozenset(_READ.split())
_CHECKED_TIMM = (
    "timm.layers.attention",
    "timm.models.swin_transformer",
    "timm.models.vision_transformer",
)
_TRANSFORMERS = "transformers.models."


def other_order(owner: Any) -> str | None:
    """Returns the order of rows in a class that is known to have another one, else ``None``."""
    known = (OTHER_ORDERS.get(kind.__name__) for kind in type(owner).__mro__)
    by_head = any(getattr(owner, name, None) is value for name, value in _BY_HEAD.items())
    if by_head or type(owner).__module__ in _BY_HEAD_MODULES:
        return "head by head"
    return next((order for order in known if order), None)


def is_checked(kind: type) -> bool:
    """Whether the code of a class was read: its rows are one piece after the other."""
    home = kind.__module__
    if home.startswith(_TRANSFORMERS):
        return f"{home.removeprefix(_TRANSFORMERS).split('.')[0]}.{kind.__name__}" in CHECKED
    return home in _CHECKED_TIMM
