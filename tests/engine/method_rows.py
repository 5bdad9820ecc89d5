"""Rows of the comparison with PEFT: methods other than LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import peft
import torch

from . import bases
from .lora_rows import CONV, LAYERS_OF_NETS, rows_of
from .side_by_side import Row

METHODS: dict[str, tuple[Any, dict[str, dict[str, Any]]]] = {
    "IA3": (
        peft.IA3Config,
        {
            "keys": {"feedforward_modules": []},
            "feedforward": {"feedforward_modules": ["two"]},
            "all feedforward": {"feedforward_modules": ["one", "two"]},
            "random": {"feedforward_modules": [], "init_ia3_weights": False},
            "saved": {"feedforward_modules": [], "modules_to_save": ["head"]},
        },
    ),
    "LoHa": (
        peft.LoHaConfig,
        {
            "plain": {"r": 4},
            "random": {"r": 4, "init_weights": False},
            "ranks": {"r": 4, "rank_pattern": {"two": 2}, "alpha_pattern": {"one": 3}},
            "effective": {"r": 4, "use_effective_conv2d": True},
            "saved": {"r": 4, "modules_to_save": ["head"]},
        },
    ),
    "LoKr": (
        peft.LoKrConfig,
        {
            "plain": {"r": 4},
            "random": {"r": 4, "init_weights": False},
            "both": {"r": 2, "decompose_both": True, "decompose_factor": 4},
            "ranks": {"r": 4, "rank_pattern": {"two": 2}, "alpha_pattern": {"one": 3}},
            "effective": {"r": 4, "use_effective_conv2d": True},
            "saved": {"r": 4, "modules_to_save": ["head"]},
        },
    ),
    "OFT": (
        peft.OFTConfig,
        {
            "block": {"oft_block_size": 4},
            "r": {"r": 4, "oft_block_size": 0},
            "exact": {"oft_block_size": 4, "use_cayley_neumann": False},
            "shared": {"oft_block_size": 4, "block_share": True},
            "random": {"oft_block_size": 4, "init_weights": False},
            "saved": {"oft_block_size": 4, "modules_to_save": ["head"]},
        },
    ),
    "HRA": (
        peft.HRAConfig,
        {
            "plain": {"r": 4},
            "GS": {"r": 4, "apply_GS": True},
            "random": {"r": 4, "init_weights": False},
            "saved": {"r": 4, "modules_to_save": ["head"]},
        },
    ),
    "MiSS": (
        peft.MissConfig,
        {
            "plain": {"r": 4},
            "bat": {"r": 4, "init_weights": "bat"},
            "mini": {"r": 8, "mini_r": 4, "init_weights": "mini"},
            "random": {"r": 4, "init_weights": False},
            "saved": {"r": 4, "modules_to_save": ["head"]},
        },
    ),
    "BOFT": (
        peft.BOFTConfig,
        {
            "blocks of 4": {"boft_block_size": 4},
            "two factors": {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
            "random": {"init_weights": False},
        },
    ),
    "AdaMSS": (
        peft.AdamssConfig,
        {
            "plain": {"r": 8, "num_subspaces": 2},
            "ranks": {"r": 8, "num_subspaces": 2, "use_dynamic_rank": True},
            "asa": {"use_asa": True, "refused": "would never move here"},
        },
    ),
    "BEFT": (peft.BeftConfig, {"plain": {}, "random": {"init_weights": False}}),
    "C3A": (
        peft.C3AConfig,
        {
            "4": {"block_size": 4},
            "8": {"block_size": 8, "block_size_pattern": {"two": 4}},
            "gaussian": {"block_size": 8, "init_weights": "gaussian"},
        },
    ),
    "DeFT": (
        peft.DeftConfig,
        {
            "plain": {"r": 4},
            "qr": {"r": 4, "decomposition_method": "qr"},
            "random": {"r": 4, "init_weights": False},
        },
    ),
    "DeLoRA": (
        peft.DeloraConfig,
        {
            "plain": {"r": 4},
            "patterns": {"rank_pattern": {"two": 2}, "lambda_pattern": {"one": 3}},
        },
    ),
    "FourierFT": (
        peft.FourierFTConfig,
        {
            "plain": {"n_frequency": 10},
            "zeros": {"n_frequency": 10, "init_weights": True},
            "patterns": {"n_frequency": 10, "n_frequency_pattern": {"two": 5}},
        },
    ),
    "GLoRA": (peft.GloraConfig, {"plain": {"r": 4}, "vectors": {"r": 4, "config_A_B": "vector"}}),
    "GraLoRA": (peft.GraloraConfig, {"plain": {"r": 4}, "hybrid": {"r": 4, "hybrid_r": 2}}),
    "HiRA": (peft.HiraConfig, {"plain": {"r": 4}, "ranks": {"rank_pattern": {"two": 2}}}),
    "LNTuning": (
        peft.LNTuningConfig,
        {
            "norm": {"target_modules": ["norm"]},
            "saved": {"target_modules": ["norm"], "modules_to_save": ["head"]},
            "unnamed": {"target_modules": None, "refused": "the normalization layers"},
        },
    ),
    "PEANuT": (peft.PeanutConfig, {"plain": {"r": 4}, "deep": {"r": 4, "depth": 2}}),
    "PSOFT": (peft.PsoftConfig, {"plain": {"r": 4}, "no scales": {"r": 4, "psoft_mag_a": False}}),
    "RandLoRA": (
        peft.RandLoraConfig,
        {
            "plain": {"r": 4, "randlora_alpha": 8, "save_projection": False},
            "sparse": {"r": 4, "randlora_alpha": 8, "save_projection": False, "sparse": True},
        },
    ),
    "RoAd": (
        peft.RoadConfig,
        {
            "1": {"group_size": 4},
            "2": {"variant": "road_2", "group_size": 4},
            "4": {"variant": "road_4", "group_size": 4},
        },
    ),
    "ShiRA": (peft.ShiraConfig, {"seed": {"r": 2, "random_seed": 3}, "no seed": {"r": 2}}),
    "SuperTuning": (
        peft.SupertuningConfig,
        {"half": {"sparsity": 0.5}, "smallest": {"sparsity": 0.5, "select_top": False}},
    ),
    "VeRA": (
        peft.VeraConfig,
        {
            "plain": {"r": 4, "save_projection": False},
            "key": {"r": 4, "save_projection": False, "projection_prng_key": 3, "d_initial": 0.2},
            "saved": {"r": 4, "save_projection": False, "modules_to_save": ["head"]},
        },
    ),
    "WaveFT": (
        peft.WaveFTConfig,
        {"plain": {"n_frequency": 12}, "wavelet": {"n_frequency": 12, "wavelet_family": "sym2"}},
    ),
}
NOT_INJECTED = {
    "VBLoRA": (peft.VBLoRAConfig, "share tensors between layers"),
    "PVeRA": (peft.PveraConfig, "each forward pass draws noise"),
    "TinyLoRA": (peft.TinyLoraConfig, "share tensors between layers"),
    "UniLoRA": (peft.UniLoraConfig, "share tensors between layers"),
    "FRoD": (peft.FrodConfig, "share tensors between layers"),
    "Lily": (peft.LilyConfig, "its layers share one tensor"),
    "OSF": (peft.OSFConfig, "it rewrites the base weights"),
    "Poly": (peft.PolyConfig, "takes the task of each row"),
}
# What PEFT has no adapter for, by method.
UNKNOWN_KINDS = {
    "IA3": ("Conv1d",),
    "LoHa": ("Conv1D",),
    "LoKr": ("Conv1D",),
    "OFT": ("Conv1d", "Conv1D"),
    "HRA": ("Conv1d", "Conv1D"),
    "MiSS": ("Conv1d", "Conv2d", "Conv2d of 1", "Conv1D"),
}


def method_rows() -> Iterator[Row]:
    """Methods that PEFT's wrappers carry out, and those that are not injected."""
    for said, (method, options) in METHODS.items():
        given = partial(method, **LAYERS_OF_NETS)
        kinds = {"linear": bases.linear, "square": bases.square}
        if said in UNKNOWN_KINDS:
            kinds |= {
                "unbiased": partial(bases.linear, False),
                "Conv1d": partial(CONV, 1),
                "Conv2d": partial(CONV, 2),
                "Conv2d of 1": partial(CONV, 2, kernel=1),
                "Conv1D": bases.transposed_linear,
            }
        for kind, base in kinds.items():
            expected: dict[str, Any] = {}
            if kind in UNKNOWN_KINDS.get(said, ()):
                expected["refused"] = "not supported"
            elif (said, kind) == ("OFT", "Conv2d"):
                expected["unmerged"] = "computes another function"
            yield from rows_of(f"{said} on {kind}:", base, given, options, **expected)
        first = dict([next(iter(options.items()))])
        for dtype, tolerance in ((torch.bfloat16, 5e-2), (torch.float16, 1e-2)):
            base = partial(bases.in_16_bits, dtype)
            yield from rows_of(f"{said} on {dtype}:", base, given, first, tolerance=tolerance)
    for said, (method, reason) in NOT_INJECTED.items():
        yield from rows_of(said, bases.square, method, {"": {"refused": reason}}, **LAYERS_OF_NETS)
    tokens = partial(peft.TrainableTokensConfig, token_indices=[1, 5])
    yield from rows_of(
        "tokens on",
        bases.words,
        tokens,
        {"words": {"target_modules": ["words"]}, "nothing": {"refused": "the embedding"}},
    )
    llama = {"llama": {"target_modules": ["embed_tokens"]}}
    yield from rows_of("tokens on", bases.llama, tokens, llama)
