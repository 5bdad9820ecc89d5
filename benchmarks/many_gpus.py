"""Plans for 1 to 512 GPUs, and what others have published of several.

``python benchmarks/many_gpus.py`` plans for Llama 3.1 of 8B, 70B and 405B parameters, whose
dimensions are below (a minute or two; nothing is loaded), and writes three tables into
``docs/planner.md``: of these plans; of published figures; and of the bytes that
``benchmarks/sharding.py`` counted in 1, 2 and 4 processes.
"""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import Any, cast

from planner_anchors import GB, GIB, LLAMAS, Anchor, plan_of
from planner_anchors import table as anchor_table
from planner_grid import PAGE
from record import markdown, read, write_between
from sharding import COUNTS, METHODS, SIZES
from torch import Tensor, nn

from lightning_peft.plan.cluster import cluster_of, step_bounds
from lightning_peft.plan.device_memory import readable
from lightning_peft.plan.prediction import PARTS, Prediction, process_bytes
from lightning_peft.plan.settings import PlanSettings
from lightning_peft.plan.trace import Step
from lightning_peft.plan.work import Work
from lightning_peft.tasks.token_loss import chunked_loss

# Those of Llama 3.1 are the dimensions of Llama 3.
MODELS: dict[str, dict[str, int]] = {
    "Llama-3.1-8B": LLAMAS["Llama-3-8B"],
    "Llama-3.1-70B": LLAMAS["Llama-3-70B"],
    "Llama-3.1-405B": {
        "vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248,
        "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8,
    },
    "Llama-2-70B": {**LLAMAS["Llama-3-70B"], "vocab_size": 32000},
    "Llama-2-7B": LLAMAS["Llama-7B"],
    "Yi-34B": {
        "vocab_size": 64000, "hidden_size": 7168, "intermediate_size": 20480,
        "num_hidden_layers": 60, "num_attention_heads": 56, "num_key_value_heads": 8,
    },
}  # fmt: skip
# LoRA of the large ones does not fit into one.
GPUS = {"qlora": (1, 8, 64, 512), "lora": (8, 64)}
IN_A_NODE = 8
SOME_LAYERS = (4, 8)
_MLP = ("gate", "up", "down")


def plan(model: str, settings: PlanSettings, step: Step | None = chunked_loss) -> Prediction:
    """Returns the plan of one process, in bfloat16.

    Layers are alike, so that all numbers lie on a straight line; two points of it are planned.
    """
    layers = MODELS[model]["num_hidden_layers"]
    few, more = (
        plan_of(
            {**MODELS[model], "max_position_embeddings": 131072, "num_hidden_layers": count},
            settings,
            step,
        )
        for count in SOME_LAYERS
    )

    def at(a: float, b: float) -> int:
        first, second = SOME_LAYERS
        return round(a + (b - a) * (layers - first) / (second - first))

    pairs = zip(astuple(few.trace.work), astuple(more.trace.work), strict=True)
    moments = []
    for name in ("at_peak", "at_start"):
        first, second = getattr(few.trace, name), getattr(more.trace, name)
        moments.append({part: at(first.get(part, 0), second.get(part, 0)) for part in PARTS})
    fullest = max(moments, key=lambda held: sum(held.values()))
    trace = replace(
        more.trace,
        optimizer=at(few.trace.optimizer, more.trace.optimizer),
        work=Work(*(at(a, b) for a, b in pairs)),
    )
    breakdown = {**fullest, **process_bytes(trace, settings.device)}
    return replace(more, trace=trace, breakdown=breakdown)


def table() -> str:
    """Returns the plans for 1 to 512 GPUs."""
    rows = []
    for model in list(MODELS)[:3]:
        for method, counts in GPUS.items():
            for count in counts:
                run: dict[str, Any] = {"seq_len": 2048, "precision": "bf16-mixed"}
                settings = PlanSettings(
                    method,  # type: ignore[arg-type]
                    **run,
                    processes=count,
                    sharding="fsdp2",
                    gradient_checkpointing=True,
                )
                rows.append([model, method, str(count), *_cells(plan(model, settings), count)])
                print(*rows[-1], sep=" | ", flush=True)
    columns = (
        "model | method | GPUs | GB each | its part of the base | gathered | sent in a step | "
        "compute s | memory s | interconnect s | bound by"
    )
    return "\n".join(markdown(columns, rows))


def _cells(found: Prediction, count: int) -> list[str]:
    cluster = cluster_of("h100", min(count, IN_A_NODE), -(-count // IN_A_NODE), {})
    cells = [
        f"{found.peak_bytes / GB:.1f}",
        readable(base_bytes(found)),
        readable(found.breakdown["gathered"]),
        readable(found.trace.work.sent(count)),
    ]
    if count == 1:
        # Nothing is counted in one process.
        return [*cells[:2], "-", "-", "-", "-", "-", "-"]
    bounds = step_bounds(found.trace.work, cluster)
    assert bounds is not None
    seconds = [bounds.compute, bounds.memory, bounds.interconnect]
    return [*cells, *(f"{one:.2f}" for one in seconds), bounds.bound]


def base_bytes(found: Prediction) -> int:
    """What a process holds of the frozen weights, with code tables and buffers."""
    return found.breakdown["weights_quantized"] + found.breakdown["weights_dense"]


def all_shared(found: Prediction) -> float:
    """What torch's allocator holds where what trains is shared too, and needs no buckets."""
    parts = found.breakdown
    trained = parts["adapters"] + parts["gradients"] + parts["optimizer"]
    whole = found.allocated - parts["gradient_buckets"]
    return whole - trained * (1 - 1 / found.settings.processes)


def in_16_bits(found: Prediction) -> float:
    """The same with FSDP1: what trains in bfloat16, and the scales of 4-bit weights whole."""
    parts, count = found.breakdown, found.settings.processes
    trained = parts["adapters"] + parts["gradients"] + parts["optimizer"]
    return all_shared(found) - trained / (2 * count) + (count - 1) * _scales(found)


def on_the_cpu(found: Prediction) -> float:
    """The same without the process's part of base and adapters, which FSDP1 leaves on the CPU."""
    parts, count = found.breakdown, found.settings.processes
    trained = parts["adapters"] + parts["gradients"] + parts["optimizer"]
    return in_16_bits(found) - base_bytes(found) - trained / (2 * count) + _scales(found)


def _scales(found: Prediction) -> float:
    """A process's part of the scales: 0.127 of the 4.127 bits of a weight."""
    return found.breakdown["weights_quantized"] * 0.127 / 4.127


def loss_of_2024(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss as transformers computed it then: logits in float32, shifted by a copy, and held."""
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = module(**inputs, use_cache=False).logits.float()
    shifted = logits[:, :-1].contiguous().flatten(0, 1)
    loss: Any = nn.functional.cross_entropy(shifted, labels[:, 1:].flatten())
    loss.logits = logits
    return cast("Tensor", loss)


def anchors() -> list[Anchor]:
    """Returns the published figures."""

    def run(count: int, method: Any = "qlora", **given: Any) -> PlanSettings:
        return PlanSettings(
            method, processes=count, sharding="fsdp2", padded=False,
            **{"precision": "bf16-true", "optimizer": "adamw_torch", **given},
        )  # fmt: skip

    # All but o_proj, as train.py of fsdp_qlora has it.
    six = {"r": 64, "target_modules": [f"{name}_proj" for name in ("q", "k", "v", *_MLP)]}
    long: dict[str, Any] = {"batch_size": 2, "seq_len": 2048}
    one = {"lora": six, "gradient_checkpointing": True}
    allocated, reserved = "allocated", "reserved by the allocator"
    return [
        Anchor("fsdp_qlora, LoRA r=64, 512 tokens, 2 GPUs", "Llama-2-7B",
               run(2, "lora", **one), 8.28 * GIB, in_16_bits, allocated, loss_of_2024),
        Anchor("the same, 2048 tokens", "Llama-2-7B",
               run(2, "lora", seq_len=2048, **one), 9.16 * GIB, in_16_bits, allocated,
               loss_of_2024),
        Anchor("fsdp_qlora, QLoRA r=64, batch 4, 2048 tokens, 2 GPUs", "Llama-2-7B",
               run(2, batch_size=4, seq_len=2048, lora=six), 11.22 * GIB, in_16_bits, reserved,
               loss_of_2024),
        Anchor("the same, batch 2", "Yi-34B", run(2, **long, lora=six), 23.05 * GIB, in_16_bits,
               reserved, loss_of_2024),
        Anchor("the same, on the CPU", "Llama-2-70B", run(2, **long, lora=six), 14.92 * GIB,
               on_the_cpu, reserved, loss_of_2024),
        Anchor("PEFT docs, r=8, batch 2, 2048 tokens, 2 GPUs", "Llama-2-70B",
               run(2, **long, lora={"r": 8}), 35.6 * GB, in_16_bits, "of the process",
               loss_of_2024),
        Anchor("the same, on the CPU", "Llama-2-70B", run(2, **long, lora={"r": 8}), 19.6 * GB,
               on_the_cpu, "of the process", loss_of_2024),
        Anchor("axolotl, r=32, batch 4, 512 tokens, 2 GPUs, on the CPU", "Llama-2-70B",
               run(2, batch_size=4, lora={"r": 32}), 14 * GB, on_the_cpu, "of the process",
               loss_of_2024),
        Anchor("torchtune, LoRA r=16, batch 2, 2048 tokens, 8 x A100, compiled", "Llama-3.1-70B",
               PlanSettings("lora", processes=8, sharding="fsdp2", **long, padded=False),
               27.6 * GIB, all_shared, "", chunked_loss),
        Anchor("torchtune, QLoRA r=16, batch 1, 8 x A100", "Llama-3.1-405B",
               PlanSettings("qlora", processes=8, sharding="fsdp2", precision="bf16-mixed"),
               44.8 * GB, all_shared, "512 tokens, not stated by the source", chunked_loss),
    ]  # fmt: skip


def counted_plan(method: str, count: int) -> Prediction:
    """Returns the plan of what ``benchmarks/sharding.py`` trains in ``count`` processes."""
    dimensions = {
        **SIZES[False], "vocab_size": 4096, "num_attention_heads": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    settings = PlanSettings(
        method,  # type: ignore[arg-type]
        seq_len=16,
        precision="bf16-mixed",
        optimizer="adamw",
        device="cpu",
        processes=count,
        sharding="fsdp2",
    )
    return plan_of(dimensions, settings)


def counted_table() -> str:
    """Returns plans and counted bytes of 1, 2 and 4 processes."""
    record = read("sharding")
    assert record is not None
    rows = []
    for method in METHODS:
        for count in COUNTS:
            found, held = counted_plan(method, count), record["held"][f"{method} {count}"][0]
            pairs = {
                "frozen": (base_bytes(found), held["frozen"] + held["tables"]),
                "adapters": (found.breakdown["adapters"], held["adapters"]),
                "optimizer": (found.trace.optimizer, held["optimizer"]),
            }
            for what, (planned, counted) in pairs.items():
                figures = [f"{planned:,}", f"{counted:,}", f"{planned / counted - 1:+.2%}"]
                rows.append([method, count, what, *figures])
    return "\n".join(markdown("method | processes | bytes of | planned | counted | off", rows))


if __name__ == "__main__":
    write_between("counted", counted_table(), PAGE)
    published = anchor_table(anchors(), lambda one: plan(one.model, one.settings, one.step))
    write_between("published of several", published, PAGE)
    write_between("many gpus", table(), PAGE)
