"""Adapters on rows of a fused layer, such as ``qkv[q]``, and row orders by model class.

An entry of ``target_modules`` may end with them: ``qkv[q]`` by the name of what they compute,
``qkv[0:384]`` by their numbers, ``qkv[1/3]`` as the first of three parts of equal size.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftConfig
from torch import nn

from lightning_peft.engine.layers.kinds import LINEAR_LIKE
from lightning_peft.engine.layers.sizes import mismatched_shapes
from lightning_peft.engine.methods.base import InPlaceMethod
from lightning_peft.engine.selection.parts import matches_suffix

log = logging.getLogger(__name__)

Rows = tuple[tuple[int, int], ...]

_ENTRY = re.compile(r"(.*[^\[\]])\[([^\[\]]+)\]")
_NUMBERS = re.compile(r"(\d+)([:/])(\d+)")
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


def split_rows(entry: str) -> tuple[str, str | None]:
    """Returns the name of the layer in an entry of ``target_modules``, and its rows as written."""
    found = _ENTRY.fullmatch(entry)
    return (entry, None) if found is None else (found[1], found[2])


def written_rows(target_modules: Any) -> dict[str, list[str | None]]:
    """Returns the rows in ``target_modules`` by name of the layer; ``None`` means all rows.

    Empty where no entry has rows: a text is a regular expression or ``"all-linear"``.
    """
    if target_modules is None or isinstance(target_modules, str):
        return {}
    found: dict[str, list[str | None]] = {}
    for entry in sorted(target_modules):
        name, rows = split_rows(entry)
        found.setdefault(name, []).append(rows)
    return found if any(rows != [None] for rows in found.values()) else {}


def without_rows(config: PeftConfig) -> PeftConfig:
    """Returns ``config`` with the plain names of layers in ``target_modules``."""
    written = written_rows(getattr(config, "target_modules", None))
    if not written:
        return config
    plain: Any = copy.copy(config)
    plain.target_modules = set(written)
    named: PeftConfig = plain
    return named


def requested_rows(
    part: nn.Module,
    targets: Iterable[str],
    names: Mapping[str, list[str]],
    config: PeftConfig,
    method: InPlaceMethod | None,
) -> tuple[dict[str, Rows], list[str]]:
    """Returns the rows, as ascending ranges, of layers that are not adapted whole, and problems."""
    written = written_rows(getattr(config, "target_modules", None))
    found: dict[str, Rows] = {}
    named: set[str] = set()
    problems: list[str] = []
    if written and not (method and method.limits_rows(config)):
        entries = [f"{name}[{rows}]" for name, listed in written.items() for rows in listed if rows]
        return {}, [f"{', '.join(entries)}: rows are for LoRA in place with its usual init only"]
    for target in targets if written else ():
        wanted = {
            rows
            for entry, listed in written.items()
            if any(matches_suffix(entry, name) for name in names[target])
            for rows in listed
        }
        try:
            ranges = _ranges(part, target, wanted)
        except ValueError as error:
            problems.append(f"{target}: {error}")
            continue
        if ranges:
            found[target] = ranges
            named |= {target} if wanted & {*PIECES} else set()
    _warn_of_order(part, {target: rows for target, rows in found.items() if target in named})
    return found, problems


def _ranges(part: nn.Module, target: str, wanted: set[str | None]) -> Rows:
    layer: Any = part.get_submodule(target)
    if wanted == {None}:
        return ()
    if None in wanted:
        raise ValueError("`target_modules` names it as a whole, and rows of it")
    if not isinstance(layer, LINEAR_LIKE) or mismatched_shapes(layer):
        raise ValueError("rows are those of a linear layer of the size that it says")
    return _joined(_range(part, target, layer, str(rows)) for rows in wanted)


def _range(part: nn.Module, target: str, layer: Any, rows: str) -> tuple[int, int]:
    size: int = layer.nf if hasattr(layer, "nf") else layer.out_features
    numbers = _NUMBERS.fullmatch(rows)
    if rows not in PIECES and numbers is None:
        raise ValueError(
            f"rows are not written as [{rows}]. They are one of {', '.join(PIECES)}, a range such "
            "as 0:384, or a share: 1/3 is the first of three equal parts"
        )
    if numbers is None:
        return _piece(part, target, layer, size, rows)
    first, last = int(numbers[1]), int(numbers[3])
    if numbers[2] == ":":
        if not first < last <= size:
            raise ValueError(f"[{rows}] is not a range in its {size} rows")
        return first, last
    if not 0 < first <= last or size % last:
        raise ValueError(f"[{rows}] does not fit its {size} rows")
    return (first - 1) * size // last, first * size // last


def _piece(part: nn.Module, target: str, layer: Any, size: int, piece: str) -> tuple[int, int]:
    above, _, leaf = target.rpartition(".")
    owner: Any = part.get_submodule(above)
    pieces, other = ORDERED.get(leaf, ()), other_order(owner)
    first = f"{leaf}[0:{max(1, size // 3)}]"
    if other is not None:
        raise ValueError(
            f"{type(owner).__name__} has the rows of its {leaf} {other}, so [{piece}] is refused. "
            f"Write the rows as numbers, an entry for each range, such as {first}"
        )
    if piece not in pieces:
        shares = ", ".join(f"{leaf}[{count}/3]" for count in (1, 2, 3))
        raise ValueError(
            f"which rows of a {leaf} of {type(owner).__name__} are [{piece}] is not known: some "
            f"models go from head to head. Write the rows as numbers, such as {first}, or as "
            f"shares, {shares}"
        )
    sizes = _sizes(owner, layer, size, len(pieces))
    begin = sum(sizes[: pieces.index(piece)])
    return begin, begin + sizes[pieces.index(piece)]


def _warn_of_order(part: nn.Module, found: Mapping[str, Rows]) -> None:
    """Warns of the rows that pieces are taken for in classes that were not looked at."""
    owners = {target: part.get_submodule(target.rpartition(".")[0]) for target in found}
    seen = set()
    for target, owner in owners.items():
        kind, rows = type(owner), found[target]
        if not is_checked(kind) and (kind, rows) not in seen:
            seen.add((kind, rows))
            log.warning(
                "Of %s the rows %s are taken, with %s one after the other, as in most models. That "
                "was not checked for %s: write the numbers if its order is another.",
                target,
                ", ".join(f"{first}:{last}" for first, last in rows),
                ", ".join(ORDERED[target.rpartition(".")[2]]),
                kind.__name__,
            )


def _sizes(owner: Any, layer: Any, size: int, count: int) -> list[int]:
    if count == len(QKV):
        heads = _number(owner, "num_heads", "num_attention_heads", "n_heads", "n_head")
        kv_heads = _number(owner, "num_key_value_heads", "num_kv_heads", "kv_heads")
        width = _number(owner, "head_dim") or size // max(1, heads + 2 * kv_heads)
        if kv_heads and kv_heads != heads:
            sizes = [heads * width, kv_heads * width, kv_heads * width]
            if sum(sizes) != size:
                raise ValueError(
                    f"{heads} heads of queries and {kv_heads} of keys and values of {width} rows "
                    f"each are not its {size} rows. Write the rows as numbers"
                )
            return sizes
    inputs = layer.nx if hasattr(layer, "nx") else layer.in_features
    if size % count or (count == len(QKV) and size == 2 * inputs):
        raise ValueError(f"its {size} rows are not {count} parts of one size. Write numbers")
    return [size // count] * count


def _number(owner: Any, *names: str) -> int:
    """Returns the first of some attributes that a module or its config has, or 0."""
    holders = (owner, getattr(owner, "config", None))
    values = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in values if isinstance(value, int)), 0)


def _joined(ranges: Iterable[tuple[int, int]]) -> Rows:
    """Returns ranges in ascending order, with those that touch as one."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    return tuple(joined)


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
