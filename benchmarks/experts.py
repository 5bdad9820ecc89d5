"""Adapters on experts: our routed products against PEFT's wrapper and against whole weights.

``python benchmarks/experts.py [--device cuda] [--rounds N] [--quick]`` trains one random Qwen3-MoE
model in bfloat16 with LoRA on its experts alone, in one process; the ways take turns, some steps
each:

- ``ours``: the adapter is applied to the rows that an expert gets.
- ``peft``: ``peft.get_peft_model`` with ``target_parameters``, which adds ``B A`` to the weights of
  all experts in each forward pass.
- ``whole``: ours, with the weights read as ``W + s B A`` of all experts.
- ``nf4``: ours, with the experts quantized to NF4.

For each: the seconds of a step, the peak of a step above what is there before, and the bytes of
the model. The record is ``benchmarks/records/experts.json`` (``..._cuda.json``).
"""

from __future__ import annotations

import argparse
from typing import Any

from allocations import allocations
from record import (
    conditions,
    device_name,
    interleaved,
    markdown,
    ratio,
    ratio_table,
    record_name,
    summary,
    timed,
    write,
)

WAYS = ("ours", "peft", "whole", "nf4")
RANK = 8
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
SIZE = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4,
        "moe_intermediate_size": 384}  # fmt: skip
QUICK = {**SIZE, "hidden_size": 64, "num_hidden_layers": 2, "num_experts": 4,
         "moe_intermediate_size": 64}  # fmt: skip


class Trained:
    """A model that is trained in one of :data:`WAYS`."""

    def __init__(self, way: str, given: argparse.Namespace) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, Qwen3MoeConfig

        from lightning_peft import engine

        self.rows, self.length, self.device = 2, given.length, given.device
        torch.manual_seed(0)
        config = Qwen3MoeConfig(**(QUICK if given.quick else SIZE), use_cache=False)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
        lora = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=PARAMETERS
        )
        torch.manual_seed(1)
        if way == "peft":
            model = get_peft_model(model, lora)
        else:
            quantization = engine.quantization_config() if way == "nf4" else None
            engine.inject(model, lora, quantization_config=quantization)
        if way == "whole":
            read_whole_weights(model)
        self.model = model.to(given.device)
        trained = [param for param in self.model.parameters() if param.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=2e-4)
        self.draw = torch.Generator().manual_seed(2)
        self.bytes = bytes_of(self.model)

    def step(self) -> None:
        """Takes one step on a batch of random tokens."""
        import torch

        shape = (self.rows, self.length)
        ids = torch.randint(SIZE["vocab_size"], shape, generator=self.draw).to(self.device)
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def read_whole_weights(model: Any) -> None:
    """Makes experts compute with ``W + s B A`` of all of them, as code that knows no view does."""
    from lightning_peft.engine.layers.expert_weights import ExpertWeight

    for layer in model.modules():
        if isinstance(layer, ExpertWeight):
            cls = type(layer)
            body = {"weight": property(lambda one: one.effective_weight())}
            layer.__class__ = type(f"Whole{cls.__name__}", (cls,), body)


def bytes_of(model: Any) -> int:
    """Returns the bytes of all parameters, with the constants of quantized ones."""
    from lightning_peft.engine.backends.registry import storage_bytes

    return sum(map(storage_bytes, model.parameters()))


def main() -> None:
    """Measures, and writes the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.steps, given.length = 2, 1, 16
    where = conditions()
    models = {way: Trained(way, given) for way in WAYS}
    for model in models.values():
        model.step()
    peaks = {way: allocations(given.device, model.step)[0] for way, model in models.items()}
    steps = {way: timed(models[way].step, given.device, given.steps) for way in WAYS}
    runs = interleaved(steps, given.rounds)
    ratios = {f"{way} / ours, seconds": ratio(runs, way, "ours", "seconds") for way in WAYS[1:]}
    content = {
        "conditions": where,
        "device": device_name(given.device),
        "seconds": summary(runs),
        "peak_bytes": peaks,
        "model_bytes": {way: model.bytes for way, model in models.items()},
        "ratios": ratios,
    }
    rows = [[way, peaks[way], models[way].bytes] for way in WAYS]
    print("\n".join([*markdown("way | peak of a step | model", rows), *ratio_table(ratios)]))
    write(record_name("experts", given.device), content, quick=given.quick)


if __name__ == "__main__":
    main()
