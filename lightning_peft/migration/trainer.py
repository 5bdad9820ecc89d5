"""The Trainer of a code base, and the strategy that replaces its own."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import replace

from lightning_peft.migration.finding import Edit, Finding
from lightning_peft.migration.source import CodeBase, Source, keyword

WRAPPING = "peft-wrapping"
SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy",
           "DDPFullyShardedStrategy", "DDPFullyShardedNativeStrategy")  # fmt: skip
_LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")
# Strategies that LoRAStrategy stands in for: one device or several.
_REPLACED = ("", "auto", "ddp")
# What makes a Trainer, or does without one.
_MAKERS = {"Trainer", "LightningCLI", "Fabric", "instantiate", "instantiate_class"}
_NAMED = re.compile(r"(^|[.:])(Trainer|LightningCLI)$")
_IN_YAML = re.compile(r"^\s*(- )?(_target_|class_path):.*\bTrainer\b|^trainer:", re.MULTILINE)


def trainer_calls(base: CodeBase) -> Iterator[tuple[Source, ast.Call]]:
    """Yields the calls of Lightning's ``Trainer``."""
    for source, mention in base.mentions("Trainer"):
        if mention.call is not None and mention.name.partition(".")[0] in _LIGHTNING:
            yield source, mention.call


def strategy_text(call: ast.Call) -> str:
    """Returns the name in ``strategy=`` of a Trainer; ``""`` without one, ``"?"`` for an object."""
    word = keyword(call, "strategy")
    if word is None:
        return ""
    return str(word.value.value) if isinstance(word.value, ast.Constant) else "?"


def shards(name: str) -> bool:
    """Whether a strategy of this name spreads the frozen weights; DeepSpeed's first two do not."""
    return name.startswith("fsdp") or "stage_3" in name


def with_strategy(base: CodeBase, findings: list[Finding]) -> list[Finding]:
    """Returns the findings; the first that requests a strategy has the changes of all that do.

    Where no adapters of PEFT are put on in a way that is clear, the Trainer may not be the only
    one, is given more than is known here, or has another strategy, the changes that need its
    strategy are left out, and why is in ``becomes``.
    """
    asking = [finding for finding in findings if finding.strategy is not None]
    if not asking:
        return findings
    asked: dict[str, str] = {}
    for finding in asking:
        asked |= finding.strategy or {}
    trainers = list(trainer_calls(base))
    if all(finding.rule != WRAPPING for finding in asking):
        reason = "there is no get_peft_model here that --diff changes"
    else:
        reason = _unclear(trainers, asked) or _other_trainer(base, trainers[0][1])
        if not reason and not any(base.mentions("fit")):
            reason = "no call of fit"
    if reason:
        return [
            replace(f, edits=(), strategy=None, becomes=f"{f.becomes} (by hand: {reason})")
            if f.strategy is not None
            else f
            for f in findings
        ]
    edits = [edit for finding in asking for edit in finding.edits]
    edits += _trainer_edits(*trainers[0], asked)
    first = asking[0]
    return [
        f if f.strategy is None else replace(f, edits=tuple(edits) if f is first else ())
        for f in findings
    ]


def _unclear(trainers: list[tuple[Source, ast.Call]], asked: dict[str, str]) -> str:
    if len(trainers) != 1:
        return f"{len(trainers)} calls of Trainer" if trainers else "no call of Trainer"
    source, call = trainers[0]
    where = source.place(call.lineno)
    if any(word.arg is None for word in call.keywords) or call.args:
        return f"the Trainer in {where} takes arguments that are not written there"
    name = strategy_text(call)
    sharded = name.startswith(("fsdp", "deepspeed"))
    if name not in _REPLACED and not sharded and "ddp" not in asked:
        return f"the Trainer in {where} has a strategy of its own"
    if keyword(call, "plugins") and "plugins" not in asked:
        return f"the Trainer in {where} has plugins of its own"
    return ""


def _other_trainer(base: CodeBase, call: ast.Call) -> str:
    """Returns where something may make a Trainer that is not the call; ``""`` if nothing does."""
    for source in base.sources:
        found = _IN_YAML.search(source.text) if not source.tree.body else None
        if found:
            line = source.text.count("\n", 0, found.end()) + 1
            return f"{source.place(line)} may make another Trainer"
        annotations = _in_annotations(source.tree)
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.Name, ast.Attribute)):
                named = source.name_of(node).rpartition(".")[2] in _MAKERS
            elif isinstance(node, ast.ImportFrom):
                named = (node.module or "").startswith(_LIGHTNING) and node.names[0].name == "*"
            else:
                value = node.value if isinstance(node, ast.Constant) else None
                named = isinstance(value, str) and _NAMED.search(value) is not None
            if named and node is not call.func and id(node) not in annotations:
                return f"{source.place(node.lineno)} may make another Trainer"  # type: ignore[attr-defined]
    return ""


def _in_annotations(tree: ast.Module) -> set[int]:
    """Returns the ids of the nodes of annotations."""
    found = set()
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            annotation = getattr(node, name, None)
            if annotation is not None:
                found |= {id(inner) for inner in ast.walk(annotation)}
    return found


def _trainer_edits(source: Source, call: ast.Call, asked: dict[str, str]) -> list[Edit]:
    asked = dict(asked)
    quantized, plugins, _ = (asked.pop(name, "") for name in ("quantized", "plugins", "ddp"))
    cls = "QLoRAStrategy" if quantized else "LoRAStrategy"
    text = f"strategy={cls}({', '.join(f'{key}={value}' for key, value in asked.items())})"
    plugin, strategy = keyword(call, "plugins") if plugins else None, keyword(call, "strategy")
    edits = []
    if strategy is not None:
        edits.append(Edit.replace(source, strategy, text, cls))
        if plugin is not None:
            edits.append(_without(source, call, plugin))
    elif plugin is not None:
        edits.append(Edit.replace(source, plugin, text, cls))
    elif call.keywords:
        first = call.keywords[0]
        at = (first.lineno, first.col_offset)
        edits.append(Edit(source, at, at, f"{text}, ", cls))
    else:
        edits.append(Edit.replace(source, call, f"{ast.unparse(call.func)}({text})", cls))
    return edits


def _without(source: Source, call: ast.Call, word: ast.keyword) -> Edit:
    """Returns the edit that removes one of several keyword arguments, with a comma."""
    index = call.keywords.index(word)
    if index:
        before = call.keywords[index - 1]
        start = (before.end_lineno or 0, before.end_col_offset or 0)
        return Edit(source, start, (word.end_lineno or 0, word.end_col_offset or 0), "")
    after = call.keywords[1]
    return Edit(source, (word.lineno, word.col_offset), (after.lineno, after.col_offset), "")
