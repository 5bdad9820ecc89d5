"""What a budget for activations costs: no checkpointing, half of the activations, inputs only.

``python benchmarks/activation_budget.py measure [--device cuda] [--rounds N] [--quick]`` trains the
same random Llama in bfloat16 in the three ways, with QLoRA and with LoRA, in one process; the ways
take turns, some steps each. Before that, one forward pass of each is watched from the first block
to the last: what torch's allocator holds after it and did not before is what the blocks keep for
the backward pass, which is what a budget is for. ``losses_equal`` says
whether all ways had the same losses to the last bit. The record is
``benchmarks/records/activation_budget.json`` (``..._cuda.json``), and
``python benchmarks/activation_budget.py table`` writes the table into ``docs/performance.md``.
"""

from __future__ import annotations

import argparse
from typing import Any

from allocations import Allocations
from record import (
    conditions,
    device_name,
    interleaved,
    markdown,
    ratio,
    read,
    record_name,
    summary,
    timed,
    write,
    write_between,
)

# What `gradient_checkpointing` is in each way.
WAYS: dict[str, Any] = {"none": False, "half": 0.5, "inputs": True}
WORDS = {"none": "no checkpointing", "half": "a budget of half", "inputs": "inputs only"}
MOST = 1.15
RATE = 2e-4
SIZE = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12,
        "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip
QUICK = {**SIZE, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4}


class Trained:
    """A model that is trained in one way, with ``wanted`` for ``gradient_checkpointing``."""

    def __init__(self, wanted: Any, quantized: bool, given: argparse.Namespace) -> None:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        from lightning_peft import engine

        size = QUICK if given.quick else SIZE
        self.rows, self.length, self.device = 2, given.length, given.device
        # What the engine says about the budget.
        self.messages: list[str] = []
        self.losses: list[float] = []
        torch.manual_seed(0)
        config = LlamaConfig(**size, max_position_embeddings=4096, use_cache=False)
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
        quantization = engine.quantization_config() if quantized else None
        engine.inject(self.model, r=16, quantization_config=quantization)
        engine.checkpoint_activations(self.model, wanted, self.messages.append)
        self.model.to(given.device)
        trained = [param for param in self.model.parameters() if param.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE)
        self.draw = torch.Generator().manual_seed(1)

    def tokens(self) -> Any:
        """Returns a batch of random tokens."""
        import torch

        shape = (self.rows, self.length)
        return torch.randint(SIZE["vocab_size"], shape, generator=self.draw).to(self.device)

    def loss(self) -> Any:
        """Returns the loss of a batch."""
        ids = self.tokens()
        return self.model(input_ids=ids, labels=ids).loss

    def finish(self, loss: Any) -> None:
        """Takes the rest of a step."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    def kept(self) -> int:
        """Returns the bytes that the blocks keep for the backward pass.

        Each keeps its input; what the last one puts out is as large as that of the first, and is
        counted in its place.
        """
        for _ in range(2):
            self.step()
        watch = Allocations(self.device)
        # Blocks that are computed again call their own hooks again; these are called once.
        hooks = [
            self.model.model.rotary_emb.register_forward_hook(lambda *_: watch.start()),
            self.model.model.norm.register_forward_pre_hook(lambda *_: watch.stop()),
        ]
        loss = self.loss()
        for hook in hooks:
            hook.remove()
        self.finish(loss)
        return watch.left

    def step(self) -> None:
        """Takes a step."""
        self.finish(self.loss())


def measured(quantized: bool, given: argparse.Namespace) -> dict[str, Any]:
    """Returns the record of one case."""
    models = {way: Trained(wanted, quantized, given) for way, wanted in WAYS.items()}
    kept = {way: model.kept() for way, model in models.items()}
    ways = {way: timed(model.step, given.device, given.block) for way, model in models.items()}
    runs = interleaved(ways, given.rounds)
    return {
        "kept_bytes": kept,
        "messages": models["half"].messages,
        "losses_equal": all(model.losses == models["none"].losses for model in models.values()),
        "seconds": summary(runs),
        "ratios": {way: ratio(runs, way, "none", "seconds") for way in ("half", "inputs")},
        "runs": runs,
    }


def measure(given: argparse.Namespace) -> None:
    """Measures and writes the record."""
    if given.quick:
        given.rounds, given.block, given.length = 2, 2, 64
    content = {
        "conditions": conditions(),
        "device": device_name(given.device),
        "rows": 2,
        "length": given.length,
        "rounds": given.rounds,
        "steps_in_a_round": given.block,
        "cases": {name: measured(name == "QLoRA", given) for name in ("QLoRA", "LoRA")},
    }
    print("\n".join(table(content)))
    write(record_name("activation_budget", given.device), content, quick=given.quick)


def table(content: dict[str, Any]) -> list[str]:
    """Returns the table of a record."""
    where = content["conditions"]
    lines = [
        f"{content['device']}, {where['threads'] or 'default'} threads, torch "
        f"{where['versions']['torch']}, {where['date']}; {content['rounds']} rounds of "
        f"{content['steps_in_a_round']} steps, {content['rows']} rows of {content['length']} "
        "tokens. Times: median (smallest to largest round); ratios: of rounds side by side.",
        "",
    ]
    rows = []
    for case, found in content["cases"].items():
        for way, words in WORDS.items():
            time_of = {k: 1e3 * v for k, v in found["seconds"][way]["seconds"].items()}
            shown = f"{time_of['median']:.0f} ({time_of['min']:.0f} to {time_of['max']:.0f})"
            factor = found["ratios"].get(way, {"median": 1.0})["median"]
            kept = f"{found['kept_bytes'][way] / 1e6:.1f}"
            aim = [f"{MOST:.2f}", "yes" if factor <= MOST else "no"] if way == "half" else ["", ""]
            rows.append([case, words, shown, f"{factor:.3f}", kept, *aim])
    columns = "case | kept | ms per step | to no checkpointing | kept MB | target | met"
    lines += markdown(columns, rows)
    for case, found in content["cases"].items():
        equal = "the same" if found["losses_equal"] else "**not the same**"
        message = found["messages"][-1].partition(": ")[2]
        lines += ["", f"{case}: {message} The losses of all steps are {equal} in the three ways."]
    return lines


def main() -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["measure", "table"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--block", type=int, default=4, help="steps between two turns")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.command == "measure":
        measure(given)
        return
    content = read(record_name("activation_budget", given.device))
    assert content is not None, "nothing was measured yet"
    write_between(f"{given.device} activation budget", "\n".join(table(content)))


if __name__ == "__main__":
    main()
