"""Record of the injection, stored on the module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.engine.fingerprint import Fingerprint
from lightning_peft.engine.layers.adapter import AdapterLayer
from lightning_peft.errors import LifecycleError, UnsupportedError


@dataclass
class MomentumCopy:
    """Two submodules that were the same, bit for bit, when adapters were added.

    Attributes:
        source: Name of the one that trains.
        copy: Name of the copy.
        frozen: Whether the user had frozen the copy as a whole.
        base: Checksums of the copy's quantized weights; taken when first needed.
    """

    source: str
    copy: str
    frozen: bool
    base: tuple[int, ...] | None = None


_ATTRIBUTE = "_peft_record"


@dataclass
class AdapterInfo:
    """One adapter on one part.

    Attributes:
        config: The PEFT config as primitives, with ``target_modules`` as the user gave them.
        targets: Names of the adapted layers, relative to the part.
        in_place: Whether the layers were extended in place or wrapped by PEFT.
        initial: The factors as an initialisation made them that took their product off the base
            (PiSSA, OLoRA), by their names in an adapter file; else empty.
        heads: Names of the heads that have no layer of this adapter. Those that are trained belong
            to its files.
        rows: The rows of the output that the adapter adds to, by layer, where it is not all.
        needs_data: Whether it is to be initialised from batches, and is not yet.
    """

    config: dict[str, Any]
    targets: list[str]
    in_place: bool
    initial: dict[str, Tensor] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    rows: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    needs_data: bool = False


@dataclass
class AdaptedModuleRecord:
    """What was done to one adapted submodule.

    Attributes:
        name: Dotted name inside the module; ``""`` is the module itself.
        base: Fingerprint of the weights that injection froze, taken before anything changed.
        base_id: Hub name or path the part was loaded from, its revision, class, dtype, and rows of
            its input embeddings.
        quantized: Names of the quantized layers.
        quantization: The settings, as primitives, or ``None``.
        dense_bytes: Bytes that the weights of the layers in ``quantized`` took before injection.
        frozen: Names of the frozen parameters relative to the module, with every name that one
            has anywhere in the module.
        heads: Names of the heads that were left as the user had them.
        saved: Names of the modules that are trained in full.
        initial_values: Values, before training, of everything that is trained in full, and of
            the buffers of these modules; ``disable_adapters`` puts them back.
        adapters: By adapter name.
        changed_base: Fingerprint after an initialisation that rewrites the base, else ``None``.
        taken_over: Whether the adapters were there before, as PEFT's wrappers or on a submodule.
        loaded: Fingerprint of all parameters, heads included, taken before anything changed.
        replaced: Names of base parameters and buffers whose values came from an adapter folder, so
            that checkpoints and folders hold them.
        buffers: Checksums of the persistent buffers by name, taken before anything changed.
    """

    name: str
    base: Fingerprint
    base_id: dict[str, Any]
    quantized: list[str] = field(default_factory=list)
    quantization: dict[str, Any] | None = None
    dense_bytes: int = 0
    frozen: set[str] = field(default_factory=set)
    heads: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    initial_values: dict[str, Tensor] = field(default_factory=dict)
    adapters: dict[str, AdapterInfo] = field(default_factory=dict)
    changed_base: Fingerprint | None = None
    taken_over: bool = False
    replaced: list[str] = field(default_factory=list)
    buffers: dict[str, int] = field(default_factory=dict)
    loaded: Fingerprint = field(default_factory=lambda: Fingerprint({}))

    def qualified(self, name: str) -> str:
        """Returns a name relative to this part as a name relative to the module."""
        return f"{self.name}.{name}" if self.name else name


@dataclass(frozen=True)
class BuiltWeight:
    """A weight outside of the adapted parts, as the module was built with it.

    Attributes:
        total: :func:`~lightning_peft.engine.fingerprint.checksum` of it.
        exact: ``exact_checksum`` of it.
        dtype: Its dtype.
    """

    total: int
    exact: int
    dtype: torch.dtype


@dataclass
class Record:
    """Everything injection did to one module.

    Attributes:
        parts: By the dotted name of the part.
        active: Names of the adapters that take part in the forward pass.
        momentum_copies: Copies that follow other submodules.
        left: Names of the submodules that stay as they are, with the reason; ``None`` where that
            is not decided yet.
        eval_modules: Names of the submodules that stay in eval mode, as the user set them.
        unoptimized: Names of the adapted layers that are frozen since no optimizer holds them.
        staged: Names of the parameters that finetuning callbacks froze until some epoch.
        shards: How many processes share the frozen parameters.
        built: Weights outside of the parts before a fit or a checkpoint changed them, by name;
            those that are frozen in a fit, and those that a checkpoint had others for.
        excluded: Names of those that checkpoints leave out.
        changed: Names of those that were found to have changed, and that checkpoints hold.
    """

    parts: dict[str, AdaptedModuleRecord] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    momentum_copies: list[MomentumCopy] = field(default_factory=list)
    left: dict[str, str] | None = None
    eval_modules: set[str] = field(default_factory=set)
    unoptimized: list[str] = field(default_factory=list)
    staged: frozenset[str] = frozenset()
    shards: int = 1
    built: dict[str, BuiltWeight] = field(default_factory=dict)
    excluded: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)

    @property
    def frozen(self) -> set[str]:
        """Names of all frozen base parameters, relative to the module."""
        return set().union(*(part.frozen for part in self.parts.values()))

    @property
    def adapter_names(self) -> list[str]:
        """Names of all adapters, in the order in which they were added."""
        names = [name for part in self.parts.values() for name in part.adapters]
        return list(dict.fromkeys(names))


def record_of(module: nn.Module) -> Record | None:
    """Returns the record on ``module``, or ``None`` where nothing was injected."""
    return module.__dict__.get(_ATTRIBUTE)


def require_record(module: nn.Module) -> Record:
    """Returns the record on ``module``."""
    record = record_of(module)
    if record is None:
        if any(isinstance(child, AdapterLayer) for child in module.modules()):
            raise LifecycleError(
                f"The adapters in {type(module).__name__} were added to another module, which has "
                "it inside or is inside of it. Give that one, such as the LightningModule."
            )
        raise LifecycleError(
            f"{type(module).__name__} has no adapters yet. Call lightning_peft.inject(module) "
            "first, or let the strategy do it by trainer.fit."
        )
    return record


def adapted_parts(module: nn.Module) -> Iterator[tuple[AdaptedModuleRecord, nn.Module]]:
    """Yields the adapted parts of ``module``, each with its record."""
    for entry in require_record(module).parts.values():
        yield entry, module.get_submodule(entry.name)


def refuse_sharded(module: nn.Module, what: str) -> None:
    """Refuses ``what`` while the frozen base is spread over processes."""
    record = record_of(module)
    if record is not None and record.shards > 1:
        raise UnsupportedError(
            f"{what} needs the whole frozen base, and sharding='fsdp2' left 1/{record.shards} of "
            "it in this process. Load the checkpoint in one process: "
            "lightning_peft.load_from_checkpoint(cls, path)."
        )


def set_record(module: nn.Module, record: Record | None) -> None:
    """Puts ``record`` on ``module``, or takes it off."""
    if record is None:
        module.__dict__.pop(_ATTRIBUTE, None)
    else:
        # Around nn.Module.__setattr__: the record is plain data, not a submodule.
        module.__dict__[_ATTRIBUTE] = record
