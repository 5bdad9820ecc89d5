"""Rules for averaging, unfreezing, merging and fused layers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from lightning_peft.migration.finding import Finding, MentionRule, Rule
from lightning_peft.migration.source import CodeBase, Mention, Source, methods, nodes

_HOOK = re.compile(r"on_(train|validation|fit)_|setup|finetune_function|freeze_before_training")


class Averages(MentionRule):
    """Averages of weights over steps."""

    name = "weight-average"
    names = frozenset({
        "EMAWeightAveraging", "WeightAveraging", "StochasticWeightAveraging", "EMA",
        "AveragedModel", "ExponentialMovingAverage", "EMACallback", "ModelEma", "ModelEmaV2",
    })  # fmt: skip
    becomes = "nothing: Lightning's callbacks average adapters, heads and buffers"

    def details(self, source: Source, mention: Mention) -> dict[str, Any]:
        """Returns the differences for averages of other libraries."""
        if mention.last == "StochasticWeightAveraging":
            return {"becomes": "may stay; with batch norms it is refused", "served": "partly"}
        if mention.last in ("WeightAveraging", "EMAWeightAveraging"):
            return {}
        return {
            "becomes": "EMAWeightAveraging of Lightning, or an average over parameters(), made in "
            "the constructor",
            "problem": "an average over state_dict() holds the base, and averages 4-bit codes",
            "served": "partly",
        }


class Unfreezing(MentionRule):
    """Callbacks that unfreeze in stages."""

    name = "unfreezing"
    names = frozenset({"BackboneFinetuning", "BaseFinetuning", "FinetuningScheduler"})
    served = "partly"
    becomes = (
        "Lightning's stage adapters, heads and modules_to_save, on one device, and never the base; "
        "subclasses with a `setup` of their own (FinetuningScheduler) are refused"
    )

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields them, and subclasses."""
        yield from super().find(base)
        staged = base.derived(*self.names)
        for source, cls in base.classes():
            if cls.name in staged:
                refused = any(method.name == "setup" for method in methods(cls))
                served = {"served": "no"} if refused else {}
                yield self.finding(source, cls, f"class {cls.name}", **served)


class UnfreezingByHand(Rule):
    """``requires_grad = True`` and ``unfreeze()`` inside of hooks."""

    name = "unfreezing-by-hand"
    served = "no"
    becomes = "refused at the start of a fit: what is to train in full goes into modules_to_save"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields them, but for those of finetuning callbacks."""
        staged = base.derived(*Unfreezing.names)
        for source, cls in base.classes():
            if cls.name in staged:
                continue
            hooks = (method for method in methods(cls) if _HOOK.match(method.name))
            for node in (node for hook in hooks for node in ast.walk(hook)):
                if _unfreezes(node):
                    yield self.finding(source, node, source.code(node))


def _unfreezes(node: ast.AST) -> bool:
    if isinstance(node, ast.Assign):
        sets = ast.unparse(node.targets[0]).endswith(".requires_grad")
        return sets and isinstance(node.value, ast.Constant) and node.value.value is True
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    return re.search(r"\.(unfreeze\(\)|requires_grad_\((True)?\))$", ast.unparse(node)) is not None


class MergeScript(MentionRule):
    """Adapters merged by hand."""

    name = "merge"
    names = frozenset({"merge_and_unload", "merge_adapter"})
    becomes = "`lightning-peft merge RUN OUTPUT`, or lightning_peft.unload(module) in code"


class ZeroConversion(MentionRule):
    """DeepSpeed's conversion of sharded checkpoints."""

    name = "zero-conversion"
    names = frozenset(
        {
            "get_fp32_state_dict_from_zero_checkpoint",
            "convert_zero_checkpoint_to_fp32_state_dict",
            "load_state_dict_from_zero_checkpoint",
        }
    )
    becomes = (
        "nothing: each checkpoint is one file; old ones: convert once, `lightning-peft import`"
    )


class FusedQkv(Rule):
    """A fused qkv that is taken apart, so that PEFT adapts query and value alone."""

    name = "qkv-split"
    becomes = "the fused layer, target_modules=['qkv[q]', 'qkv[v]']; names of the base stay"
    _sliced = re.compile(
        r"(qkv|in_proj_weight|in_proj_bias|Wqkv|c_attn)(\.weight|\.bias)?(\.data)?$"
    )

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields slices and chunks of fused weights, one for each function."""
        for source in base.sources:
            for function in nodes(source.tree, ast.FunctionDef):
                if re.search(r"\blinear\(", ast.unparse(function)):
                    # Attention, which uses the slices.
                    continue
                for node in ast.walk(function):
                    part = node.value if isinstance(node, ast.Subscript) else None
                    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                        part = node.func.value if node.func.attr in ("chunk", "split") else None
                    text = "" if part is None else ast.unparse(part)
                    if self._sliced.search(text) and ("weight" in text or "bias" in text):
                        yield self.finding(source, node, source.code(node))
                        break


class RewrittenEncoderLayer(Rule):
    """An encoder layer written again so that PEFT's adapter on its attention trains."""

    name = "rewritten-encoder-layer"
    becomes = (
        "nn.TransformerEncoderLayer, where PEFT was the reason: adapters on out_proj and linear1 "
        "train in place"
    )

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields classes of that name or base with a forward pass of their own."""
        for source, cls, _ in base.methods("forward"):
            if "TransformerEncoderLayer" in {cls.name, *source.bases(cls)}:
                yield self.finding(source, cls, f"class {cls.name}")
