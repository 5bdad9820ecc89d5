"""The loss by chunks against ``torch.nn.functional.linear_cross_entropy``, for a dense head.

``python benchmarks/linear_cross_entropy.py [--device cuda] [--rounds N] [--quick]`` takes the mean
cross-entropy of random hidden states behind a head without adapters, forward and backward, in one
process; the ways take turns:

- ``ours``: ``lightning_peft.tasks.token_loss.ChunkedLoss``, as ``CausalLM`` uses it.
- ``torch_chunked``: ``linear_cross_entropy`` with its default ``LinearCrossEntropyOptions``.
- ``torch_same_chunks``: the same with as many tokens at a time as ours.
- ``torch_whole``: ``linear_cross_entropy`` without options, which makes all logits.

The cases are a head that is frozen, as with LoRA on the layers below, and one that is trained in
full, each in bfloat16 and float32. For each: the seconds, the peak of what torch had allocated
above what was there before, what was left of it between forward and backward, and the relative
error of loss and gradients against float64. The record is
``benchmarks/records/linear_cross_entropy.json`` (``..._cuda.json``).
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

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

WAYS = ("ours", "torch_chunked", "torch_same_chunks", "torch_whole")
SIZE = {"tokens": 2048, "width": 576, "vocabulary": 49152}
QUICK = {"tokens": 192, "width": 32, "vocabulary": 1024}
# What an error is of.
OFF = ("loss", "hidden", "weight")
CASES = {
    f"{head} head, {dtype}": (head == "trained", dtype)
    for head in ("frozen", "trained")
    for dtype in ("bfloat16", "float32")
}


class Loss:
    """A head, which is trained or frozen, and its inputs."""

    def __init__(self, trained: bool, dtype: str, given: argparse.Namespace) -> None:
        import torch

        size = QUICK if given.quick else SIZE
        draw = torch.Generator().manual_seed(0)
        self.device, kind = given.device, getattr(torch, dtype)
        shape = (size["tokens"], size["width"])
        hidden = torch.randn(shape, generator=draw).to(self.device, kind)
        self.hidden = hidden.requires_grad_()
        self.head = torch.nn.Linear(size["width"], size["vocabulary"], bias=False)
        torch.nn.init.normal_(self.head.weight, std=0.05, generator=draw)
        self.head.to(self.device, kind).requires_grad_(trained)
        targets = torch.randint(size["vocabulary"], (size["tokens"],), generator=draw)
        self.targets = targets.to(self.device)
        self.sources = [self.hidden, *([self.head.weight] if trained else [])]

    def forward(self, way: str) -> Any:
        """Returns the loss in one way."""
        from torch.nn import LinearCrossEntropyOptions
        from torch.nn.functional import linear_cross_entropy

        from lightning_peft.tasks.token_loss import CHUNK, ChunkedLoss

        rows, weight = max(1, CHUNK // self.head.out_features), self.head.weight
        if way == "ours":
            return ChunkedLoss.apply(
                self.hidden, self.targets, rows, self.head, lambda logits: logits, *self.sources[1:]
            )
        options = {
            "torch_chunked": LinearCrossEntropyOptions(),
            "torch_same_chunks": LinearCrossEntropyOptions(
                batch_chunk_size=rows, chunking_method=None
            ),
        }
        return linear_cross_entropy(self.hidden, weight, self.targets, options=options.get(way))

    def results(self, way: str) -> list[Any]:
        """Returns loss and gradients."""
        import torch

        loss = self.forward(way)
        return [loss.detach(), *torch.autograd.grad(loss, self.sources)]

    def exact(self) -> list[Any]:
        """Returns loss and gradients of the same values in float64."""
        import torch
        from torch.nn.functional import cross_entropy

        hidden, weight = (x.detach().double() for x in (self.hidden, self.head.weight))
        hidden.requires_grad_()
        weight.requires_grad_(len(self.sources) > 1)
        loss = cross_entropy(hidden @ weight.t(), self.targets)
        return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight][: len(self.sources)])]

    def memory(self, way: str) -> dict[str, int]:
        """Returns the bytes at the peak, and those between forward and backward."""
        _, between = allocations(self.device, lambda: self.forward(way))
        peak, _ = allocations(self.device, lambda: self.results(way))
        return {"peak": peak, "between": between}


def errors(found: list[Any], exact: list[Any]) -> dict[str, float]:
    """Returns the relative errors of the loss and of each gradient."""
    return {
        name: float((one.double() - other).norm() / other.norm())
        for name, one, other in zip(OFF, found, exact, strict=False)
    }


def measured(trained: bool, dtype: str, given: argparse.Namespace) -> dict[str, Any]:
    """Returns the record of one case."""
    loss = Loss(trained, dtype, given)
    exact = loss.exact()
    # What a first call allocates for good is not of the loss.
    accuracy = {way: errors(loss.results(way), exact) for way in WAYS}
    del exact
    memory = {way: loss.memory(way) for way in WAYS}
    steps = {way: timed(partial(loss.results, way), given.device) for way in WAYS}
    runs = interleaved(steps, given.rounds)
    return {
        "errors": accuracy,
        "bytes": memory,
        "seconds": summary(runs),
        "ratios": {f"{way} to ours": ratio(runs, way, "ours", "seconds") for way in WAYS[1:]},
        "runs": runs,
    }


def lines(content: dict[str, Any]) -> list[str]:
    """Returns the table of a record."""
    rows = []
    for case, found in content["cases"].items():
        for way in WAYS:
            spread = found["ratios"].get(f"{way} to ours", {"median": 1.0, "min": 1, "max": 1})
            time_of = f"{spread['median']:.3f} ({spread['min']:.3f} to {spread['max']:.3f})"
            sizes = [f"{found['bytes'][way][key] / 1e6:.1f}" for key in ("peak", "between")]
            error = found["errors"][way]
            off = [f"{error[key]:.1e}" if key in error else "" for key in OFF]
            rows.append([case, way, time_of, *sizes, *off])
    columns = "case | way | time to ours | peak MB | between MB"
    return markdown(" | ".join([columns, *OFF]), rows)


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.quick:
        given.rounds = 1
    content: dict[str, Any] = {
        "conditions": conditions(),
        "device": device_name(given.device),
        "size": QUICK if given.quick else SIZE,
        "rounds": given.rounds,
        "cases": {case: measured(*how, given) for case, how in CASES.items()},
    }
    content["ratios"] = {
        f"{case}: {name}": found
        for case, record in content["cases"].items()
        for name, found in record["ratios"].items()
    }
    print("\n".join(lines(content)))
    write(record_name("linear_cross_entropy", given.device), content, quick=given.quick)


if __name__ == "__main__":
    main()
