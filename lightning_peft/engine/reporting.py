"""Summary of adapted, quantized, frozen and trained parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_peft.engine.adapters import adapter_parameters
from lightning_peft.engine.backends.layers import QuantizedLayer
from lightning_peft.engine.backends.registry import (
    parameter_count,
    recorded_backend,
    storage_bytes,
)
from lightning_peft.engine.layers.mixin import stored_parameter
from lightning_peft.engine.layers.tokens import trained_rows
from lightning_peft.engine.methods.registry import method_of
from lightning_peft.engine.record import (
    AdaptedModuleRecord,
    AdapterInfo,
    adapted_parts,
    refuse_sharded,
    require_record,
)
from lightning_peft.engine.selection.parts import inside as lies_inside


@dataclass
class PartReport:
    """One adapted submodule.

    Attributes:
        name: Dotted name; the class name where the module itself is the part.
        adapted: Number of adapted layers by their last name.
        quantized: Number of quantized layers.
        quantization: For example ``"nf4, double quantization"``; ``""`` where there is none.
        heads: Heads left as the user had them, with ``"trainable"`` or ``"frozen"``.
        saved: Modules trained in full.
        in_place: Whether layers were extended in place (else wrapped by PEFT).
        method: For example ``"LoRA r=16 alpha=32"``.
        dense: Bytes of frozen matrices that are not quantized, by their last two names; empty
            where nothing is quantized.
        follows: Submodules that follow others, by name.
    """

    name: str
    adapted: dict[str, int]
    quantized: int
    quantization: str
    heads: dict[str, str]
    saved: list[str]
    in_place: bool
    method: str
    dense: dict[str, int] = field(default_factory=dict)
    follows: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str]]:
        """Labels and values to show of the part."""
        adapted = ", ".join(f"{name} x{count}" for name, count in self.adapted.items())
        quantized = f"{self.quantized} layers: {self.quantization}" if self.quantized else "-"
        left = [f"{name} ({state})" for name, state in self.heads.items()]
        return [
            ("part", self.name),
            ("method", self.method + ("" if self.in_place else ", in PEFT's wrappers")),
            ("adapted", f"{sum(self.adapted.values())} layers: {adapted}"),
            ("quantized", quantized),
            *([("kept dense", self._dense())] if self.dense else []),
            *[("follows", f"{copy} (of {origin})") for copy, origin in self.follows.items()],
            *([("trained in full", ", ".join(self.saved))] if self.saved else []),
            *([("left as it was", ", ".join(left))] if left else []),
        ]

    def _dense(self) -> str:
        largest = sorted(self.dense.items(), key=lambda item: -item[1])
        named = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in largest[:3])
        rest = sum(size for _, size in largest[3:])
        return named + (f", {rest / 1e6:,.1f} MB in others" if rest else "")


@dataclass
class Report:
    """The state of an adapted module; ``print(report)`` or show it with rich.

    Attributes:
        parts: One entry per adapted submodule.
        adapter_parameters: Number of weights in active and inactive adapters.
        trainable_parameters: Number of weights that training will change.
        total_parameters: Number of weights in all, packed 4-bit weights counted one by one.
        base_bytes: Bytes of all frozen parameters as they are stored now, quantization
            constants included.
        dense_base_bytes: Bytes of the same parameters before quantization.
        trainable_bytes: Bytes of the trainable parameters.
        outside: Trainable weights outside the adapted parts.
        left: Names of the submodules that were left as they are, mode included, with the reason:
            metrics, losses, and what the module froze while other layers of it train.
        excluded: Bytes of the frozen weights outside of the parts that checkpoints leave out, by
            the attribute of the module that they are in.
    """

    parts: list[PartReport] = field(default_factory=list)
    adapter_parameters: int = 0
    trainable_parameters: int = 0
    total_parameters: int = 0
    base_bytes: int = 0
    dense_base_bytes: int = 0
    trainable_bytes: int = 0
    outside: int = 0
    left: dict[str, str] = field(default_factory=dict)
    excluded: dict[str, int] = field(default_factory=dict)

    def __rich__(self) -> RenderableType:
        """Returns the table that rich shows."""
        table = Table(show_header=False, box=box.ROUNDED, show_lines=False)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for index, part in enumerate(self.parts):
            if index:
                table.add_section()
            for label, value in part.rows():
                table.add_row(label, value)
        if self.left:
            table.add_section()
            for reason in dict.fromkeys(self.left.values()):
                names = [name for name, why in self.left.items() if why == reason]
                table.add_row("left alone", f"{', '.join(names)} ({reason})")
        return Group(table, *self.summary())

    def summary(self) -> list[str]:
        """Returns the sentences below the table."""
        share = 100 * self.trainable_parameters / max(1, self.total_parameters)
        lines = [
            f"trainable {self.trainable_parameters:,} of {self.total_parameters:,} parameters "
            f"({share:.2f} %), {self.adapter_parameters:,} of them in adapters",
            f"frozen weights {self.base_bytes / 1e6:,.1f} MB"
            + (
                f" (before quantization {self.dense_base_bytes / 1e6:,.1f} MB)"
                if self.dense_base_bytes != self.base_bytes
                else ""
            ),
        ]
        if self.outside:
            lines.append(f"trainable outside the adapted parts: {self.outside:,} (left alone)")
        if self.excluded:
            size, names = sum(self.excluded.values()) / 1e6, ", ".join(self.excluded)
            lines.append(f"checkpoints leave out {size:,.1f} MB more, which load again: {names}")
        return lines

    def __str__(self) -> str:
        """Returns the table as plain text of at most 120 columns."""
        console = Console(width=120, record=True, file=None, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def show(what: Report | str) -> None:
    """Prints a report or a sentence to the terminal, in colour where it can be."""
    Console(soft_wrap=False).print(what)


def report(module: nn.Module) -> Report:
    """Returns the report of ``module``: adapted, quantized, frozen and trained.

    Raises:
        LifecycleError: If the module has no adapters.
    """
    record = require_record(module)
    refuse_sharded(module, "A report")
    # Means and accuracies hold no parameters that could have been adapted.
    left = {
        name: why
        for name, why in (record.left or {}).items()
        if any(True for _ in module.get_submodule(name).parameters())
    }
    result = Report(left=left)
    inside: set[int] = set()
    for entry, part in adapted_parts(module):
        result.parts.append(_part_report(part, entry))
        result.parts[-1].follows = {
            pair.copy: pair.source
            for pair in record.momentum_copies
            if lies_inside(pair.copy, [entry.name])
        }
        result.adapter_parameters += sum(p.numel() for p in adapter_parameters(part).values())
        inside |= {id(param) for param in part.parameters()}
        result.dense_base_bytes += entry.dense_bytes
    packed, sizes = _packed_weights(module), Counter[str]()
    for name, param in module.named_parameters():
        if is_lazy(param):
            continue
        stored = packed.get(id(param), param)
        result.total_parameters += parameter_count(stored)
        size = storage_bytes(stored)
        if param.requires_grad:
            result.trainable_parameters += param.numel()
            result.trainable_bytes += size
            result.outside += 0 if id(param) in inside else param.numel()
        else:
            result.base_bytes += size
        if name in record.excluded:
            sizes[name.partition(".")[0]] += size
    result.excluded = dict(sizes)
    result.dense_base_bytes += result.base_bytes - _quantized_bytes(module, record.parts.values())
    return result


def _quantized_bytes(module: nn.Module, entries: Iterable[AdaptedModuleRecord]) -> int:
    """Bytes now of the weights that are or were quantized; merged ones are dense again."""
    packed = _packed_weights(module)
    stored = [
        stored_parameter(module.get_submodule(entry.qualified(name)))
        for entry in entries
        for name in entry.quantized
    ]
    return sum(storage_bytes(packed.get(id(one), one)) for one in stored)


def _packed_weights(module: nn.Module) -> dict[int, Any]:
    """What parameters of bytes stand for, by their ids: the same weights without values."""
    return {
        id(stored_parameter(layer)): layer.described_weight()
        for layer in module.modules()
        if isinstance(layer, QuantizedLayer) and layer.packed is not None
    }


def _part_report(part: nn.Module, entry: AdaptedModuleRecord) -> PartReport:
    info = next(reversed(entry.adapters.values()))
    states = {}
    for head in entry.heads:
        params = list(part.get_submodule(head).parameters())
        states[head] = "trainable" if any(p.requires_grad for p in params) else "frozen"
    tokens = {f"{n.rpartition('.')[2]}[{len(x)} tokens]": 1 for n, x in trained_rows(part).items()}
    return PartReport(
        name=entry.name or type(part).__name__,
        adapted=dict(Counter(_with_rows(target, info) for target in info.targets)) | tokens,
        quantized=len(entry.quantized),
        quantization=_quantization_label(entry),
        heads=states,
        saved=entry.saved,
        in_place=info.in_place,
        method=method_of(info.config).label(info.config),
        dense=_dense_matrices(part, entry) if entry.quantized else {},
    )


def _with_rows(target: str, info: AdapterInfo) -> str:
    rows = ", ".join(f"{first}:{last}" for first, last in info.rows.get(target, ()))
    return target.rpartition(".")[2] + (f"[{rows}]" if rows else "")


def _dense_matrices(part: nn.Module, entry: AdaptedModuleRecord) -> dict[str, int]:
    """Bytes of the frozen floating-point matrices, which a model of experts has most of."""
    sizes: Counter[str] = Counter()
    for name, param in part.named_parameters():
        if entry.qualified(name) in entry.frozen and param.ndim > 1 and param.is_floating_point():
            pieces = [piece for piece in name.split(".") if not piece.isdigit()]
            sizes[".".join(pieces[-2:]).removesuffix(".weight")] += storage_bytes(param)
    return dict(sizes)


def _quantization_label(entry: AdaptedModuleRecord) -> str:
    settings = entry.quantization
    if settings is None:
        return "as loaded" if entry.quantized else ""
    return recorded_backend(settings).label(settings)
