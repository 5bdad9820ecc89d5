"""Rows of the comparison with PEFT: LoRA on every kind of layer, and models of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import peft
import torch
from peft import LoraConfig
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from . import bases
from .side_by_side import Row

CONV = bases.convolution


def rows_of(
    title: str, base: Callable, method: Callable, options: dict[str, dict[str, Any]], **common: Any
) -> Iterator[Row]:
    """One row for each of ``options``; keys of :class:`Row` in them go to the row."""
    own = {field.name for field in dataclasses.fields(Row)}
    for said, given in options.items():
        given = {**common, **given}
        settings = {key: value for key, value in given.items() if key not in own}
        expected = {key: value for key, value in given.items() if key in own}
        yield Row(f"{title} {said}", base, partial(method, **settings), **expected)


# --- LoRA ----------------------------------------------------------------------------------------

LORA = {
    "plain": {},
    "r1": {"r": 1, "lora_alpha": 3},
    "wide": {"r": 40, "lora_alpha": 8},
    "rslora": {"use_rslora": True, "r": 4},
    "bias all": {"bias": "all", "same_keys": False},
    "bias lora_only": {"bias": "lora_only"},
    "dora": {"use_dora": True},
    "dora rslora": {"use_dora": True, "use_rslora": True, "r": 4},
    "lora_bias": {"lora_bias": True},
    "random B": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "Gaussian": {"init_lora_weights": "Gaussian"},
    "dropout": {"lora_dropout": 0.5, "steps": False},
    "saved head": {"modules_to_save": ["head"]},
    "saved norm": {"modules_to_save": ["norm"]},
    "ranks": {"rank_pattern": {"two": 2}, "alpha_pattern": {"one": 5}},
    "expression": {"target_modules": r"(one|two)"},
    "one of them": {"target_modules": ["two"]},
    "excluded": {"exclude_modules": ["one"]},
    "excluded expression": {"exclude_modules": "o.*"},
    "alpha of half": {"lora_alpha": 0.5},
}
LINEAR_ONLY = {
    "pissa": {"init_lora_weights": "pissa", "r": 4, "tolerance": 2e-4},
    # PEFT's own folder requests the same random numbers again.
    "pissa_niter_4": {
        "init_lora_weights": "pissa_niter_4",
        "r": 4,
        "tolerance": 2e-4,
        "theirs_read": False,
    },
    "pissa rslora": {"init_lora_weights": "pissa", "use_rslora": True, "r": 4, "tolerance": 2e-4},
    "olora": {"init_lora_weights": "olora", "r": 4, "tolerance": 2e-4},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["head"]},
    "eva": {"init_lora_weights": "eva", "refused": "training data of a Trainer"},
    "corda": {"init_lora_weights": "corda", "refused": "training data of a Trainer"},
    "lora_ga": {"init_lora_weights": "lora_ga", "refused": "training data of a Trainer"},
    "mica": {"init_lora_weights": "mica", "refused": "freezes B"},
    "unknown init": {"init_lora_weights": "xavier", "refused": "init_lora_weights='xavier'"},
    "rank 0": {"rank_pattern": {"two": 0}, "refused": "the rank is a positive integer"},
    "negative alpha": {"lora_alpha": -1, "refused": "trains nothing"},
    "endless alpha": {"lora_alpha": float("inf"), "refused": "a positive number"},
    "inference": {"inference_mode": True, "refused": "inference_mode=True"},
    "tying": {"ensure_weight_tying": True, "refused": "ensure_weight_tying"},
    "parameters": {"target_modules": [], "target_parameters": ["one.weight", "two.weight"]},
    "replicated": {"layer_replication": [(0, 1)], "refused": "layer_replication"},
    "tokens": {"trainable_token_indices": [1], "refused": "no input embeddings"},
    "no such layer": {"target_modules": ["three"], "refused": "three"},
}
KERNELS = {
    "pissa": {"init_lora_weights": "pissa", "refused": "is for linear layers"},
    "olora": {"init_lora_weights": "olora", "refused": "is for linear layers"},
    "orthogonal": {"init_lora_weights": "orthogonal", "refused": "is for linear layers"},
}
NO_BIAS = {"bias all", "bias lora_only", "lora_bias"}
LAYERS_OF_NETS = {"target_modules": ["one", "two"]}


def custom() -> LoraConfig:
    """A config with a class of the user's own."""
    config = LoraConfig(target_modules=["one"])
    config._register_custom_module({nn.Linear: peft.tuners.lora.layer.Linear})
    return config


def lora_rows() -> Iterator[Row]:
    """Plain LoRA and its variants on every kind of layer."""
    lora = partial(LoraConfig, **LAYERS_OF_NETS)
    yield from rows_of("lora on linear:", bases.linear, lora, LORA | LINEAR_ONLY)
    yield Row("lora on linear: own class", bases.linear, custom, refused="custom_modules")
    unbiased = {name: given for name, given in LORA.items() if name not in NO_BIAS}
    yield from rows_of("lora on linear without bias:", partial(bases.linear, False), lora, unbiased)
    for dtype, tolerance in ((torch.bfloat16, 3e-2), (torch.float16, 5e-3)):
        base = partial(bases.in_16_bits, dtype)
        some = {key: LORA[key] for key in ("plain", "rslora", "bias all", "dora", "lora_bias")}
        yield from rows_of(f"lora on {dtype}:", base, lora, some, tolerance=tolerance)
    yield from rows_of("lora on Conv1D:", bases.transposed_linear, lora, LORA)
    for spatial in (1, 2, 3):
        base = partial(CONV, spatial)
        yield from rows_of(f"lora on Conv{spatial}d:", base, lora, LORA | KERNELS)
        base = partial(CONV, spatial, kernel=1)
        of_1 = _some("plain", "dora")
        if spatial == 3:
            # PEFT takes a kernel of this size for one with two dimensions.
            of_1["plain"] = {"theirs_merged": False}
            of_1["dora"] = {"use_dora": True, "theirs_merged": False}
        yield from rows_of(f"lora on Conv{spatial}d of 1:", base, lora, of_1)
        grouped = {"groups": {}, "groups rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
        base = partial(CONV, spatial, groups=2)
        refusal = "is a grouped convolution (groups=2)"
        yield from rows_of(
            f"lora on grouped Conv{spatial}d:", base, lora, grouped, unmerged=refusal
        )
        base = partial(CONV, spatial, groups=8)
        refusal = "is a grouped convolution (groups=8)"
        yield from rows_of(
            f"lora on depthwise Conv{spatial}d:", base, lora, {"r8": {}}, unmerged=refusal
        )
        odd = {"r3": {"r": 3, "refused": "do not divide the rank 3"}}
        yield from rows_of(f"lora on grouped Conv{spatial}d:", base, lora, odd)
        base = partial(CONV, spatial, padding="same")
        yield from rows_of(f"lora on Conv{spatial}d same:", base, lora, _some("plain", "dora"))
    words = partial(LoraConfig, target_modules=["words", "one", "two"])
    options = {key: given for key, given in LORA.items() if "module" not in str(given)}
    options = {key: given for key, given in options.items() if key not in NO_BIAS | {"ranks"}}
    yield from rows_of("lora on Embedding:", bases.words, words, options)
    scaled = partial(bases.words, Gemma3TextScaledWordEmbedding, embed_scale=3.5)
    yield from rows_of("lora on scaled Embedding:", scaled, words, _some("plain"))
    for name, base, table in (
        ("tied llama", bases.tied_llama, "embed_tokens"),
        ("gpt2", bases.gpt2, "wte"),
    ):
        tied = {"target_modules": [table], "unmerged": "shares its weight", "same_keys": False}
        yield from rows_of(f"lora on {name}:", base, LoraConfig, {"embedding": tied})
    for bias in (True, False):
        for batch_first in (True, False):
            base = partial(bases.attention, bias, batch_first)
            mix = partial(LoraConfig, target_modules=["mix", "one"])
            some = _some("plain", "rslora", "random B", "gaussian")
            # PEFT adds the adapter of the projection twice, and takes one of them for its gradient.
            some = {key: {**given, "steps": False} for key, given in some.items()}
            yield from rows_of(f"lora on attention {bias}, {batch_first}:", base, mix, some)


def _some(*names: str) -> dict[str, dict[str, Any]]:
    return {name: LORA[name] for name in names}


MODELS = {
    "llama": (bases.llama, ["q_proj", "down_proj"], "lm_head"),
    "gpt2": (bases.gpt2, ["c_attn", "c_fc"], None),
    "bert": (bases.bert, ["query", "dense"], "classifier"),
    "t5": (bases.t5, ["q", "wo"], None),
    "vit": (bases.vit, ["q_proj", "fc1"], "classifier"),
}


def model_rows() -> Iterator[Row]:
    """LoRA on models of transformers."""
    for name, (base, targets, head) in MODELS.items():
        options: dict[str, dict[str, Any]] = {
            **_some("plain", "rslora", "dora", "bias all", "bias lora_only", "random B"),
            "ranks": {"rank_pattern": {targets[0]: 2}, "alpha_pattern": {targets[1]: 3}},
            "first block": {"layers_to_transform": [0]},
            "one name": {"target_modules": targets[:1]},
            "expression": {"target_modules": rf".*\.0\..*({targets[0]}|{targets[1]})"},
        }
        if head:
            options["head"] = {"modules_to_save": [head]}
        if name in ("bert", "vit"):
            options["task"] = {"task_type": "SEQ_CLS"}
        if name in ("llama", "bert", "vit"):
            options |= {key: LINEAR_ONLY[key] for key in ("pissa", "olora", "orthogonal")}
        given = partial(LoraConfig, target_modules=targets)
        yield from rows_of(f"lora on {name}:", base, given, options)
        ia3 = partial(peft.IA3Config, target_modules=targets, feedforward_modules=targets[1:])
        yield from rows_of(f"IA3 on {name}:", base, ia3, {"plain": {}})
        for said in ("LoHa", "LoKr", "HRA", "Miss"):
            method = partial(getattr(peft, f"{said}Config"), target_modules=targets, r=2)
            refused = {"refused": "not supported"} if name == "gpt2" else {}
            yield from rows_of(f"{said} on {name}:", base, method, {"plain": refused})
