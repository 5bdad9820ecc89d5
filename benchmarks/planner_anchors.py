"""Predictions of the planner for runs whose memory others have published.

``python benchmarks/planner_anchors.py`` predicts each of them (a minute in all; nothing is loaded)
and writes the table into ``docs/planner.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from planner_grid import PAGE
from record import markdown, write_between

from lightning_peft.plan.prediction import Prediction, predict
from lightning_peft.plan.settings import PlanSettings
from lightning_peft.plan.sources import from_config
from lightning_peft.plan.trace import Step

GB, GIB = 1e9, 2**30

LLAMAS: dict[str, dict[str, int]] = {
    "Llama-3-8B": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "Llama-3-70B": {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    },
    "Llama-65B": {
        "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 22016,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 64,
    },
    "Llama-7B": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Anchor:
    """A published figure of a run, in bytes."""

    what: str
    model: str
    settings: PlanSettings
    published: float
    # What of the prediction it is compared with; what that is, and why the rest is left out.
    share: Callable[[Prediction], float]
    note: str
    # How the loss is computed there, where the model does not do it.
    step: Step | None = None


def peak(plan: Prediction) -> float:
    """The whole peak."""
    return plan.peak_bytes


def without_paged(plan: Prediction) -> float:
    """The peak after the optimizer's states were paged out."""
    return plan.peak_bytes - plan.trace.paged


def without_logits(plan: Prediction) -> float:
    """What torch's allocator holds, without logits."""
    return plan.allocated - plan.breakdown["logits"]


def weights(plan: Prediction) -> float:
    """The frozen weights."""
    return plan.breakdown["weights_quantized"] + plan.breakdown["weights_dense"]


def anchors() -> list[Anchor]:
    """Returns the published figures."""
    accumulated: dict[str, Any] = {"seq_len": 512, "accumulate": 4}
    packed: dict[str, Any] = {"batch_size": 2, "seq_len": 2048, "padded": False, "lora": {"r": 8}}
    on: dict[str, Any] = {"gradient_checkpointing": True}
    lora, qlora = PlanSettings("lora"), PlanSettings("qlora")
    chunked = "without logits: they compute the loss in chunks and never hold all of them"
    return [
        Anchor("LoRA r=16, batch 1 x 4, 512 tokens, RTX 4090", "Llama-3-8B",
               PlanSettings("lora", **accumulated), 22.8 * GB, peak,
               "without checkpointing, not stated by the source"),
        Anchor("QLoRA r=64, batch 1 x 4, 512 tokens, RTX 4090", "Llama-3-8B",
               PlanSettings("qlora", **accumulated, lora={"r": 64}), 10.5 * GB, peak,
               "with checkpointing, not stated by the source"),
        Anchor("smallest LoRA", "Llama-3-8B", lora, 16 * GB, weights,
               "frozen weights; a run takes more"),
        Anchor("smallest QLoRA", "Llama-3-8B", qlora, 6 * GB, weights,
               "frozen weights; a run takes more"),
        Anchor("16-bit weights", "Llama-3-70B", lora, 140 * GB, weights, ""),
        Anchor("base in NF4, 35 to 40 GB", "Llama-3-70B", qlora, 37.5 * GB, weights,
               "35.3 GB of it in 4-bit; embeddings and output stay in 16"),
        Anchor("QLoRA r=64 on one 48 GB card", "Llama-65B",
               PlanSettings("qlora", lora={"r": 64}), 41 * GB, without_paged,
               "after the 6.4 GB of optimizer states were paged out"),
        Anchor("base of QLoRA", "Llama-7B", qlora, 5.048 * GB, weights,
               "see below"),
        Anchor("torchtune, LoRA, batch 2, 2048 tokens", "Llama-3-8B",
               PlanSettings("lora", **packed, **on), 16.2 * GIB, without_logits, chunked),
        Anchor("torchtune, QLoRA, batch 2, 2048 tokens", "Llama-3-8B",
               PlanSettings("qlora", **packed, **on), 7.4 * GIB, without_logits, chunked),
    ]  # fmt: skip


def plan_of(
    dimensions: dict[str, int], settings: PlanSettings, step: Step | None = None
) -> Prediction:
    """Returns the plan of one process for a Llama of some dimensions, in bfloat16."""
    import transformers

    config = transformers.LlamaConfig(**dimensions, architectures=["LlamaForCausalLM"])
    source = from_config(config, dtype="bfloat16")
    return predict(source, settings, step)


def table(anchors: Iterable[Anchor], plan: Callable[[Anchor], Prediction]) -> str:
    """Returns published figures and what ``plan`` predicts of them."""
    made: dict[tuple[str, str, Step | None], Prediction] = {}
    rows = []
    for anchor in anchors:
        key = (anchor.model, repr(anchor.settings), anchor.step)
        if key not in made:
            made[key] = plan(anchor)
        value = anchor.share(made[key])
        cells = [
            anchor.what,
            anchor.model,
            f"{anchor.published / GB:.1f}",
            f"{value / GB:.1f}",
            f"{value / anchor.published - 1:+.1%}",
            anchor.note,
        ]
        rows.append(cells)
        print(*cells, made[key].breakdown, sep=" | ", flush=True)
    columns = "run | model | published GB | predicted GB | deviation | compared"
    return "\n".join(markdown(columns, rows))


if __name__ == "__main__":
    published = table(anchors(), lambda one: plan_of(LLAMAS[one.model], one.settings))
    write_between("anchors", published, PAGE)
