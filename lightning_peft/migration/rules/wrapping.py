"""PEFT put around a model by hand, and code that depends on its wrapper."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from lightning_peft.migration.finding import Edit, Finding, MentionRule, Rule
from lightning_peft.migration.source import CodeBase, Mention, Source

# Fields of PEFT's config that say nothing about the adapters, or that are found by themselves.
_LEFT_OUT = {"task_type", "inference_mode", "base_model_name_or_path"}
# Without PEFT's wrapper these are not there.
OF_THE_WRAPPER = frozenset(
    {
        *(
            "merge_and_unload",
            "merge_adapter",
            "disable_adapter",
            "get_base_model",
            "save_pretrained",
        ),
        *("get_peft_model_state_dict", "set_peft_model_state_dict", "add_adapter", "set_adapter"),
        *("load_adapter", "enable_adapter_layers", "disable_adapter_layers", "PeftModel"),
    }
)


class PeftWrapping(Rule):
    """``get_peft_model`` in the code base's own module."""

    name = "peft-wrapping"
    becomes = "the model without it; Trainer(strategy=LoRAStrategy({})) adds the adapters"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields calls, with the change where there is one and nothing needs the wrapper."""
        calls = list(base.mentions("get_peft_model"))
        dependent = next(iter(wrapper_uses(base)), None)
        for source, mention in calls:
            if mention.call is None:
                continue
            config = _config_of(source, mention.call)
            arguments = None if config is None else lora_arguments(source, config)
            shown = ", ".join(f"{k}={v}" for k, v in (arguments or {"peft_config": "..."}).items())
            why = ""
            if len(calls) > 1:
                why = f" (by hand: {len(calls)} calls of get_peft_model)"
            elif dependent is not None:
                why = f" (by hand: {dependent} needs PEFT's wrapper)"
            elif _in_branch(source, mention.call):
                why = " (by hand: it is in a branch or loop)"
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
        edits = [Edit.replace(source, call, ast.unparse(wrapped))]
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Assign) and node.value is config:
                edits.append(Edit.remove(source, node))
            if (
                isinstance(node, ast.Assign)
                and node.value is call
                and ast.unparse(node.targets[0]) == ast.unparse(wrapped)
            ):
                edits[0] = Edit.remove(source, node)
        for other in base.sources:
            edits += [
                Edit.remove(other, node)
                for node in ast.walk(other.tree)
                if isinstance(node, ast.Expr) and _is_printing(node.value)
            ]
        return tuple(edits)


def _in_branch(source: Source, call: ast.Call) -> bool:
    kinds = (ast.If, ast.For, ast.While, ast.Try, ast.IfExp, ast.Match)
    branches = (node for node in ast.walk(source.tree) if isinstance(node, kinds))
    return any(node is call for branch in branches for node in ast.walk(branch))


def _is_printing(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "print_trainable_parameters"
    )


def wrapper_uses(base: CodeBase) -> Iterator[str]:
    """Yields the places of code that needs PEFT's wrapper."""
    for source, mention in base.mentions(*OF_THE_WRAPPER):
        yield str(source.place(mention.line))
    for source in base.sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and node.attr in ("base_model", "peft_config"):
                yield str(source.place(node.lineno))


def _config_of(source: Source, call: ast.Call) -> ast.Call | None:
    """Returns the ``LoraConfig(...)`` that a call is given, directly or by a name."""
    given = [*call.args[1:2], *(w.value for w in call.keywords if w.arg == "peft_config")]
    if len(given) != 1 or not call.args:
        return None
    value: ast.AST = given[0]
    if isinstance(value, (ast.Name, ast.Attribute)):
        text = ast.unparse(value)
        assigned = [
            node.value
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == [text]
        ]
        used = sum(ast.unparse(n) == text for n in ast.walk(source.tree) if type(n) is type(value))
        if len(assigned) != 1 or used != 2:
            return None
        value = assigned[0]
    lora = isinstance(value, ast.Call) and source.name_of(value.func).endswith("LoraConfig")
    return value if lora and isinstance(value, ast.Call) else None


def lora_arguments(source: Source, config: ast.Call) -> dict[str, str] | None:
    """Returns the arguments of a ``LoraConfig(...)`` as code, where all of them are constants."""
    if config.args:
        return None
    arguments = {}
    for word in config.keywords:
        if word.arg in _LEFT_OUT:
            continue
        try:
            value = ast.literal_eval(word.value)
        except ValueError:
            return None
        if word.arg is None:
            return None
        arguments[word.arg] = repr(value)
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


class BaseModelPath(Rule):
    """Paths through PEFT's wrapper, and aliases set back after it."""

    name = "peft-path"
    becomes = "the model's own path: layers keep their names and identity under every alias"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields paths with ``base_model.model`` in them."""
        for source in base.sources:
            inner = {
                id(node.value) for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)
            }
            for node in ast.walk(source.tree):
                if (
                    isinstance(node, ast.Attribute)
                    and ".base_model.model" in f"{ast.unparse(node)}"
                    and id(node) not in inner
                ):
                    yield self.finding(source, node, source.code(node))
