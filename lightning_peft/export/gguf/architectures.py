"""GGUF architectures, hyperparameters and tensor names of transformers models.

An architecture is in the table if a test shows that llama.cpp gives transformers' logits for it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lightning_peft.errors import UnsupportedError, itemize
from lightning_peft.export.gguf.files import gguf

_HEAD = "lm_head.weight"
_EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
_OTHERWISE = (
    "Export it with --format merged, and convert that folder by llama.cpp's convert_hf_to_gguf.py."
)


@dataclass(frozen=True)
class Family:
    """How a class of transformers differs from the others in a GGUF file.

    Attributes:
        name: What llama.cpp calls it.
        interleaved: Whether rotary pairs are neighbours, while transformers has them half a head
            apart: rows of ``q_proj`` and ``k_proj`` change places.
        norm_offset: What is added to the weights of norms.
        activation: The one that llama.cpp computes with.
        own_head_size: Whether the size of heads is always written.
        attention_bias: Whether llama.cpp adds the biases of ``attention_bias=True``.
        read_with_biases: Whether transformers reads biases in a file of it.
        experts: The fields of the config that count experts and give their inner size, if any.
    """

    name: str
    interleaved: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    own_head_size: bool = False
    attention_bias: bool = True
    read_with_biases: bool = False
    experts: tuple[str, str] | None = None


FAMILIES = {
    "LlamaForCausalLM": Family("llama", interleaved=True),
    "MistralForCausalLM": Family("llama", interleaved=True),
    "Qwen2ForCausalLM": Family("qwen2", read_with_biases=True),
    "Qwen3ForCausalLM": Family("qwen3", own_head_size=True, attention_bias=False),
    "MixtralForCausalLM": Family(
        "llama", interleaved=True, experts=("num_local_experts", "intermediate_size")
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3moe",
        own_head_size=True,
        attention_bias=False,
        experts=("num_experts", "moe_intermediate_size"),
    ),
    "GemmaForCausalLM": Family(
        "gemma",
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
        own_head_size=True,
        attention_bias=False,
    ),
}


@dataclass(frozen=True)
class Architecture:
    """One model as llama.cpp sees it."""

    class_name: str
    config: Any

    @property
    def family(self) -> Family:
        """The row of the table for its class."""
        return FAMILIES[self.class_name]

    @property
    def head_size(self) -> int:
        """Numbers in one attention head."""
        own = getattr(self.config, "head_dim", None)
        return int(own or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def context(self) -> int:
        """Positions for which llama.cpp computes what transformers does."""
        longest = int(self.config.max_position_embeddings)
        window = self._window
        return longest if window is None else min(longest, window)

    @property
    def _window(self) -> int | None:
        if not getattr(self.config, "use_sliding_window", True):
            return None
        window = getattr(self.config, "sliding_window", None)
        return None if window is None else int(window)

    @property
    def notes(self) -> list[str]:
        """What a user should know."""
        if self.context == self.config.max_position_embeddings:
            return []
        return [
            f"the model attends to the last {self.context} tokens, and llama.cpp to all: the file "
            f"names a context of {self.context}, up to which they are the same"
        ]

    @property
    def not_read_back(self) -> str | None:
        """What transformers leaves out when it reads such a file; ``None`` if it is the model."""
        if self.family.experts is not None:
            return "the experts"
        if self._rope["rope_type"] != "default":
            return "the scaled positions"
        biased = any(getattr(self.config, name, False) for name in ("attention_bias", "mlp_bias"))
        if biased and not self.family.read_with_biases:
            return "the biases"
        return None if self.context == self.config.max_position_embeddings else "the window"

    @cached_property
    def _names(self) -> Any:
        (kind,) = (key for key, name in gguf().MODEL_ARCH_NAMES.items() if name == self.family.name)
        return gguf().get_tensor_name_map(kind, self.config.num_hidden_layers)

    def tensor_name(self, name: str) -> str | None:
        """Returns llama.cpp's name of a tensor of transformers, ``None`` if it has none such.

        The first one, where it has several.
        """
        pieces = self._expert_pieces(name)
        if pieces:
            return pieces[0]
        found: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        return found

    def _expert_pieces(self, name: str) -> list[str]:
        """Returns llama.cpp's names of what a weight of all experts holds, one after the other."""
        found = None if self.family.experts is None else _EXPERTS.fullmatch(name)
        if found is None:
            return []
        kinds = ("gate", "up") if found[2] == "gate_up_proj" else ("down",)
        return [f"blk.{found[1]}.ffn_{kind}_exps.weight" for kind in kinds]

    def pieces(self, name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        """Returns names and shapes by llama.cpp of a tensor that has a place there."""
        pieces = self._expert_pieces(name)
        if pieces:
            return [(one, (shape[0], shape[1] // len(pieces), *shape[2:])) for one in pieces]
        there = self.tensor_name(name)
        assert there is not None
        return [(there, shape)]

    def split(self, name: str, value: Tensor) -> Iterator[Tensor]:
        """Yields the values of :meth:`pieces`."""
        pieces = self._expert_pieces(name)
        yield from value.chunk(len(pieces), 1) if pieces else (self.converted(name, value),)

    def tensor_names(self, names: list[str]) -> dict[str, str]:
        """Returns llama.cpp's names of all tensors that are written, by those in transformers.

        A head that is tied to the embedding is left out: llama.cpp takes the embedding.
        """
        if self.config.tie_word_embeddings:
            names = [name for name in names if name != _HEAD]
        found = {name: self.tensor_name(name) for name in names}
        homeless = [name for name, there in found.items() if there is None]
        if homeless:
            raise UnsupportedError(
                f"llama.cpp's {self.family.name!r} has no place for these tensors:"
                + itemize(homeless, 5)
                + "\nExport the model with --format merged."
            )
        return {name: there for name, there in found.items() if there is not None}

    def converted(self, name: str, value: Tensor) -> Tensor:
        """Returns a tensor, or rows of one, in llama.cpp's order and meaning."""
        owner, leaf = name.rsplit(".", 2)[-2:]
        if self.family.interleaved and owner in ("q_proj", "k_proj"):
            # (heads, halves, pairs) -> (heads, pairs, halves)
            rest = value.shape[1:]
            halves = value.reshape(-1, 2, self.head_size // 2, *rest)
            return halves.transpose(1, 2).reshape(-1, *rest)
        if self.family.norm_offset and leaf == "weight" and "norm" in owner:
            return value.float() + self.family.norm_offset
        return value

    def computed(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors that no file of transformers has, by llama.cpp's names."""
        if self._rope["rope_type"] == "llama3":
            plain, scaled = (
                ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
                for config in (self._unscaled(), self.config)
            )
            yield "rope_freqs.weight", plain / scaled

    def _unscaled(self) -> Any:
        config = copy.deepcopy(self.config)
        config.rope_parameters = {**self._rope, "factor": 1.0}
        return config

    @property
    def _rope(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.config.rope_parameters
        return found

    def add_to(self, writer: Any, vocabulary: int) -> None:
        """Adds the numbers to a ``gguf.GGUFWriter``; ``vocabulary`` is rows of the embedding."""
        config, heads = self.config, self.config.num_attention_heads
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(self.context)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(vocabulary)
        writer.add_rope_dimension_count(self.head_size)
        if self.family.own_head_size or self.head_size * heads != config.hidden_size:
            writer.add_key_length(self.head_size)
            writer.add_value_length(self.head_size)
        if self.family.experts is not None:
            count, inner = (getattr(config, field) for field in self.family.experts)
            writer.add_expert_count(count)
            writer.add_expert_used_count(config.num_experts_per_tok)
            writer.add_expert_feed_forward_length(inner)
        rope = self._rope
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf().RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])


def architecture_of(class_name: str, config: Any) -> Architecture:
    """Returns the architecture of a model, or refuses one that is not written, with all reasons."""
    if class_name not in FAMILIES:
        raise UnsupportedError(
            f"{class_name} is not written as GGUF here: {', '.join(FAMILIES)} are. {_OTHERWISE}"
        )
    architecture = Architecture(class_name, config)
    reasons = list(_obstacles(architecture))
    if reasons:
        raise UnsupportedError(
            f"This {class_name} is not written as GGUF here:" + itemize(reasons) + f"\n{_OTHERWISE}"
        )
    return architecture


def _obstacles(architecture: Architecture) -> Iterator[str]:
    config, family = architecture.config, architecture.family
    kind = architecture._rope.get("rope_type")
    if kind not in ("default", "linear", "llama3"):
        yield f"its positions are scaled by {kind!r}: 'default', 'linear' and 'llama3' are known"
    partial = architecture._rope.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        yield f"partial_rotary_factor={partial}: llama.cpp turns whole heads"
    if config.hidden_act != family.activation:
        yield f"hidden_act={config.hidden_act!r}: llama.cpp computes with {family.activation!r}"
    if getattr(config, "attention_bias", False) and not family.attention_bias:
        yield f"attention_bias=True: llama.cpp's {family.name!r} adds no biases"
    if not getattr(config, "norm_topk_prob", True):
        yield "norm_topk_prob=False: llama.cpp divides the weights of experts by their sum"
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        yield "blocks without experts among others: llama.cpp has experts in all"
    if getattr(config, "use_bidirectional_attention", None):
        yield "use_bidirectional_attention=True: llama.cpp attends to earlier tokens only"
