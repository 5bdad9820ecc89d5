"""Held-out loss of full fine-tuning, LoRA and QLoRA at equal tokens, and the error of 4-bit types.

``python benchmarks/quality.py [--steps N] [--seeds N] [--resume] [--quick]`` trains the base that
is in the package on the bundled instructions, once for each method and seed, with the same
batches; each method takes the best of its learning rates by the validation loss of the first seed.
Then it quantizes the weights of that base to NF4 and FP4, and to int4 by rounding to the nearest of
its levels: plain, with one scale for a row, and in blocks of 64 as the other two. ``--model`` is a
folder of another pretrained model; without one, the record has none. The record is
``benchmarks/records/quality.json``, written after each base; ``--resume`` takes the trainings that
are in it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from record import QUIET, conditions, read, spread, write

METHODS = ("full", "lora", "qlora")
ADAPTERS = (3e-4, 1e-3, 3e-3, 1e-2)
RATES = {"full": (1e-4, 3e-4, 1e-3), "lora": ADAPTERS, "qlora": ADAPTERS}
BLOCK = 64


def held_out(method: str, model: str, data: str, rate: float, seed: int, steps: int) -> float:
    """Returns the validation loss after training."""
    import pytorch_lightning
    from lightning_fabric.utilities.seed import seed_everything

    from lightning_peft import LoRAStrategy, QLoRAStrategy, SupervisedData
    from lightning_peft.tasks.causal_lm import CausalLM

    strategies: dict[str, Any] = {
        "full": lambda: "auto",
        "lora": lambda: LoRAStrategy(r=16, announce=False),
        # AdamW of torch, as for the others.
        "qlora": lambda: QLoRAStrategy(r=16, announce=False, optimizer=None),
    }
    seed_everything(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pytorch_lightning.Trainer(
            strategy=strategies[method](),
            max_steps=steps,
            max_epochs=-1,
            default_root_dir=folder,
            **QUIET,
        )
        # The split is that of `split_seed`, the same for all.
        rows = SupervisedData(data, model, chat_template="chatml", max_length=256, batch_size=8)
        task = CausalLM(model, learning_rate=rate, dtype="float32")
        trainer.fit(task, rows)
        found = trainer.validate(task, rows, verbose=False)
    return float(found[0]["val_loss"])


def weight_errors(model: str) -> dict[str, float]:
    """Returns the relative root mean square error of the linear weights for each 4-bit type."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from transformers import AutoModelForCausalLM

    total, wrong = 0.0, {"nf4": 0.0, "fp4": 0.0, "int4": 0.0, "int4_in_blocks": 0.0}
    base = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    for layer in base.modules():
        if not isinstance(layer, torch.nn.Linear) or layer is base.get_output_embeddings():
            continue
        weight = layer.weight.detach()
        total += weight.square().sum().item()
        flat = weight.flatten()
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        for kind in ("nf4", "fp4"):
            # In blocks: bitsandbytes on a CPU misreads rows that end within one.
            codes, state = quantize_4bit(blocks, blocksize=BLOCK, quant_type=kind)
            wrong[kind] += (dequantize_4bit(codes, state) - blocks).square().sum().item()
        for kind, values in (("int4", weight), ("int4_in_blocks", blocks)):
            scale = values.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
            rounded = (values / scale).round().clamp(-7, 7) * scale
            wrong[kind] += (rounded - values).square().sum().item()
    return {kind: (value / total) ** 0.5 for kind, value in wrong.items()}


def known_losses(record: Any) -> dict[tuple[str, float, int], float]:
    """Returns the losses of a base that a record has, by method, learning rate and seed."""
    if not isinstance(record, dict):
        return {}
    found = {
        (method, float(rate), 0): loss
        for method, tried in record["by_rate"].items()
        for rate, loss in tried.items()
    }
    for method, values in record["held_out_loss"].items():
        found |= {(method, record["rates"][method], seed): loss for seed, loss in enumerate(values)}
    return found


def measured(
    model: str, data: str, steps: int, seeds: int, quick: bool, before: Any
) -> dict[str, Any]:
    """Returns the losses of all methods on one model, and the errors of its weights."""
    known = known_losses(before)

    def loss_of(method: str, rate: float, seed: int) -> float:
        if (method, rate, seed) not in known:
            known[method, rate, seed] = held_out(method, model, data, rate, seed, steps)
        return known[method, rate, seed]

    losses: dict[str, list[float]] = {}
    chosen: dict[str, float] = {}
    tried: dict[str, dict[str, float]] = {}
    for method in METHODS:
        rates = RATES[method][:1] if quick else RATES[method]
        first = {rate: loss_of(method, rate, 0) for rate in rates}
        chosen[method] = min(first, key=lambda rate: first[rate])
        losses[method] = [first[chosen[method]]]
        tried[method] = {f"{rate:g}": loss for rate, loss in first.items()}
        print(f"seed 0 {method}: {tried[method]}", flush=True)
    # Seeds in turn, so that nothing that changes meanwhile falls on one method.
    for seed in range(1, seeds):
        for method in METHODS:
            losses[method].append(loss_of(method, chosen[method], seed))
            print(f"seed {seed} {method}: {losses[method][-1]:.4f}", flush=True)
    ratios = {
        f"{one}_to_{other}": spread(
            [a / b for a, b in zip(losses[one], losses[other], strict=True)]
        )
        for one, other in (("lora", "full"), ("qlora", "lora"))
    }
    errors = weight_errors(model)
    for one, other in (("nf4", "fp4"), ("fp4", "int4"), ("fp4", "int4_in_blocks")):
        ratios[f"{one}_to_{other}"] = spread([errors[one] / errors[other]])
    return {
        "rates": chosen,
        "by_rate": tried,
        "held_out_loss": losses,
        "spread": {method: spread(values) for method, values in losses.items()},
        "ratios": ratios,
        "relative_weight_error": errors,
    }


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", help="folder of a pretrained model of another family")
    parser.add_argument("--resume", action="store_true", help="train only what is not recorded")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    from lightning_peft.demo.run import BASE

    data = str(Path(BASE).parent / "instructions.jsonl")
    steps, seeds = (2, 1) if given.quick else (given.steps, given.seeds)
    where = conditions()
    recorded = (read("quality") or {}) if given.resume and not given.quick else {}
    if recorded.get("steps") != steps:
        recorded = {}
    content: dict[str, Any] = {
        "conditions": where,
        "steps": steps,
        "seeds": seeds,
        "another_family": "none was on the machine; no installed package ships one",
    } | {name: recorded[name] for name in ("another_family",) if name in recorded}
    for name, model in (("shipped_base", str(BASE)), ("another_family", given.model)):
        if model:
            before = recorded.get(name)
            content[name] = measured(model, data, steps, seeds, given.quick, before)
            write("quality", content, quick=given.quick)


if __name__ == "__main__":
    main()
