"""Description of the injection in a checkpoint, and its comparison with a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lightning_peft.engine.adapters import all_adapter_parameters, set_adapter
from lightning_peft.engine.backends.registry import backend_for, backends, quantization_from_dict
from lightning_peft.engine.batch_initialization import restore_from_batches
from lightning_peft.engine.configuration import config_differences, config_from_dict
from lightning_peft.engine.files.adapter_checks import stored_as
from lightning_peft.engine.files.base_tensors import include_in_files
from lightning_peft.engine.injection import ATTENTIONS, EXPERTS, inject_config, kinds_left_dense
from lightning_peft.engine.inner_adapters import adopt_inner_adapters
from lightning_peft.engine.layers.attention import projection_scale, scale_problem
from lightning_peft.engine.layers.expert_weights import parameter_name
from lightning_peft.engine.methods.lora_config import needs_data
from lightning_peft.engine.primitives import to_primitives
from lightning_peft.engine.record import (
    AdaptedModuleRecord,
    Record,
    record_of,
    require_record,
    set_record,
)
from lightning_peft.engine.residual_inits import recorded_initial
from lightning_peft.engine.selection.planning import InjectionRequest
from lightning_peft.engine.vocabulary import resized_as_recorded, vocabulary_mismatch
from lightning_peft.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    LifecycleError,
    TargetModulesError,
    itemize,
)

# The second one leaves frozen weights outside of the adapted parts out.
FORMATS = (1, 2)


def describe(module: nn.Module) -> dict[str, Any]:
    """Describes the injection in primitives and tensors that ``weights_only=True`` loads."""
    record = require_record(module)
    return {
        "format": FORMATS[0],
        "active": list(record.active),
        "left": dict(record.left or {}),
        "tied": _tied_names(module),
        "parts": {
            name: _describe_part(part, module.get_submodule(name))
            for name, part in record.parts.items()
        },
    }


def _tied_names(module: nn.Module) -> list[list[str]]:
    """Returns the names of each weight of the base that has several."""
    names: dict[int, list[str]] = {}
    adapters = {id(param) for param in all_adapter_parameters(module)}
    for name, param in module.named_parameters(remove_duplicate=False):
        if id(param) not in adapters:
            names.setdefault(id(param), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def _describe_part(part: AdaptedModuleRecord, module: nn.Module) -> dict[str, Any]:
    described: dict[str, Any] = {
        "adapters": {
            name: {
                "config": to_primitives(info.config),
                "targets": list(info.targets),
                "rows": to_primitives(info.rows),
                "projection_scale": projection_scale(module, info.targets),
                "initial": recorded_initial(info),
                "needs_data": info.needs_data,
            }
            for name, info in part.adapters.items()
        },
        "quantization": part.quantization,
        "heads": list(part.heads),
        "saved": list(part.saved),
        "replaced": list(part.replaced),
        "base_id": dict(part.base_id),
        "base_digest": part.base.digest(),
        "base_sums": torch.tensor(part.base.sums, dtype=torch.int64),
    }
    dense = [name for name in part.replaced if name.removesuffix(".weight") not in part.quantized]
    if part.quantization and dense:
        described["dense"] = dense
    if part.changed_base is not None:
        described["changed_base_sums"] = torch.tensor(part.changed_base.sums, dtype=torch.int64)
    return described


def check_description(module: nn.Module, described: Mapping[str, Any]) -> None:
    """Checks that ``module`` was injected the way a checkpoint describes, on the same base.

    Raises:
        BaseMismatchError: If the frozen weights are others; the tensors are named.
        CheckpointError: If adapters, targets or settings are others; all differences are listed.
    """
    record = require_record(module)
    if described.get("format") not in FORMATS:
        raise CheckpointError(
            f"The checkpoint has format {described.get('format')!r} and this version reads formats "
            f"{FORMATS}. Install the version of lightning-peft that wrote it."
        )
    problems = _part_problems(record, described)
    problems += _scale_problems(module, record, described["parts"])
    for name in record.parts.keys() & described["parts"].keys():
        other = vocabulary_mismatch(described["parts"][name]["base_id"], module.get_submodule(name))
        problems += [other] if other else []
    if problems:
        raise CheckpointError(
            "The checkpoint was written with other adapters than the module has now:"
            + itemize(problems)
            + "\nUse the settings of the run that wrote it."
            + _advice_on_batches(record)
        )
    for name, part in record.parts.items():
        replaced = described["parts"][name].get("replaced")
        if replaced:
            include_in_files(module, part, replaced)
        _check_base(part, described["parts"][name], _advice_on_batches(record))


def _advice_on_batches(record: Record) -> str:
    adapters = (info for part in record.parts.values() for info in part.adapters.values())
    if not any(needs_data(info.config) for info in adapters):
        return ""
    return (
        "\nThe adapters were made from batches already. The file has what they were made to: load "
        "it onto a new module, with load_fabric_checkpoint before there are adapters and an "
        "optimizer, else with load_from_checkpoint or fit(new_module, ckpt_path=path)."
    )


def _part_problems(record: Record, described: Mapping[str, Any]) -> list[str]:
    problems = []
    theirs, mine = set(described["parts"]), set(record.parts)
    problems += [f"part {name!r} is adapted in the checkpoint only" for name in theirs - mine]
    problems += [f"part {name!r} is adapted in the module only" for name in mine - theirs]
    for name in sorted(mine & theirs):
        part, other = record.parts[name], described["parts"][name]
        where = name or "the module"
        codes = [bool(facts.get(EXPERTS)) for facts in (other["base_id"], part.base_id)]
        if _without_experts(part.quantization) != _without_experts(other["quantization"]):
            problems.append(
                f"{where}: quantization is {other['quantization']} in the checkpoint and "
                f"{part.quantization} now"
            )
        elif part.quantization and codes[0] != codes[1]:
            argument = backend_for(quantization_from_dict(part.quantization)).skip_argument
            problems.append(
                f"{where}: weights of experts are {stored_as(codes[0])} in the checkpoint and "
                f"{stored_as(codes[1])} now. {argument}=['experts'] in the quantization config "
                "leaves them dense, as versions that could not quantize them did"
            )
        elif part.base_id.get(ATTENTIONS) and not other["base_id"].get(ATTENTIONS):
            problems.append(
                f"{where}: in_proj_weight of attentions is dense in the checkpoint, as versions "
                "that could not quantize it left it, and quantized now. Read it by "
                "lightning_peft.load_from_checkpoint, which leaves it dense"
            )
        for adapter in sorted({*part.adapters, *other["adapters"]}):
            if adapter not in part.adapters or adapter not in other["adapters"]:
                side = "module" if adapter in part.adapters else "checkpoint"
                problems.append(f"{where}: adapter {adapter!r} is in the {side} only")
                continue
            info, saved = part.adapters[adapter], other["adapters"][adapter]
            targets = {"checkpoint": saved["targets"], "module": info.targets}
            for side, opposite in (("checkpoint", "module"), ("module", "checkpoint")):
                alone = [name for name in targets[side] if name not in set(targets[opposite])]
                problems += [f"{where}: layer {n!r} is adapted in the {side} only" for n in alone]
            if info.needs_data != saved.get("needs_data", False):
                side = "checkpoint" if info.needs_data else "module"
                problems.append(
                    f"{where}: adapter {adapter!r} has its first values in the {side} only"
                )
            rows = to_primitives(info.rows)
            if rows != saved.get("rows", {}):
                problems.append(
                    f"{where}: the rows of layers with adapters are {saved.get('rows')} in the "
                    f"checkpoint and {rows} now"
                )
            problems += [
                f"{where}: {key}={saved['config'].get(key)!r} in the checkpoint and "
                f"{info.config.get(key)!r} now"
                for key in config_differences(info.config, saved["config"])
            ]
    return problems


def _scale_problems(
    module: nn.Module, record: Record, described: Mapping[str, Any]
) -> Iterator[str]:
    for name in record.parts.keys() & described.keys():
        part = module.get_submodule(name)
        for adapter, info in record.parts[name].adapters.items():
            saved = described[name]["adapters"].get(adapter, {}).get("projection_scale")
            yield from scale_problem(saved, projection_scale(part, info.targets))


def _without_experts(settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Returns quantization settings without the entry that leaves experts dense, compared apart."""
    if settings is None:
        return None
    arguments = {backend.skip_argument for backend in backends()}
    kept = dict(settings)
    for name in arguments & settings.keys():
        kept[name] = [entry for entry in settings[name] or [] if entry != "experts"]
    return {name: value for name, value in kept.items() if name not in arguments or value}


def _check_base(part: AdaptedModuleRecord, described: Mapping[str, Any], advice: str) -> None:
    where = part.name or "the module"
    if part.base.digest() != described["base_digest"]:
        since = sorted(set(part.replaced).difference(described.get("replaced", ())))
        if since:
            raise BaseMismatchError(
                f"The base of {where} is not what it was when the checkpoint was written. It has "
                "weights that were merged or loaded since, which the checkpoint leaves out:"
                + itemize(since, 5)
                + "\nLoad it onto a new module: lightning_peft.load_from_checkpoint(cls, path), or "
                "fit(new_module, ckpt_path=path)."
            )
        sums = [int(value) for value in described["base_sums"]]
        if len(sums) != len(part.base.sums):
            found = [f"{len(sums)} tensors in the checkpoint, {len(part.base.sums)} now"]
        else:
            found = part.base.differences(sums) or ["other names or shapes"]
        trained_on = described["base_id"].get("name_or_path")
        raise BaseMismatchError(
            f"The frozen weights of {where} are not those that the adapter was trained on"
            + (f" ({trained_on!r})" if trained_on else "")
            + ":"
            + itemize(found, 5)
            + "\nThe adapter would compute something else without a sign of it. Build the module "
            "with the base of that run: the same checkpoint, revision and, for a base with random "
            "weights, the same seed."
        )
    changed = part.changed_base
    if changed is not None:
        found = changed.differences(int(v) for v in described["changed_base_sums"])
        if found:
            raise BaseMismatchError(
                f"The initialisation of the adapter on {where} rewrote the base in another way "
                "than in the run that wrote the checkpoint:"
                + itemize(found, 5)
                + (
                    advice
                    or "\nUse an initialisation without randomness (init_lora_weights='pissa' "
                    "instead of 'pissa_niter_N'), or call seed_everything with that run's seed."
                )
            )


def inject_as_described(
    module: nn.Module,
    described: Mapping[str, Any],
    device: torch.device | str | None = None,
) -> None:
    """Injects into ``module`` what a checkpoint describes, and checks that it is the same base.

    Raises:
        LifecycleError: If the module has adapters already.
        CheckpointError: If the module cannot be adapted as the checkpoint describes.
    """
    if record_of(module) is not None:
        raise LifecycleError(
            f"{type(module).__name__} has adapters already; a checkpoint's adapters go onto a "
            "module without any."
        )
    adopt_inner_adapters(module)
    if record_of(module) is None:
        _inject_described(module, described, device)
    restore_from_batches(module, described)
    set_adapter(module, described["active"])
    check_description(module, described)


def _inject_described(
    module: nn.Module, described: Mapping[str, Any], device: torch.device | str | None
) -> None:
    known = dict(module.named_modules(remove_duplicate=False))
    absent = [name for name in described["parts"] if name not in known]
    if absent:
        raise CheckpointError(
            f"The checkpoint adapts {', '.join(map(repr, absent))}, which {type(module).__name__} "
            "does not have. If the module builds its layers in `setup` or `configure_model`, they "
            "must be built before adapters can be added."
        )
    # Files of older versions have no `left`: they adapted whatever was in the parts.
    left = {name: why for name, why in described.get("left", {}).items() if name in known}
    set_record(module, Record(left=left))
    # The checkpoint holds the embeddings of a vocabulary that was changed.
    recorded = [
        (name, part["base_id"], bool(part.get("replaced") or part["saved"] or _has_rows(part)))
        for name, part in described["parts"].items()
    ]
    try:
        with resized_as_recorded(module, recorded):
            _inject_groups(module, described["parts"], device)
    finally:
        if not require_record(module).parts:
            set_record(module, None)


def _has_rows(part: Mapping[str, Any]) -> bool:
    return any(x["config"].get("trainable_token_indices") for x in part["adapters"].values())


def _inject_groups(
    module: nn.Module, parts: Mapping[str, Any], device: torch.device | str | None
) -> None:
    for adapter, names in _groups(parts):
        part = parts[names[0]]
        try:
            request = InjectionRequest(
                config_from_dict(_fields_of(part["adapters"][adapter])),
                quantization_from_dict(part["quantization"]),
                adapter,
                _saved(parts, names),
                dense_kinds=kinds_left_dense(part["base_id"]),
                dense=frozenset(key for name in names for key in parts[name].get("dense", ())),
            )
            inject_config(module, request, names, device)
        except (ConfigError, TargetModulesError) as error:
            raise CheckpointError(
                f"The checkpoint's adapter {adapter!r} cannot be put on {type(module).__name__}: "
                f"{error}"
            ) from error


def _fields_of(described: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config, without experts where an older version adapted none."""
    fields = dict(described["config"])
    experts = any(parameter_name(name) != name for name in described["targets"])
    if "target_parameters" in fields and fields["target_parameters"] is None and not experts:
        fields["target_parameters"] = []
    return fields


def _saved(parts: Mapping[str, Any], names: list[str]) -> dict[str, list[str]] | None:
    """Returns the names of modules trained in full, by part; ``None`` where they are not listed."""
    if any("saved" not in parts[name] for name in names):
        return None
    return {name: list(parts[name]["saved"]) for name in names}


def _groups(parts: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Returns adapters in order, each with the parts that one call of ``inject`` can serve.

    Parts with the same settings belong together: a name in them may match in one part only.
    """
    groups: list[tuple[str, list[str]]] = []
    settings: list[Any] = []
    for adapter in dict.fromkeys(name for part in parts.values() for name in part["adapters"]):
        for name, part in parts.items():
            if adapter not in part["adapters"]:
                continue
            wanted = (adapter, part["adapters"][adapter]["config"], part["quantization"])
            if wanted in settings:
                groups[settings.index(wanted)][1].append(name)
            else:
                settings.append(wanted)
                groups.append((adapter, [name]))
    return groups
