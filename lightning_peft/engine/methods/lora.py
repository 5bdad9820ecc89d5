"""LoRA, after Hu et al. 2021 (arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from lightning_peft.compat.peft import ParamWrapper
from lightning_peft.compat.torch import ConvTransposeNd
from lightning_peft.engine.layers.attention import LoraAttention, attention_factors
from lightning_peft.engine.layers.convolution_adapters import TransposedFactors, bare_convolution
from lightning_peft.engine.layers.expert_adapters import LoraExperts
from lightning_peft.engine.layers.expert_weights import ExpertWeight, run_problem
from lightning_peft.engine.layers.kinds import (
    ADAPTABLE,
    CONVOLUTION_LIKE,
    CONVOLUTIONS,
    TRANSPOSED,
    has_standard_forward,
    is_dilated,
    pads_with_values,
)
from lightning_peft.engine.layers.lora import (
    LoraConvolution,
    LoraEmbedding,
    LoraLayer,
    LoraLinear,
)
from lightning_peft.engine.layers.recurrent import LoraRecurrent, RecurrentFactors
from lightning_peft.engine.layers.sizes import shape_unsupported_reason
from lightning_peft.engine.methods.base import InPlaceMethod
from lightning_peft.engine.methods.lora_config import (
    changes_base,
    lora_problems,
    needs_data,
    rank_of,
    refuse_extensions,
    subtracts_from_base,
    with_lower_init,
)
from lightning_peft.errors import ConfigError, itemize


class Lora(InPlaceMethod):
    """LoRA and rsLoRA in place; `lora_bias` in PEFT's wrappers."""

    adds_up = True

    def checked_config(self, config: LoraConfig) -> LoraConfig:
        refuse_extensions(config)
        config = with_lower_init(config)
        problems = lora_problems(vars(config))
        if problems:
            raise ConfigError("These LoRA settings cannot work:" + itemize(problems))
        return config

    def is_in_place(self, config: Any) -> bool:
        return type(config) is LoraConfig and not (config.use_dora or config.lora_bias)

    def reason_for_trainer(self, config: Any) -> str | None:
        if not needs_data(config):
            return None
        return (
            f"init_lora_weights={config.init_lora_weights!r} is made from the training data of a "
            "Trainer"
        )

    def limits_rows(self, config: Any) -> bool:
        return self.is_in_place(config) and not changes_base(config)

    def takes_experts(self, config: Any) -> bool:
        plain = config.init_lora_weights in (True, False, None, "gaussian")
        return self.is_in_place(config) and plain and not config.lora_dropout

    def layer_class(self, layer: nn.Module) -> type[LoraLayer] | None:
        if isinstance(layer, CONVOLUTION_LIKE):
            return LoraConvolution
        if isinstance(layer, nn.Embedding):
            return LoraEmbedding
        if isinstance(layer, nn.RNNBase):
            return LoraRecurrent
        if isinstance(layer, nn.MultiheadAttention):
            return LoraAttention
        if isinstance(layer, ExpertWeight):
            return LoraExperts
        return LoraLinear if isinstance(layer, ADAPTABLE) else None

    def unsupported_reason(
        self, layer: nn.Module, name: str, config: Any, in_place: bool
    ) -> str | None:
        if isinstance(layer, (nn.RNNBase, nn.MultiheadAttention)) and in_place:
            return _bias_problem(layer, config)
        if isinstance(layer, ExpertWeight):
            return _expert_problem(layer, config, in_place)
        reason = _unsupported_reason(layer, rank_of(config, name))
        return reason or shape_unsupported_reason(layer, in_place)

    def create(
        self,
        original: Callable[[nn.Module], nn.Module],
        layer: nn.Module,
        name: str,
        config: Any,
        options: Mapping[str, Any],
    ) -> Any:
        if isinstance(layer, TRANSPOSED):
            return TransposedFactors(layer, name, config, options)
        if isinstance(layer, nn.RNNBase):
            return RecurrentFactors(layer, name, original)
        if isinstance(layer, nn.MultiheadAttention):
            return attention_factors(layer, original)
        if isinstance(layer, ExpertWeight):
            return ParamWrapper(
                layer.owner,
                name,
                parameter_name=layer.parameter_name,
                config=config,
                r=options["r"],
                lora_alpha=options["lora_alpha"],
            )
        # PEFT makes `A` of the class of the layer, which may be ours or the user's own.
        return original(bare_convolution(layer) if isinstance(layer, CONVOLUTIONS) else layer)

    def subtracts_from_base(self, config: Any) -> bool:
        return subtracts_from_base(config)

    def for_plain_base(
        self, tensors: dict[str, Tensor], config: dict[str, Any], initial: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The same adapter for the base as it was before its initialisation rewrote it.

        Trained as ``(W - s B0 A0) + s B A``, it is ``W + s [B, -B0] [A; A0]``: plain LoRA of twice
        the rank, which programs that know nothing of the initialisation apply right.
        """
        doubled = dict(tensors)
        for key, first in initial.items():
            is_a = key.endswith("lora_A.weight")
            doubled[key] = torch.cat([tensors[key], first if is_a else -first], 0 if is_a else 1)
        # The scaling, alpha / r or alpha / sqrt(r), stays what it was.
        growth = 2**0.5 if config["use_rslora"] else 2
        changed = {
            "init_lora_weights": True,
            "r": 2 * config["r"],
            "lora_alpha": growth * config["lora_alpha"],
            "rank_pattern": {k: 2 * v for k, v in config["rank_pattern"].items()},
            "alpha_pattern": {k: growth * v for k, v in config["alpha_pattern"].items()},
        }
        return doubled, {**config, **changed}

    def difference_in_peft(self, layer: Any) -> str | None:
        if isinstance(layer, nn.RNNBase):
            return "PEFT has no adapters for recurrent layers, and refuses the folder"
        if isinstance(layer, nn.MultiheadAttention):
            return None
        if isinstance(layer, TRANSPOSED):
            return "PEFT has no adapters for transposed convolutions, and refuses the folder"
        if isinstance(layer, CONVOLUTIONS):
            if pads_with_values(layer):
                return (
                    f"PEFT applies the adapter without padding_mode={layer.padding_mode!r}, so "
                    "that its output differs at the borders"
                )
            if is_dilated(layer):
                return (
                    f"PEFT applies the adapter without dilation={tuple(layer.dilation)}, so that "
                    "its output differs or has another size"
                )
        if not has_standard_forward(layer) and not hasattr(layer, "embed_scale"):
            return (
                "its class has a forward pass of its own. Here that uses the weight plus the "
                "adapter, and PEFT adds the adapter to its output"
            )
        return None

    def ranks(self, fields: Mapping[str, Any]) -> list[int]:
        ranks = [fields.get("r", 0), *(fields.get("rank_pattern") or {}).values()]
        return [rank for rank in ranks if isinstance(rank, int)]

    def label(self, fields: Mapping[str, Any]) -> str:
        name = "rsLoRA" if fields.get("use_rslora") else "LoRA"
        return f"{name} r={fields['r']} alpha={fields['lora_alpha']:g}"


def _bias_problem(layer: Any, config: Any) -> str | None:
    if not isinstance(layer, nn.RNNBase) or not layer.bias or config.bias == "none":
        return None
    return (
        f"bias={config.bias!r} trains what is called `bias`, and a {type(layer).__name__} has its "
        "biases under other names (`bias_ih_l0`), which would stay frozen. Leave `bias` at 'none', "
        "or train the layer in full: name it in `modules_to_save`"
    )


def _expert_problem(layer: Any, config: Any, in_place: bool) -> str | None:
    if not in_place:
        return (
            "weights of experts are adapted in place only, and with these settings PEFT wraps the "
            "layers. Use plain LoRA, or leave them out by target_parameters=[]"
        )
    if config.lora_dropout:
        return (
            f"lora_dropout={config.lora_dropout}: PEFT has no dropout in front of adapters on "
            "parameters. Set it to 0, or leave the experts out by target_parameters=[]"
        )
    return run_problem(layer.owner)


def _unsupported_reason(layer: Any, rank: int) -> str | None:
    kind = type(layer).__name__
    if isinstance(layer, nn.RNNBase):
        return (
            f"a {kind} keeps several weights, which LoRA without `use_dora` and `lora_bias` goes "
            "on, in place, where they are parameters: without weight norm and the like, and with "
            "no target that PEFT wraps. Or train it in full: name it in `modules_to_save`"
        )
    if isinstance(layer, nn.MultiheadAttention):
        return (
            "an attention is adapted in place, by LoRA without `use_dora` and `lora_bias`, where "
            "queries, keys and values have one weight (no `kdim` and `vdim`)"
        )
    if not isinstance(layer, ADAPTABLE):
        return f"a {kind} has no weight to add a low-rank product to"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return f"max_norm={layer.max_norm} makes the embedding rewrite its frozen weight"
    groups = getattr(layer, "groups", 1)
    if groups > 1 and isinstance(layer, ConvTransposeNd):
        return f"a transposed convolution with groups={groups} has no low-rank form in PEFT"
    if rank % groups:
        return (
            f"its groups={groups} do not divide the rank {rank}. Leave it out by "
            f"`exclude_modules`, or give it a multiple of {groups} in `rank_pattern`"
        )
    if groups > 1 and not has_standard_forward(layer):
        return f"groups={groups} in a {kind} with a forward pass of its own"
    return None


LORA = Lora(
    "LORA",
    hides_model_type=True,
    remark="also rsLoRA and DoRA (`use_dora`); `lora_bias` is in PEFT's layers",
    ignored_properties=("padding_mode", "dilation"),
    # Others (dropout, the way targets were written) may change between runs.
    decisive_fields=(
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "lora_bias",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "modules_to_save",
        "trainable_token_indices",
        "init_lora_weights",
    ),
)
