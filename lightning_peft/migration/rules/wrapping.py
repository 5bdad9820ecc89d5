"""Rules for ``get_peft_model``, and for code that depends on its wrapper."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from lightning_peft.arguments import LoRAFields
from lightning_peft.migration.finding import Edit, Finding, MentionRule, Rule
from lightning_peft.migration.position import place_of
from lightning_peft.migration.source import (
    CodeBase,
    Mention,
    Source,
    is_false,
    keyword,
    nodes,
    saves_model,
)
from lightning_peft.migration.trainer import WRAPPING

# PEFT's own defaults, where those of this package differ.
_DEFAULTS = {"r": "8", "lora_alpha": "8"}
_FIELDS = {field.name for field in fields(LoRAFields)}
# For other tasks PEFT trains heads in full.
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
_PEFT_CLASS = re.compile(r"(Auto)?Peft(Mixed)?Model")
# Without PEFT's wrapper these are not there.
OF_THE_WRAPPER = frozenset({
    "merge_and_unload", "merge_adapter", "disable_adapter", "get_base_model",
    "get_peft_model_state_dict", "set_peft_model_state_dict", "add_adapter", "set_adapter",
    "load_adapter", "enable_adapter_layers", "disable_adapter_layers", "PeftModel",
})  # fmt: skip


class PeftWrapping(Rule):
    """Adapters put on by hand: ``get_peft_model``, ``inject_adapter_in_model`` and their like."""

    name = WRAPPING
    becomes = "the model without it; Trainer(strategy=LoRAStrategy({})) adds the adapters"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields calls, with the change where there is one and nothing needs the wrapper."""
        calls = list(_wrappings(base))
        dependent = next(iter(wrapper_uses(base)), None)
        for source, mention in calls:
            if mention.call is None:
                continue
            config = _config_of(source, mention.call) if mention.last == "get_peft_model" else None
            arguments = None if config is None else lora_arguments(config)
            place = place_of(base, source, mention.call)
            if arguments is not None and place.attribute:
                arguments["adapt"] = repr(place.attribute)
            shown = ", ".join(f"{k}={v}" for k, v in (arguments or {"peft_config": "..."}).items())
            why = ""
            if len(calls) > 1:
                why = f" (by hand: adapters are put on in {len(calls)} places)"
            elif mention.last != "get_peft_model":
                why = " (by hand: only get_peft_model is changed mechanically)"
            elif dependent is not None:
                why = f" (by hand: {dependent} may need PEFT's wrapper)"
            elif mention.name.partition(".")[0] != "peft":
                why = " (by hand: it is not imported from peft by this name)"
            elif place.problem:
                why = f" (by hand: {place.problem})"
            elif arguments is not None and "target_modules" not in arguments:
                why = " (by hand: without target_modules, PEFT chooses them by the architecture)"
            clear = arguments is not None and not why
            edits = self._edits(base, source, mention.call, config) if clear else ()
            yield self.finding(
                source,
                mention.line,
                source.code(mention.call),
                becomes=self.becomes.format(shown) + why,
                edits=edits,
                strategy=arguments if edits else None,
            )

    def _edits(
        self, base: CodeBase, source: Source, call: ast.Call, config: ast.Call | None
    ) -> tuple[Edit, ...]:
        wrapped = call.args[0]
        edits = [Edit.replace(source, call, source.expression(wrapped))]
        for line in nodes(source.tree, ast.Assign):
            if line.value is config:
                edits.append(Edit.remove(source, line))
            if line.value is call and ast.unparse(line.targets[0]) == ast.unparse(wrapped):
                edits[0] = Edit.remove(source, line)
        for other in base.sources:
            edits += [Edit.remove(other, line) for line in _printing(other).values()]
        return tuple(edits)


def _wrappings(base: CodeBase) -> Iterator[tuple[Source, Mention]]:
    """Yields the calls that put adapters on a model."""
    yield from base.mentions("get_peft_model", "inject_adapter_in_model")
    for source in base.sources:
        names = {
            ast.unparse(target)
            for line in nodes(source.tree, ast.Assign)
            if _is_config(source, line.value)
            for target in line.targets
        }
        for mention in source.mentions:
            call = mention.call
            if mention.name.startswith("peft.") and _PEFT_CLASS.match(mention.last):
                yield source, mention
            elif call is not None and mention.last == "add_adapter":
                given = [*call.args, *(word.value for word in call.keywords)]
                if any(_is_config(source, one) or ast.unparse(one) in names for one in given):
                    yield source, mention


def _is_config(source: Source, node: ast.AST) -> bool:
    """Whether an expression makes a config of PEFT."""
    name = source.name_of(node.func) if isinstance(node, ast.Call) else ""
    return name.startswith("peft.") and name.endswith("Config")


def _printing(source: Source) -> dict[int, ast.Expr]:
    """Returns the statements that print how many parameters train, by the id of their method."""
    return {
        id(line.value.func): line
        for line in nodes(source.tree, ast.Expr)
        if isinstance(line.value, ast.Call)
        and isinstance(line.value.func, ast.Attribute)
        and line.value.func.attr == "print_trainable_parameters"
    }


def wrapper_uses(base: CodeBase) -> Iterator[str]:
    """Yields the places of code that needs PEFT's wrapper."""
    for source, mention in base.mentions(*OF_THE_WRAPPER):
        yield str(source.place(mention.line))
    for source in base.sources:
        saved = (call for call in nodes(source.tree, ast.Call) if saves_model(call))
        yield from (str(source.place(call.lineno)) for call in saved)
        removed = _printing(source)
        for node in nodes(source.tree, ast.Attribute):
            names = ("base_model", "peft_config", "print_trainable_parameters")
            if node.attr in names and id(node) not in removed:
                yield str(source.place(node.lineno))


def _config_of(source: Source, call: ast.Call) -> ast.Call | None:
    """Returns the ``LoraConfig(...)`` that a call is given, directly or by a name."""
    words = {word.arg: word.value for word in call.keywords}
    given = [*call.args[1:], *words.values()]
    if len(call.args) + len(words) != 2 or not call.args or words.keys() - {"peft_config"}:
        return None
    value: ast.AST = given[0]
    if isinstance(value, ast.Name):
        name = value.id
        assigned = [
            node.value
            for node in nodes(source.tree, ast.Assign)
            if [ast.unparse(target) for target in node.targets] == [name]
        ]
        used = sum(getattr(node, "id", "") == name for node in ast.walk(source.tree))
        if len(assigned) != 1 or used != 2 or not _runs_before(source, assigned[0], call):
            return None
        value = assigned[0]
    if not isinstance(value, ast.Call):
        return None
    first, _, last = source.name_of(value.func).partition(".")
    return value if (first, last.rpartition(".")[2]) == ("peft", "LoraConfig") else None


def _runs_before(source: Source, value: ast.AST, call: ast.Call) -> bool:
    """Whether a value is assigned in the block of a call, or of the file, and above it."""
    for node in ast.walk(source.tree):
        block = getattr(node, "body", None)
        if isinstance(block, list):
            assigned = [s for s in block if isinstance(s, ast.Assign) and s.value is value]
            users = [s for s in block if any(inner is call for inner in ast.walk(s))]
            if assigned and users:
                same = isinstance(node, ast.Module) or any(
                    inner is call for s in users if not hasattr(s, "body") for inner in ast.walk(s)
                )
                return same and assigned[0].lineno < users[0].lineno
    return False


def lora_arguments(config: ast.Call) -> dict[str, str] | None:
    """Returns the arguments of a ``LoraConfig(...)`` as code, with PEFT's defaults.

    ``None`` where one is not a constant, or not an argument here.
    """
    if config.args:
        return None
    arguments = dict(_DEFAULTS)
    for word in config.keywords:
        text = ast.unparse(word.value)
        if word.arg == "task_type" and text.strip("'").rpartition(".")[2] in _TASKS:
            continue
        if word.arg == "inference_mode" and is_false(word.value):
            continue
        if word.arg == "base_model_name_or_path":
            continue
        if word.arg not in _FIELDS:
            return None
        try:
            value = ast.literal_eval(word.value)
        except ValueError:
            return None
        if value is not None:
            arguments[word.arg] = repr(value)
        elif getattr(LoRAFields, word.arg) is not None or word.arg in _DEFAULTS:
            return None
    return arguments


class KbitPreparation(MentionRule):
    """PEFT's preparation of a quantized model for training."""

    name = "kbit-preparation"
    names = frozenset({"prepare_model_for_kbit_training", "prepare_model_for_int8_training"})
    becomes = "nothing: QLoRAStrategy freezes the base and sets gradient checkpointing"

    def details(self, source: Source, mention: Mention) -> dict[str, Any]:
        """Returns the problem: what it does to layers that stay 16-bit."""
        return {"problem": "it casts every 16-bit weight that is not quantized to float32"}


class WrapperUse(MentionRule):
    """Code that is written for PEFT's wrapper: other adapters, the base without them."""

    name = "peft-wrapper-use"
    names = frozenset({"disable_adapter", "get_base_model", "enable_adapter_layers",
                       "disable_adapter_layers"})  # fmt: skip
    becomes = "lightning_peft.disable_adapters(module) and set_adapter(module, ...)"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields methods; a function of such a name is the code base's own."""
        return (one for one in super().find(base) if "." in one.found.partition("(")[0])


class AdapterLoading(Rule):
    """``PeftModel.from_pretrained``, which loads an adapter folder."""

    name = "adapter-loading"
    becomes = "may stay: adapter folders of this package are in PEFT's format"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields calls, with what to write where the adapter is trained on."""
        for source, mention in base.mentions("from_pretrained"):
            owner = mention.name.rpartition(".")[0].rpartition(".")[2]
            if mention.call is None or not _PEFT_CLASS.match(owner):
                continue
            word = keyword(mention.call, "is_trainable")
            trains = word is not None and not is_false(word.value)
            change = {"becomes": _TRAINED_ON} if trains else {}
            yield self.finding(source, mention.line, source.code(mention.call), **change)


_TRAINED_ON = "lightning_peft.load_adapter(module, folder, is_trainable=True), before the fit"


class BaseModelPath(Rule):
    """Paths through PEFT's wrapper, and aliases set back after it."""

    name = "peft-path"
    becomes = "the model's own path: layers keep their names and identity under every alias"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields paths with ``base_model.model`` in them."""
        for source in base.sources:
            inner = {id(node.value) for node in nodes(source.tree, ast.Attribute)}
            for node in nodes(source.tree, ast.Attribute):
                if ".base_model.model" in ast.unparse(node) and id(node) not in inner:
                    yield self.finding(source, node, source.code(node))
