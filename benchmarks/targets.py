"""What is aimed at, and what the records say of it: the summary, and the bounds of the check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from record import markdown, read, spread


@dataclass(frozen=True)
class Bound:
    """A ratio of a record, and the most that it may be."""

    record: str
    # Its key in `ratios` there, or the keys from the top, by `//`.
    ratio: str
    most: float
    # What it is called in the summary.
    label: str = ""
    # The keys of what it is divided by, if the record has no such ratio.
    over: str = ""

    def found(self, kind: str = "") -> dict[str, float] | None:
        """Returns median, smallest and largest value, or ``None`` where nothing was measured.

        ``kind`` is ``".check"`` for the records of a check.
        """
        content = read(self.record + kind)
        found = _at(content, self.ratio if "//" in self.ratio else f"ratios // {self.ratio}")
        other = _at(content, self.over) if self.over else 1
        if isinstance(found, (int, float)) and isinstance(other, (int, float)):
            return spread([found / other])
        return found if isinstance(found, dict) else None

    def cell(self) -> str:
        """Returns the value with its spread, and the bound."""
        found = self.found()
        start = f"{self.label} " if self.label else ""
        if found is None:
            return f"{start}not measured"
        low, middle, high = (_short(found[part]) for part in ("min", "median", "max"))
        # What is the same each time has no spread.
        shown = middle if low == high else f"{middle} ({low} to {high})"
        return f"{start}{shown}"


@dataclass(frozen=True)
class Target:
    """A row of the summary; it is met if all of its bounds are."""

    measure: str
    aim: str
    bounds: tuple[Bound, ...]
    script: str


def _at(content: Any, path: str) -> Any:
    for name in path.split(" // "):
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _short(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value:.2g}"


def _step(ratio: str, most: float, label: str) -> Bound:
    return Bound("training_step", ratio, most, label)


TARGETS: tuple[Target, ...] = (
    Target(
        "training step against a loop by hand with PEFT and bitsandbytes",
        "at most 0.88 of the time, 0.80 with dropout, 0.90 of the peak",
        tuple(
            _step(f"{name}, dropout {p}: engine / by hand, {what}", most, f"{name} {p} {what}")
            for name in ("QLoRA", "LoRA")
            for p, what, most in (
                ("0", "seconds", 0.88),
                ("0.05", "seconds", 0.80),
                ("0", "peak", 0.90),
                ("0.05", "peak", 0.90),
            )
        ),
        "training_step.py",
    ),
    Target(
        "training step against the base alone, forward and backward",
        "at most 1.10 of the time",
        tuple(
            _step(f"{name}, dropout 0: engine / floor, seconds", 1.10, name)
            for name in ("QLoRA", "LoRA")
        ),
        "training_step.py",
    ),
    Target(
        "the strategy under the Trainer against the engine in a loop",
        "at most 1.03 of the time",
        tuple(
            _step(f"{name}, dropout 0: strategy / engine, seconds", 1.03, name)
            for name in ("QLoRA", "LoRA")
        ),
        "training_step.py",
    ),
    Target(
        "seconds per useful token of instructions, QLoRA recipe",
        "at most 1/5 of TRL, 1/2.5 of TRL packed, 1/3 of the loop by hand; 0.35 of TRL's peak",
        (
            _step("instructions: recipe / trl, seconds per token", 1 / 5, "TRL"),
            _step("instructions: recipe / trl packed, seconds per token", 1 / 2.5, "TRL packed"),
            _step("instructions: recipe / by hand, seconds per token", 1 / 3, "by hand"),
            _step("instructions: recipe / trl, peak", 0.35, "TRL peak"),
        ),
        "training_step.py",
    ),
    Target(
        "peak with a vocabulary of 128k and long prompts against transformers' Trainer with PEFT",
        "at most 0.50",
        (_step("wide vocabulary: recipe / hugging face, peak", 0.50, ""),),
        "training_step.py",
    ),
    Target(
        "seconds a token of an answer against transformers' `generate` on the merged model",
        "at most 1.1 of the time with adapters apart, 1.0 merged",
        tuple(
            Bound("generation", f"{name} / transformers, merged", most, name)
            for name, most in (("tuned, 16 bits", 1.1), ("tuned, NF4", 1.1), ("merged", 1.0))
        ),
        "generation.py",
    ),
    Target(
        "a sharded checkpoint into NF4",
        "peak at most 1.25 of the final size and a largest tensor; time at most transformers' own",
        (
            Bound("base_loading", "uncached_peak_to_allowed", 1.0, "peak"),
            Bound("base_loading", "first_peak_to_allowed", 1.0, "peak, filling the cache"),
            Bound("base_loading", "uncached_to_transformers_alone_seconds", 1.0, "time"),
            Bound(
                "base_loading",
                "first_to_transformers_alone_seconds",
                1.0,
                "time, filling the cache",
            ),
        ),
        "base_loading.py",
    ),
    Target(
        "second start, from the cache of quantized bases",
        "at most 0.35 of the first",
        (Bound("base_loading", "second_to_first_seconds", 0.35),),
        "base_loading.py",
    ),
    Target(
        "adapter checkpoint against Lightning's full one, 100M parameters and more",
        "at most 0.1 of time and size",
        (
            *(
                Bound("checkpoints", f"{size}, {measure}", 0.1, f"{size} {label}")
                for size in ("137M", "379M")
                for measure, label in (
                    ("save_seconds", "save"),
                    ("load_seconds", "load"),
                    ("bytes", "size"),
                )
            ),
        ),
        "checkpoints.py",
    ),
    Target(
        "importing, and `lightning-peft --help`, against importing Lightning",
        "at most 1.10, and 0.5",
        (
            Bound("startup", "import_both_to_lightning", 1.10, "import"),
            Bound("startup", "help_to_lightning", 0.5, "help"),
        ),
        "startup.py",
    ),
    Target(
        "growth of memory with length, batch, layers and rank, checkpointed",
        "exponents of at most 1 (1.02 with rounding)",
        tuple(
            Bound("scaling", f"axes // {name} // exponent", 1.02, name)
            for name in ("length", "rows", "layers", "rank")
        ),
        "scaling.py",
    ),
    Target(
        "checkpointing under a budget of half of the activations",
        "within the budget; at most 1.15 of the time without checkpointing",
        tuple(
            bound
            for case in ("QLoRA", "LoRA")
            for bound in (
                Bound(
                    "activation_budget", f"cases // {case} // ratios // half", 1.15, f"{case} time"
                ),
                Bound(
                    "activation_budget",
                    f"cases // {case} // kept_bytes // half",
                    0.5,
                    f"{case} kept",
                    over=f"cases // {case} // kept_bytes // none",
                ),
            )
        ),
        "activation_budget.py",
    ),
    Target(
        "step of SmolLM2-135M, QLoRA, on two cores",
        "at most 0.40 of TRL's time in padded rows, 0.50 in packed rows; 2.0 of the products'",
        (
            Bound("real_step", "padded / trl padded, seconds", 0.4, "padded"),
            Bound("real_step", "packed / trl packed, seconds", 0.5, "packed"),
            Bound("real_step", "padded / products, seconds", 2.0, "products"),
        ),
        "real_step.py",
    ),
    Target(
        "peak memory of the same step",
        "at most 0.50 of TRL's, by default (no checkpointing where memory is free)",
        (
            Bound("real_step", "padded / trl padded, peak", 0.5, "padded"),
            Bound("real_step", "packed / trl packed, peak", 0.5, "packed"),
        ),
        "real_step.py",
    ),
    Target(
        "the same, both with or both without checkpointing",
        "at most 0.50 of TRL's peak memory",
        (
            Bound("real_step", "padded / trl padded, kept, peak", 0.5, "padded, without"),
            Bound("real_step", "padded, checkpointed / trl padded, peak", 0.5, "padded"),
            Bound("real_step", "packed, checkpointed / trl packed, peak", 0.5, "packed"),
        ),
        "real_step.py",
    ),
    Target(
        "held-out loss of SmolLM2-135M at equal tokens",
        "QLoRA at most 1.01 of LoRA, LoRA at most 1.01 of full",
        tuple(
            Bound("real_quality", f"ratios // {task}: {pair}", 1.01, f"{task}, {pair}")
            for task in ("documentation", "orders")
            for pair in ("qlora / lora", "lora / full")
        ),
        "real_quality.py",
    ),
    Target(
        "held-out loss of small bases at equal tokens; errors of 4-bit weights",
        "QLoRA at most 1.01 of LoRA, LoRA at most 1.01 of full; NF4 < FP4 < int4; two families",
        (
            Bound("quality", "shipped_base // ratios // qlora_to_lora", 1.01, "QLoRA / LoRA"),
            Bound("quality", "shipped_base // ratios // lora_to_full", 1.01, "LoRA / full"),
            Bound("quality", "shipped_base // ratios // nf4_to_fp4", 1.0, "NF4 / FP4"),
            Bound("quality", "shipped_base // ratios // fp4_to_int4", 1.0, "FP4 / int4"),
            Bound(
                "quality",
                "another_family // ratios // qlora_to_lora",
                1.01,
                "other family, QLoRA / LoRA",
            ),
            Bound(
                "quality",
                "another_family // ratios // lora_to_full",
                1.01,
                "other family, LoRA / full",
            ),
        ),
        "quality.py",
    ),
    Target(
        "preparing a million chats, two processes, against TRL's `datasets.map` on 100,000",
        "at most TRL's time a row; at most 150 bytes of memory a row; found again within 2 s",
        (
            Bound("million_rows", "ours / trl, seconds", 1.0, "time"),
            Bound("million_rows", "bytes of peak memory for each further row", 150, "bytes"),
            Bound("million_rows", "seconds to find all rows in the cache", 2.0, "found"),
        ),
        "million_rows.py",
    ),
)

# Looser than what is aimed at: few steps on whatever machine, and only a regression shall fail.
CHECKS: tuple[Bound, ...] = (
    _step("QLoRA, dropout 0: engine / by hand, seconds", 0.95, "step, engine / by hand"),
    _step("QLoRA, dropout 0: engine / by hand, peak", 0.70, "peak, engine / by hand"),
    _step("QLoRA, dropout 0: engine / floor, seconds", 1.20, "step, engine / floor"),
    _step("QLoRA, dropout 0: strategy / engine, seconds", 1.15, "step, strategy / engine"),
    _step("instructions: recipe / by hand, seconds per token", 0.80, "token, recipe / by hand"),
    _step("instructions: recipe / by hand, peak", 0.60, "peak, recipe / by hand"),
    Bound("generation", "tuned, NF4 / transformers, merged", 1.3, "token of an answer, NF4"),
    Bound("generation", "merged / transformers, merged", 1.15, "token of an answer, merged"),
    Bound("base_loading", "uncached_to_transformers_alone_seconds", 0.9, "loading / transformers"),
    Bound("base_loading", "second_to_first_seconds", 0.6, "second start / first"),
    Bound("startup", "import_both_to_lightning", 1.25, "import, with Lightning / Lightning"),
    Bound("startup", "help_to_lightning", 0.50, "help / import of Lightning"),
    Bound("checkpoints", "137M, bytes", 0.20, "size, adapter / full"),
    Bound("checkpoints", "137M, save_seconds", 0.40, "saving, adapter / full"),
    Bound("checkpoints", "137M, load_seconds", 0.40, "loading, adapter / full"),
)


def summary() -> list[str]:
    """Returns one row for each target."""
    rows = []
    for number, target in enumerate(TARGETS, 1):
        met = verdict(target)
        known = [bound for bound in target.bounds if bound.found() is not None]
        measured = "; ".join(bound.cell() for bound in target.bounds) if known else "not measured"
        rows.append([number, target.measure, target.aim, measured, met, f"`{target.script}`"])
    columns = "# | measure | target | measured: median (smallest to largest) | met | script"
    return markdown(columns, rows)


def verdict(target: Target) -> str:
    """Returns whether a target is met, by the medians; what misses it is named."""
    found = [(bound, bound.found()) for bound in target.bounds]
    if all(value is None for _, value in found):
        return "-"
    missed = [b.label for b, value in found if value is not None and value["median"] > b.most]
    if missed:
        return "no" + (f": {', '.join(missed)}" if all(missed) and len(found) > 1 else "")
    return "yes" if all(value is not None for _, value in found) else "as far as measured"


def broken(kind: str = ".check") -> list[str]:
    """Returns the bounds of the check that do not hold, or were not measured; prints all."""
    problems = []
    for bound in CHECKS:
        found = bound.found(kind)
        value = None if found is None else found["median"]
        shown = "not measured" if value is None else f"{value:.3f}"
        holds = value is not None and value <= bound.most
        print(f"{'ok    ' if holds else 'FAILED'} {bound.label}: {shown}, at most {bound.most:g}")
        if not holds:
            problems.append(bound.label)
    return problems
