"""One adapter by PEFT's own model class and by ``inject``, on copies of one base."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

import lightning_peft
from lightning_peft import engine

from .reference import output_of, relative_error

PREFIX = "base_model.model."


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: What it is about.
        base: Returns the base and what to call it with.
        config: Returns PEFT's config.
        refused: What the refusal of ``inject`` says, where it refuses.
        unmerged: What the refusal of ``merge`` says, where it refuses.
        tolerance: Relative error of outputs.
        steps: Whether three steps can be compared; not where random numbers decide.
        theirs_read: Whether PEFT's folder holds the whole adapter.
        same_keys: Whether both files have the same keys; ``bias="all"`` writes heads in full here.
        theirs_merged: Whether PEFT merges at all.
    """

    name: str
    base: Callable[[], tuple[nn.Module, Any]]
    config: Callable[[], PeftConfig]
    refused: str | None = None
    unmerged: str | None = None
    tolerance: float = 2e-5
    steps: bool = True
    theirs_read: bool = True
    same_keys: bool = True
    theirs_merged: bool = True


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of much that does not matter to a comparison."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def differences(row: Row, folder: Path) -> list[str]:
    """Returns in what ``inject`` differs from PEFT on this row."""
    torch.manual_seed(1)
    base, batch = row.base()
    base = base.eval().requires_grad_(False)
    with quiet():
        torch.manual_seed(2)
        theirs = get_peft_model(copy.deepcopy(base), row.config()).eval()
        torch.manual_seed(2)
        ours = copy.deepcopy(base)
        lightning_peft.inject(ours, row.config())
        found = _structure(theirs, ours)
        if found:
            return found
        found += _same_values(theirs, ours)
        _change(theirs, ours)
        found += _same_output("output", row, theirs, ours, batch)
        found += _disabled(row, base, ours, batch)
        if row.steps:
            found += _steps(row, theirs, ours, batch)
        found += _files(row, base, theirs, ours, batch, folder)
        found += _merging(row, theirs, ours, batch)
    return found


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trained parameters, by names without PEFT's additions."""
    found = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            plain = name.removeprefix(PREFIX).replace(".modules_to_save.default", "")
            plain = plain.replace(".base_layer.", ".")
            # PEFT keeps them in modules.
            found[plain.replace("magnitude_vector.default.weight", "magnitude_vector.default")] = (
                param
            )
    return found


def _structure(theirs: nn.Module, ours: nn.Module) -> list[str]:
    wrapped = {
        name.removeprefix(PREFIX).replace(".base_layer.", ".")
        for name, child in theirs.named_modules()
        if isinstance(child, BaseTunerLayer)
    }
    mine = set(engine.adapted_layers(ours))
    found = []
    if wrapped != mine:
        found.append(f"layers: PEFT {sorted(wrapped - mine)}, here {sorted(mine - wrapped)}")
    left, right = trainable(theirs), trainable(ours)
    if left.keys() != right.keys():
        only = (sorted(left.keys() - right.keys()), sorted(right.keys() - left.keys()))
        found.append(f"trained: PEFT {only[0]}, here {only[1]}")
    dtypes = {name: (left[name].dtype, right[name].dtype) for name in left.keys() & right.keys()}
    found += [f"{n}: {a} and {b}" for n, (a, b) in dtypes.items() if a != b]
    # Adapters are float32 over any base, but for norms that are trained as they are.
    factors = {n: p for n, p in engine.adapter_parameters(ours).items() if "ln_tuning" not in n}
    return found + [f"{n}: {p.dtype}" for n, p in factors.items() if p.dtype != torch.float32]


def _same_values(theirs: nn.Module, ours: nn.Module) -> list[str]:
    left, right = trainable(theirs), trainable(ours)
    return [f"{n}: first values" for n in left if not _are_same(n, left[n], right[n])]


def _are_same(name: str, theirs: Tensor, ours: Tensor) -> bool:
    # Over 16-bit bases PEFT rounds norms.
    dtypes = (torch.bfloat16, torch.float16) if "magnitude" in name else ()
    rounded = (ours.to(dtype).to(ours.dtype) for dtype in dtypes)
    return any(torch.equal(theirs, one) for one in (ours, *rounded))


@torch.no_grad()
def _change(theirs: nn.Module, ours: nn.Module) -> None:
    """Gives both the same new values near the first ones."""
    left, right = trainable(theirs), trainable(ours)
    for name in sorted(left):
        noise = torch.randn(left[name].shape) * 0.05
        left[name].add_(noise.to(left[name].dtype))
        right[name].copy_(left[name])


def _same_output(what: str, row: Row, one: nn.Module, other: nn.Module, batch: Any) -> list[str]:
    error = relative_error(output_of(other, batch), output_of(one, batch))
    return [] if error <= row.tolerance else [f"{what}: {error:.1e}"]


def _steps(row: Row, theirs: nn.Module, ours: nn.Module, batch: Any) -> list[str]:
    gradients: list[dict[str, Tensor | None]] = []
    for model in (theirs, ours):
        params = trainable(model)
        optimizer = torch.optim.SGD([params[name] for name in sorted(params)], lr=1e-2)
        for step in range(3):
            optimizer.zero_grad()
            output_of(model, batch).float().pow(2).mean().backward()
            if step == 0:
                first = {n: None if p.grad is None else p.grad.clone() for n, p in params.items()}
                gradients.append(first)
            optimizer.step()
    # Attention does not depend on the bias of its keys, whose gradients are rounding errors.
    noise = 1e-9 * max(float(g.double().norm()) for g in gradients[0].values() if g is not None)
    found = [
        f"{name}: gradient"
        for name, gradient in gradients[0].items()
        if not _near(row, gradient, gradients[1][name], noise)
    ]
    return found + _same_output("output after three steps", row, theirs, ours, batch)


def _near(row: Row, one: Tensor | None, other: Tensor | None, noise: float) -> bool:
    if one is None or other is None:
        return one is other
    error = (other.double() - one.double()).norm()
    return bool(error <= max(noise, row.tolerance * float(one.double().norm())))


def _disabled(row: Row, base: nn.Module, ours: nn.Module, batch: Any) -> list[str]:
    before = output_of(ours, batch)
    with lightning_peft.disable_adapters(ours):
        same = torch.equal(output_of(ours, batch), output_of(base, batch))
    # Disabled, a base that was rewritten stays so.
    found = [] if same or _changes_base(row) else ["disabled adapters are not the base"]
    same = torch.equal(output_of(ours, batch), before)
    return found if same else [*found, "adapters that were disabled are others now"]


def _files(
    row: Row, base: nn.Module, theirs: PeftModel, ours: nn.Module, batch: Any, folder: Path
) -> list[str]:
    lightning_peft.save_adapter(ours, folder / "ours")
    theirs.save_pretrained(folder / "theirs")
    files = [load_file(folder / who / "adapter_model.safetensors") for who in ("theirs", "ours")]
    found = []
    if files[0].keys() != files[1].keys() and row.same_keys and not _changes_base(row):
        only = [sorted(one.keys() - other.keys()) for one, other in (files, files[::-1])]
        found.append(f"keys in files: PEFT {only[0]}, here {only[1]}")
    read = PeftModel.from_pretrained(copy.deepcopy(base), folder / "ours").eval()
    found += _same_output("our folder read by PEFT", row, ours, read, batch)
    if not row.theirs_read:
        return found
    loaded = copy.deepcopy(base)
    lightning_peft.load_adapter(loaded, folder / "theirs")
    return found + _same_output("PEFT's folder read here", row, theirs, loaded, batch)


def _changes_base(row: Row) -> bool:
    return str(getattr(row.config(), "init_lora_weights", "")).startswith(("pissa", "olora"))


def _merging(row: Row, theirs: PeftModel, ours: nn.Module, batch: Any) -> list[str]:
    expected = output_of(ours, batch).detach()
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    try:
        lightning_peft.merge(ours)
    except lightning_peft.errors.LightningPeftError as refusal:
        same = all(map(torch.equal, before.values(), ours.state_dict().values()))
        found = [] if same else ["a refused merge changed the base"]
        if row.unmerged is None or row.unmerged not in str(refusal):
            found.append(f"merge: {refusal}")
        return found
    found = [] if row.unmerged is None else ["merge was not refused"]
    found += _off("merged", row, ours, batch, expected)
    lightning_peft.unmerge(ours)
    found += _off("unmerged", row, ours, batch, expected)
    lightning_peft.merge(ours)
    lightning_peft.unload(ours)
    found += _off("unloaded", row, ours, batch, expected)
    if any(isinstance(child, BaseTunerLayer) for child in ours.modules()):
        found.append("a wrapper is left")
    if row.theirs_merged:
        found += _off("merged by PEFT", row, theirs.merge_and_unload(), batch, expected)
    return found


def _off(what: str, row: Row, model: nn.Module, batch: Any, expected: Tensor) -> list[str]:
    error = relative_error(output_of(model, batch), expected)
    return [] if error <= 5 * row.tolerance else [f"{what}: {error:.1e}"]


def outcome(row: Row, folder: Path) -> list[str]:
    """Returns the fault of a row: a difference, or a refusal other than the stated one."""
    if row.refused is None:
        return differences(row, folder)
    base, batch = row.base()
    kept, expected = list(base.state_dict()), output_of(base.eval(), batch)
    try:
        with quiet():
            lightning_peft.inject(base, row.config())
    except lightning_peft.errors.LightningPeftError as refusal:
        if row.refused.lower() not in str(refusal).lower():
            return [f"refused otherwise: {refusal}"]
        if list(base.state_dict()) != kept or not torch.equal(output_of(base, batch), expected):
            return ["a refused module is changed"]
        return []
    return ["was not refused"]
