"""AdaLoRA, after Zhang et al. 2023 (arXiv 2303.10512): ``W + s B diag(E) A`` in place.

The ranks that a layer keeps are those whose entries of ``E`` are not zero.
:class:`lightning_peft.engine.training.rank_budget.RankBudget` chooses them while a model trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import AdaLoraConfig
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.engine.layers.adapter import AdapterLayer, accumulation_dtype
from lightning_peft.engine.layers.kinds import LINEAR_LIKE, from_rows
from lightning_peft.engine.methods.base import InPlaceMethod
from lightning_peft.engine.methods.lora_config import lora_problems, refuse_extensions
from lightning_peft.errors import ConfigError, itemize

_IGNORED = ("use_rslora", "lora_bias", "alpha_pattern")


class AdaLoraLinear(AdapterLayer):
    """A linear layer; ``A`` is ``(r, in)``, ``E`` is ``(r, 1)`` and ``B`` is ``(out, r)``."""

    label = "AdaLora"
    adapter_layer_names = ("lora_A", "lora_B", "lora_E")
    adapter_module_names = ("lora_dropout",)

    # PEFT's scaling and number of ranks, which do not change when ranks are cut.
    adapter_settings: dict[str, tuple[float, float]]
    lora_A: Any
    lora_B: Any
    lora_E: Any
    lora_dropout: Any

    @classmethod
    def settings_of(cls, peft_layer: Any, name: str) -> tuple[float, float]:
        """Scaling and number of ranks of one adapter."""
        return float(peft_layer.scaling[name]), float(peft_layer.ranknum[name])

    def adapted_forward(self, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Returns the layer's own output plus what the adapter adds to it."""
        result = self.base_forward(*args, **kwargs)
        for name in names:
            x = self.lora_dropout[name](args[0] if args else next(iter(kwargs.values())))
            low = F.linear(x, (self.lora_A[name] * self.lora_E[name]).to(x.dtype))
            added = F.linear(low, self.lora_B[name].to(low.dtype))
            result = result + self._scaled(name, added).to(result.dtype)
        return result

    def delta_weight(self, name: str, weight: Tensor) -> Tensor:
        """Returns ``s B diag(E) A``."""
        a, b, e = (
            factor.to(accumulation_dtype(factor))
            for factor in (self.lora_A[name], self.lora_B[name], self.lora_E[name])
        )
        return from_rows(self, self._scaled(name, b @ (a * e)))

    def has_no_effect(self) -> bool:
        """Whether all ranks are still zero."""
        return not any(bool(self.lora_E[name].any()) for name in self.adapter_settings)

    def _scaled(self, name: str, added: Tensor) -> Tensor:
        scaling, ranks = self.adapter_settings[name]
        return added * scaling / (ranks + 1e-5)


class AdaLora(InPlaceMethod):
    """AdaLoRA on linear layers."""

    def checked_config(self, config: AdaLoraConfig) -> AdaLoraConfig:
        refuse_extensions(config)
        problems = _problems(config)
        if problems:
            raise ConfigError("These AdaLoRA settings cannot work:" + itemize(problems))
        return config

    def reason_for_trainer(self, config: Any) -> str:
        return (
            "ranks are cut after each optimizer step of a Trainer, and would stay as they are here"
        )

    def layer_class(self, layer: nn.Module) -> type[AdapterLayer] | None:
        return AdaLoraLinear if isinstance(layer, LINEAR_LIKE) else None

    def unsupported_reason(
        self, layer: nn.Module, name: str, config: Any, in_place: bool
    ) -> str | None:
        if isinstance(layer, LINEAR_LIKE):
            return None
        return f"AdaLoRA is for linear layers here, not a {type(layer).__name__}"

    def ranks(self, fields: Mapping[str, Any]) -> list[int]:
        return [rank for rank in [fields.get("init_r")] if isinstance(rank, int)]

    def label(self, fields: Mapping[str, Any]) -> str:
        return f"AdaLoRA r={fields['init_r']} to {fields['target_r']}"


def _problems(config: AdaLoraConfig) -> list[str]:
    if config.rank_pattern:
        return [
            "rank_pattern: PEFT's files hold the ranks that were left of an AdaLoRA adapter, and "
            "here all are held, those without an effect as zeros. Load the folder with "
            "peft.PeftModel.from_pretrained"
        ]
    problems = lora_problems({**vars(config), "rank_pattern": None})
    problems += [
        f"{name}={value!r}: PEFT's AdaLoRA does not follow it. Leave it out"
        for name in _IGNORED
        if (value := getattr(config, name, None))
    ]
    if not isinstance(config.init_lora_weights, bool):
        problems.append(f"init_lora_weights={config.init_lora_weights!r}: True or False")
    if not 0 < config.target_r < config.init_r:
        problems.append(
            f"target_r={config.target_r!r} with init_r={config.init_r!r}: the average rank at the "
            "end is positive and less than the rank at the start"
        )
    least = {"tinit": 0, "tfinal": 0, "deltaT": 1}
    problems += [
        f"{name}={getattr(config, name)!r}: a number of optimizer steps, {lowest} or more"
        for name, lowest in least.items()
        if getattr(config, name) < lowest
    ]
    problems += [
        f"{name}={getattr(config, name)!r}: between 0 and 1"
        for name in ("beta1", "beta2")
        if not 0 < getattr(config, name) < 1
    ]
    return problems


ADALORA = AdaLora(
    "ADALORA",
    remark="in training only: the strategy moves the budget",
    from_trainer=("total_step",),
    hides_model_type=True,
    decisive_fields=(
        "peft_type",
        "init_r",
        "target_r",
        "lora_alpha",
        "bias",
        "modules_to_save",
        "trainable_token_indices",
    ),
)
