"""Our recomputation against torch's public selective checkpointing, with the same budget.

``python benchmarks/selective_checkpointing.py [--device cuda] [--rounds N] [--quick]`` trains the
same random Llama as ``activation_budget.py``, with QLoRA and with LoRA, in one process; the ways
take turns, some steps each:

- ``none``: everything is saved.
- ``ours``: ``gradient_checkpointing=0.5``.
- ``torch``: ``create_selective_checkpoint_contexts`` saves the products and the attention of some
  blocks, chosen by the same rule for the same budget, from what such blocks keep that way.
- ``torch_same_levels``: the same, with the levels that ours chose.

For each: the seconds of a step, the bytes that the blocks keep for the backward pass, the peak of
a whole step, and the largest difference of a gradient from that of ``none``. The record is
``benchmarks/records/selective_checkpointing.json`` (``..._cuda.json``).
"""

from __future__ import annotations

import argparse
from collections import Counter
from functools import partial
from typing import Any

import activation_budget
from activation_budget import Trained
from allocations import allocations
from record import (
    conditions,
    device_name,
    interleaved,
    markdown,
    ratio,
    record_name,
    summary,
    timed,
    write,
)

SHARE = 0.5
WAYS = ("none", "ours", "torch", "torch_same_levels")
# Products and attention; a dequantized weight is not to be kept.
SAVED = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention",
         "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
         "_scaled_dot_product_flash_attention_for_cpu")  # fmt: skip


def saved_operations() -> list[Any]:
    """Returns the operations whose results torch keeps."""
    import torch

    return [getattr(torch.ops.aten, name).default for name in SAVED]


def use_levels(model: Any, levels: list[str]) -> None:
    """Makes each block keep by torch's public functions what its level says.

    In selective blocks a hook on the dropout of the adapters turns fused layers off. They add the
    adapter to the product in place, and torch refuses a saved result that is changed.
    """
    from torch.utils.checkpoint import (
        checkpoint,
        create_selective_checkpoint_contexts,
        noop_context_fn,
    )

    from lightning_peft.compat.transformers import CHECKPOINT_FUNCTION
    from lightning_peft.engine.training.activation_budget import SAVE_ALL, SELECTIVE

    selective = partial(create_selective_checkpoint_contexts, saved_operations())
    for handle in model.__dict__.pop("benchmark_hooks", []):
        handle.remove()
    model.__dict__["benchmark_hooks"] = [
        layer.register_forward_hook(lambda *_: None)
        for block, level in zip(model.model.layers, levels, strict=True)
        for name, layer in block.named_modules()
        if level == SELECTIVE and ".lora_dropout." in name
    ]

    def run(level: str, function: Any, *args: Any) -> Any:
        if level == SAVE_ALL:
            return function(*args)
        contexts = selective if level == SELECTIVE else noop_context_fn
        return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)

    for layer, level in zip(model.model.layers, levels, strict=True):
        setattr(layer, CHECKPOINT_FUNCTION, partial(run, level))


def levels_of(trained: Trained) -> list[str]:
    """Returns the levels that our budget chose for the last step."""
    from lightning_peft.compat.transformers import CHECKPOINT_FUNCTION

    (budget,) = getattr(trained.model.model.layers[0], CHECKPOINT_FUNCTION).args
    return list(budget._levels)


def levels_for(limit: float, quantized: bool, given: argparse.Namespace) -> list[str]:
    """Returns the levels by which torch's way keeps at most ``limit`` bytes."""
    from lightning_peft.engine.training.activation_budget import (
        FULL,
        SAVE_ALL,
        SELECTIVE,
        BlockSizes,
        choose_levels,
    )

    trained = Trained(True, quantized, given)
    count, kept = len(trained.model.model.layers), []
    for level in (SAVE_ALL, SELECTIVE, FULL):
        use_levels(trained.model, [level] * count)
        kept.append(trained.kept() // count)
    return choose_levels([BlockSizes(("", ()), *kept)] * count, limit)


def gradients(trained: Trained) -> dict[str, Any]:
    """Returns the gradients of the adapters for a fixed batch."""
    import torch

    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(64, (trained.rows, trained.length), generator=draw).to(trained.device)
    trained.model(input_ids=ids, labels=ids).loss.backward()
    found = {n: p.grad.clone() for n, p in trained.model.named_parameters() if p.requires_grad}
    trained.optimizer.zero_grad()
    return found


def measured(quantized: bool, given: argparse.Namespace) -> dict[str, Any]:
    """Returns the record of one case."""
    settings = {"none": False, "ours": SHARE, "torch": True, "torch_same_levels": True}
    models = {way: Trained(settings[way], quantized, given) for way in WAYS}
    kept = {way: models[way].kept() for way in ("none", "ours")}
    levels = {"ours": levels_of(models["ours"])}
    levels["torch"] = levels_for(SHARE * kept["none"], quantized, given)
    levels["torch_same_levels"] = levels["ours"]
    for way in ("torch", "torch_same_levels"):
        use_levels(models[way].model, levels[way])
        kept[way] = models[way].kept()
    of = {way: gradients(model) for way, model in models.items()}
    different = {
        way: max(float((value - of["none"][name]).abs().max()) for name, value in found.items())
        for way, found in of.items()
    }
    peaks = {way: allocations(given.device, model.step)[0] for way, model in models.items()}
    steps = {way: timed(models[way].step, given.device, given.block) for way in WAYS}
    runs = interleaved(steps, given.rounds)
    return {
        "levels": {way: Counter(found) for way, found in levels.items()},
        "kept_bytes": kept,
        "peak_bytes": peaks,
        "gradient_difference": different,
        "losses_equal": {way: models[way].losses == models["none"].losses for way in WAYS},
        "seconds": summary(runs),
        "ratios": {
            f"{way} to {other}": ratio(runs, way, other, "seconds")
            for way, other in (
                ("ours", "none"),
                ("torch", "none"),
                ("torch_same_levels", "none"),
                ("torch", "ours"),
                ("torch_same_levels", "ours"),
            )
        },
        "runs": runs,
    }


def lines(content: dict[str, Any]) -> list[str]:
    """Returns the table of a record."""
    rows = []
    for case, found in content["cases"].items():
        for way in WAYS:
            spread = found["ratios"].get(f"{way} to none", {"median": 1.0, "min": 1, "max": 1})
            time = f"{spread['median']:.3f} ({spread['min']:.3f} to {spread['max']:.3f})"
            kept, peak = (found[key][way] / 1e6 for key in ("kept_bytes", "peak_bytes"))
            levels = found["levels"].get(way, {})
            how = ", ".join(f"{count} {level}" for level, count in levels.items())
            difference = f"{found['gradient_difference'][way]:.1e}"
            cells = [case, way, time, f"{kept:.1f}", f"{peak:.1f}", difference, how]
            rows.append(cells)
    return markdown("case | way | time to none | kept MB | peak MB | gradients | levels", rows)


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--block", type=int, default=4, help="steps between two turns")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.block, given.length = 1, 1, 64
    content: dict[str, Any] = {
        "conditions": conditions(),
        "device": device_name(given.device),
        "model": activation_budget.QUICK if given.quick else activation_budget.SIZE,
        "length": given.length,
        "rounds": given.rounds,
        "steps_in_a_round": given.block,
        "budget": SHARE,
        "cases": {name: measured(name == "QLoRA", given) for name in ("QLoRA", "LoRA")},
    }
    content["ratios"] = {
        f"{case}: {name}": found
        for case, record in content["cases"].items()
        for name, found in record["ratios"].items()
    }
    print("\n".join(lines(content)))
    write(record_name("selective_checkpointing", given.device), content, quick=given.quick)


if __name__ == "__main__":
    main()
