"""Display of plans: plain lines, or tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_peft.plan.device_memory import readable
from lightning_peft.plan.method_comparison import MethodComparison
from lightning_peft.plan.prediction import PARTS
from lightning_peft.plan.suggestions import NAMES

_SHORT = {"fits": "yes", "may not fit": "maybe", "does not fit": "no"}


def show(comparison: MethodComparison) -> None:
    """Prints the answers."""
    console = Console(highlight=False)
    for part in _parts(comparison):
        if isinstance(part, str):
            console.print(escape(part), soft_wrap=not console.is_terminal)
        elif console.is_terminal:
            console.print(_table(*part))
        else:
            _print_plain(*part)


def _parts(comparison: MethodComparison) -> Iterator[str | tuple[str, list[list[str]]]]:
    run, plan, trace = comparison.plan.settings, comparison.plan, comparison.plan.trace
    share = 100 * trace.trainable / trace.total
    yield (
        f"{comparison.model}: {run.method}, batch_size={run.batch_size}, seq_len={run.seq_len}, "
        f"gradient checkpointing {'on' if run.checkpointing else 'off'}, "
        f"optimizer {run.optimizer_name}"
    )
    yield f"trainable {trace.trainable:,} of {trace.total:,} parameters ({share:.2f} %)"
    if comparison.logits == "chunked":
        yield "logits are computed in chunks, as in the task CausalLM; --logits all: all at once"
    if comparison.longest is not None and run.seq_len > comparison.longest:
        yield f"seq_len={run.seq_len} exceeds the model's maximum of {comparison.longest}"
    rows = [["at the fullest moment", "bytes", ""]]
    for part in PARTS:
        size = plan.breakdown[part]
        if size:
            rows.append([NAMES[part], f"{size:,}", readable(size)])
    rows.append(["peak", f"{plan.peak_bytes:,}", readable(plan.peak_bytes)])
    yield "memory", rows
    yield f"between {readable(plan.low_bytes)} and {readable(plan.high_bytes)}"
    yield from _activations(comparison)
    yield from _processes(comparison)
    yield from _room(comparison)
    rows = [["method", "trained", "peak", "up to", "fits"]]
    for method, other in comparison.methods.items():
        fits = "" if comparison.device is None else _SHORT[other.verdict(comparison.device.bytes)]
        peaks = [readable(other.peak_bytes), readable(other.high_bytes)]
        rows.append([method, f"{other.trace.trainable:,}", *peaks, fits])
    yield "side by side", rows
    yield comparison.recommendation.text


def _activations(comparison: MethodComparison) -> Iterator[str]:
    words = {True: "with", False: "without"}
    saved = [
        f"{readable(size)} {words[on]} checkpointing"
        for on, size in sorted(comparison.kept.items())
    ]
    yield f"saved activations: {', '.join(saved)}"
    if comparison.plan.trace.paged:
        paged = readable(comparison.plan.trace.paged)
        yield f"{paged} of the optimizer state can be paged out to the CPU"


def _processes(comparison: MethodComparison) -> Iterator[str | tuple[str, list[list[str]]]]:
    run, work, cluster = comparison.plan.settings, comparison.plan.trace.work, comparison.cluster
    if cluster is None or run.processes == 1:
        return
    how = f"sharding={run.sharding!r}" if run.is_sharded else "a whole base on each"
    yield (
        f"{run.processes} processes ({cluster.nodes} x {cluster.gpus} GPUs), {how}: memory and "
        f"batch are those of one"
    )
    yield (
        f"in each step a GPU gathers {readable(work.gathered)} of weights, averages "
        f"{readable(work.averaged)} of gradients, and sends {readable(work.sent(run.processes))}"
    )
    bounds = comparison.bounds
    if bounds is None:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in cluster.missing)
        yield f"what bounds a step is not known: give a --gpu by name, or {options}"
        return
    amounts = [
        f"{work.flops / 1e12:,.1f} TFLOP",
        readable(work.moved),
        readable(work.sent(run.processes)),
    ]
    rows = [["at full speed", "amount", "seconds"]]
    for (name, seconds), amount in zip(asdict(bounds).items(), amounts, strict=True):
        rows.append([name, amount, f"{seconds:.3f}"])
    yield "a step", rows
    sends = [f"{cluster.link_bandwidth:g} GB/s within a node"] * (cluster.gpus > 1)
    sends += [f"{cluster.network_bandwidth:g} GB/s from node to node"] * (cluster.nodes > 1)
    yield (
        f"a step takes {bounds.seconds:.3g} s or more, bound by {bounds.bound}: GPUs of "
        f"{cluster.tflops:g} TFLOP/s with {cluster.memory_bandwidth:g} GB/s of memory, and "
        + ", ".join(sends)
    )


def _room(comparison: MethodComparison) -> Iterator[str]:
    if comparison.device is None:
        return
    run, device = comparison.plan.settings, comparison.device
    yield f"{comparison.plan.verdict(device.bytes)} into {readable(device.bytes)} ({device.name})"
    none = "none is guaranteed to fit"
    more = comparison.limits_checkpointing and not run.checkpointing
    how = ", with gradient checkpointing" if more else ""
    if comparison.batch_size is not None:
        yield f"largest batch at seq_len={run.seq_len}{how}: {comparison.batch_size or none}"
    if comparison.seq_len is not None:
        yield f"longest sequence at batch_size={run.batch_size}{how}: {comparison.seq_len or none}"


def _table(title: str, rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _print_plain(title: str, rows: Sequence[Sequence[Any]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  " + "  ".join([first, *rest]).rstrip())
