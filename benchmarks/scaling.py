"""How peak memory grows with sequence length, rows, layers and rank, with checkpointing on.

``python benchmarks/scaling.py measure [--device cuda] [--quick]`` trains the causal language model
task with ``QLoRAStrategy`` on a random Llama in bfloat16. Every point is a process of its own: it
takes two steps, and the third is measured, on the CPU by the bytes of torch's allocator, on a GPU
by ``torch.cuda.max_memory_allocated``. Along each axis one number doubles from point to point, and
the others stay.

The exponent of an axis is the slope of the *increases* between neighbours, both in logarithms: of
``c + a x^p`` the increase from ``x`` to ``2 x`` is ``a (2^p - 1) x^p``, so the constant ``c`` falls
out and the slope is ``p``. It is taken over the last three increases: with small numbers the peak
may be at another moment of the step (logits, before there are gradients of adapters), and the curve
has a bend where it moves. The record is ``benchmarks/records/scaling.json`` (``..._cuda.json``);
``python benchmarks/scaling.py table`` writes the table into ``docs/performance.md`` and the plot
into ``docs/pictures/scaling.svg``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

from record import (
    conditions,
    markdown,
    read,
    record_name,
    run_script,
    write,
    write_between,
)
from training_case import Finished, Pace, train_under

DOCS = Path(__file__).parent.parent / "docs"
BASE = {"length": 256, "rows": 2, "layers": 8, "rank": 16}
AXES = {
    "length": [128, 256, 512, 1024, 2048, 4096],
    "rows": [1, 2, 4, 8, 16, 32],
    "layers": [2, 4, 8, 16, 32],
    "rank": [8, 16, 32, 64, 128, 256, 512],
}
WORDS = {"length": "tokens in a row", "rows": "rows", "layers": "layers", "rank": "rank"}
QUICK = {
    "length": [128, 256, 512], "rows": [2, 4, 8], "layers": [2, 4, 8], "rank": [16, 32, 64],
}  # fmt: skip
# Rounding of sizes by the allocator, and what differs between two runs, are within this.
MOST = 1.02


class Step(Pace):
    """Two steps, and the memory of the third."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.steps, self.peak = 0, 0

    def before(self) -> None:
        """Called before each step."""
        if self.steps == 2:
            self._begin_memory()

    def after(self, tokens: int = 0, loss: Any = None) -> None:
        """Called after each step."""
        self.steps += 1
        if self.steps == 3:
            self.peak = self._end_memory()
            raise Finished


def point(sizes: dict[str, int], device: str) -> int:
    """Returns the peak of a step in bytes; to be called once in a process."""
    import torch
    from torch.utils.data import DataLoader

    from lightning_peft import QLoRAStrategy
    from lightning_peft.plugin.namespace import bind_to_lightning
    from lightning_peft.tasks.causal_lm import CausalLM

    step = Step(device)
    config = {
        "model_type": "llama", "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704,
        "num_hidden_layers": sizes["layers"], "num_attention_heads": 8, "num_key_value_heads": 4,
        "max_position_embeddings": 8192, "dtype": "bfloat16",
    }  # fmt: skip
    torch.manual_seed(0)
    task = bind_to_lightning(CausalLM, "pytorch_lightning")("random", config=config)
    ids = torch.randint(3, 2048, (3, sizes["rows"], sizes["length"]))
    batches = [{"input_ids": b, "labels": b, "attention_mask": torch.ones_like(b)} for b in ids]
    strategy = QLoRAStrategy(
        r=sizes["rank"], gradient_checkpointing=True, optimizer=None, announce=False
    )
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    with contextlib.suppress(Finished):
        train_under(step, strategy, task, loader, lambda *_: 0, max_steps=3)
    return step.peak


def measure(given: argparse.Namespace) -> None:
    """Measures all points and writes the record."""
    where = conditions()
    axes = {}
    for axis, values in (QUICK if given.quick else AXES).items():
        peaks = []
        for value in values:
            sizes = json.dumps({**BASE, axis: value})
            words = ("point", "--device", given.device, "--sizes", sizes)
            peaks.append(int(run_script(__file__, *words)["peak"]))
            print(f"{axis} {value}: {peaks[-1] / 1e6:.1f} MB", flush=True)
        axes[axis] = {"values": values, "peak_bytes": peaks, "exponent": exponent(values, peaks)}
    content = {"conditions": where, "base": BASE, "device": given.device, "axes": axes}
    print("\n".join(table(content)))
    write(record_name("scaling", given.device), content, quick=given.quick)


def exponent(values: list[int], peaks: list[int]) -> float:
    """Returns the slope of the last increases over the values, in logarithms (least squares).

    Raises:
        ValueError: If the peak does not increase everywhere, or the values do not double.
    """
    increases = [after - before for before, after in zip(peaks, peaks[1:], strict=False)]
    if min(increases) <= 0:
        raise ValueError(f"the peak does not increase: {peaks}")
    if any(after != 2 * before for before, after in zip(values, values[1:], strict=False)):
        raise ValueError(f"the values do not double: {values}")
    x = [math.log(value) for value in values[:-1]][-3:]
    y = [math.log(increase) for increase in increases][-3:]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


def table(content: dict[str, Any]) -> list[str]:
    """Returns the table of a record."""
    where, base = content["conditions"], content["base"]
    held = ", ".join(f"{base[axis]} {words}" for axis, words in WORDS.items())
    lines = [
        f"{content['device']}, torch {where['versions']['torch']}, {where['date']}; where they do "
        f"not change: {held}.",
        "",
    ]
    rows = []
    for axis, found in content["axes"].items():
        pairs = zip(found["values"], found["peak_bytes"], strict=True)
        peaks = ", ".join(f"{value}: {peak / 1e6:.1f}" for value, peak in pairs)
        met = "yes" if found["exponent"] <= MOST else "no"
        rows.append((WORDS[axis], peaks, f"{found['exponent']:.2f}", met))
    return lines + markdown("what grows | peak MB | exponent | linear or better", rows)


def plot(content: dict[str, Any]) -> str:
    """Returns the points of a record as an SVG: one panel for each axis, linear scales."""
    width, height, left, top = 300, 220, 64, 34
    parts = []
    for number, (axis, found) in enumerate(content["axes"].items()):
        x0, y0 = (number % 2) * (width + 96) + left, (number // 2) * (height + 84) + top
        most_x, most_y = max(found["values"]), max(found["peak_bytes"]) * 1.05
        spots = [
            (x0 + width * value / most_x, y0 + height * (1 - peak / most_y))
            for value, peak in zip(found["values"], found["peak_bytes"], strict=True)
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        title = f"{WORDS[axis]}: exponent {found['exponent']:.2f}"
        parts += [
            f'<text x="{x0}" y="{y0 - 10}" font-weight="bold">{title}</text>',
            f'<path d="M{x0} {y0}V{y0 + height}H{x0 + width}" fill="none" stroke="#777"/>',
            f'<polyline points="{line}" fill="none" stroke="#792ee5" stroke-width="2"/>',
            *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#792ee5"/>' for x, y in spots),
            f'<text x="{x0 + width}" y="{y0 + height + 18}" text-anchor="end">{most_x}</text>',
            f'<text x="{x0}" y="{y0 + height + 18}" text-anchor="middle">0</text>',
            f'<text x="{x0 - 6}" y="{y0 + 10}" text-anchor="end">{most_y / 1e6:.0f} MB</text>',
            f'<text x="{x0 - 6}" y="{y0 + height}" text-anchor="end">0</text>',
        ]
    size = f'width="{2 * (width + 96)}" height="{2 * (height + 84)}"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">\n'
        "<title>Peak memory of a training step against sequence length, rows, layers and rank"
        f'</title>\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def write_page(device: str) -> None:
    """Puts the table of a record into the page, and its plot next to it."""
    name = record_name("scaling", device)
    content, picture = read(name), DOCS / "pictures" / f"{name}.svg"
    assert content is not None, "nothing was measured yet"
    picture.write_text(plot(content), encoding="utf-8")
    shown = f"![Peak memory against what grows](pictures/{picture.name})"
    write_between(f"{device} scaling", "\n".join([*table(content), "", shown]))


def main() -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["measure", "table", "point"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer points")
    parser.add_argument("--sizes", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.command == "point":
        with contextlib.redirect_stdout(sys.stderr):
            peak = point(given.sizes, given.device)
        print(json.dumps({"peak": peak}))
    elif given.command == "table":
        write_page(given.device)
    else:
        measure(given)


if __name__ == "__main__":
    main()
