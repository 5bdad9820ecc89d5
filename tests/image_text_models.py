"""Tiny image-text-to-text models of four families, and processors built without a hub.

The tokenizers know single bytes; all weights are random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3Processor,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLProcessor,
)
from transformers.processing_utils import ProcessorMixin

from lightning_peft import engine
from lightning_peft.data.images import load_image_processor

# As the field writes it: contents are lists of parts.
_TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n"
    "{% for part in turn['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 2}
_TEXT = {**_SIZES, **_HEADS, "vocab_size": 384, "pad_token_id": 0, "bos_token_id": 1}
_TEXT |= {"eos_token_id": 2, "max_position_embeddings": 1024}
_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}


class ImagesOnly(Qwen2VLProcessor):
    """Qwen-VL's processor without its part for videos, which needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def byte_tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """A tokenizer for bytes, with the marks of ChatML and ``special`` ones."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=named or None,
    )
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special]})
    return found


def _images(kind: str, **settings: Any) -> Any:
    return load_image_processor({"image_processor_type": kind, **settings})


def _llava() -> Any:
    square = {"height": 16, "width": 16}
    images = _images("CLIPImageProcessor", size={"shortest_edge": 16}, crop_size=square)
    return LlavaProcessor(
        images,
        byte_tokenizer("<image>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE.replace("IMAGE", "<image>"),
    )


def _qwen() -> Any:
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    images = _images(
        "Qwen2VLImageProcessor",
        patch_size=4,
        merge_size=2,
        size={"shortest_edge": 64, "longest_edge": 1024},
    )
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    return ImagesOnly(images, byte_tokenizer(*marks), _TEMPLATE.replace("IMAGE", place))


def _idefics3() -> Any:
    grid = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    marks = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    images = _images(
        "Idefics3ImageProcessor", size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    tokenizer = byte_tokenizer(*marks, *grid)
    template = _TEMPLATE.replace("IMAGE", "<image>")
    return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)


def _gemma3() -> Any:
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>"}
    named["eoi_token"] = "<end_of_image>"
    tokenizer = byte_tokenizer(*named.values(), **named)
    images = _images("Gemma3ImageProcessor", size={"height": 16, "width": 16})
    template = _TEMPLATE.replace("IMAGE", "<start_of_image>")
    return Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=template)


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        processor: Builds its processor.
        config: Fields of its configuration, without ids of tokens.
        vision: Name of the part that sees.
        projector: Name of the part that translates between the two.
        language: Name of the part that writes.
        image_inputs: What its batches hold of images.
    """

    processor: Callable[[], Any]
    config: dict[str, Any]
    vision: str
    projector: str
    language: str
    image_inputs: frozenset[str]


_VISION = {**_SIZES, **_HEADS, "image_size": 16, "patch_size": 8}
_CLIP = {"model_type": "clip_vision_model", **_VISION, "projection_dim": 32}
_SIGLIP = {"model_type": "siglip_vision_model", **_VISION}
_GEMMA = {"model_type": "gemma3_text", **_TEXT, "num_key_value_heads": 1, "head_dim": 16}
_QWEN_VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
_LLAMA = {"model_type": "llama", **_TEXT}

FAMILIES = {
    "llava": Family(
        _llava,
        {"model_type": "llava", "vision_config": _CLIP, "text_config": _LLAMA},
        "model.vision_tower",
        "model.multi_modal_projector",
        "model.language_model",
        frozenset({"pixel_values"}),
    ),
    "idefics3": Family(
        _idefics3,
        {
            "model_type": "idefics3",
            "scale_factor": 2,
            "vision_config": {**_VISION, "patch_size": 4},
            "text_config": _LLAMA,
        },
        "model.vision_model",
        "model.connector",
        "model.text_model",
        frozenset({"pixel_values", "pixel_attention_mask"}),
    ),
    "gemma3": Family(
        _gemma3,
        {
            "model_type": "gemma3",
            "mm_tokens_per_image": 4,
            "vision_config": {**_SIGLIP, "patch_size": 4},
            "text_config": _GEMMA,
        },
        "model.vision_tower",
        "model.multi_modal_projector",
        "model.language_model",
        frozenset({"pixel_values"}),
    ),
    "qwen2_vl": Family(
        _qwen,
        {
            "model_type": "qwen2_vl",
            "vision_config": {**_QWEN_VISION, "patch_size": 4, "spatial_merge_size": 2},
            "text_config": {
                "model_type": "qwen2_vl_text",
                **_TEXT,
                "num_key_value_heads": 1,
                "rope_parameters": _ROPE,
            },
        },
        "model.visual",
        "model.visual.merger",
        "model.language_model",
        frozenset({"pixel_values", "image_grid_thw"}),
    ),
}


def config_of(family: str, processor: Any) -> dict[str, Any]:
    """Returns the fields of the configuration with the ids that ``processor`` has."""
    fields = dict(FAMILIES[family].config)
    fields["image_token_id"] = processor.image_token_ids[0]
    if family == "qwen2_vl":
        ids = processor.tokenizer.convert_tokens_to_ids
        names = ("vision_start", "vision_end")
        fields |= {f"{n}_token_id": ids(f"<|{n}|>") for n in names}
        fields["video_token_id"] = processor.video_token_id
    if family == "llava":
        fields["image_token_index"] = fields.pop("image_token_id")
    return fields


def tiny_model(family: str, processor: Any) -> Any:
    """Returns a model with random weights, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(**config_of(family, processor))
        model = AutoModelForImageTextToText.from_config(config)
        if family == "gemma3":
            # Zero in a new model, which then sees nothing.
            weight = model.model.multi_modal_projector.mm_input_projection_weight
            torch.nn.init.normal_(weight, std=0.2)
        return model


def saved_adapter(
    folder: Path, family: str, dtype: torch.dtype = torch.float32
) -> tuple[Path, Path]:
    """Saves a base with its processor, and an adapter that changes what it says."""
    known = FAMILIES[family]
    processor = known.processor()
    model = tiny_model(family, processor)
    torch.manual_seed(1)
    for param in model.parameters():
        if param.ndim > 1:
            torch.nn.init.normal_(param, std=0.15)
    model.to(dtype).save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    model = AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=dtype)
    engine.inject(
        model,
        r=4,
        target_modules=rf"{known.language}.*q_proj",
        modules_to_save=[known.projector],
    )
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.3)
        elif param.requires_grad and "lora_" not in name:
            param.data += 0.1
    engine.save_adapter(model, folder / "adapter")
    return folder / "base", folder / "adapter"
