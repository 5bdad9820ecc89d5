"""Rules for quantized bases: Lightning's plugin and transformers' configs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from lightning_peft.migration.finding import Finding, MentionRule, Rule
from lightning_peft.migration.source import CodeBase, is_false, keyword, nodes
from lightning_peft.migration.trainer import trainer_calls

_MODES = {
    "nf4": {"bnb_4bit_use_double_quant": "False"},
    "nf4-dq": {},
    "fp4": {"bnb_4bit_quant_type": "'fp4'", "bnb_4bit_use_double_quant": "False"},
    "fp4-dq": {"bnb_4bit_quant_type": "'fp4'"},
    "int8": {"load_in_8bit": "True"},
    "int8-training": {"load_in_8bit": "True"},
}


class BitsandbytesPlugin(Rule):
    """Lightning's ``BitsandbytesPrecision``."""

    name = "bitsandbytes-precision"
    becomes = "QLoRAStrategy({}) in the place of the plugin"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields it, with the change where it is an argument of a Trainer."""
        inside = {id(w.value) for _, call in trainer_calls(base) for w in call.keywords}
        for source, mention in base.mentions("BitsandbytesPrecision"):
            call = mention.call
            mode = _mode(call)
            arguments = _MODES.get(mode or "")
            shown = ", ".join(f"{key}={value}" for key, value in (arguments or {}).items())
            asked = None
            if call is not None and id(call) in inside and arguments is not None:
                asked = {**arguments, "quantized": "True", "plugins": ast.unparse(call)}
            yield self.finding(
                source,
                mention.line,
                mention.name if call is None else source.code(call),
                becomes=self.becomes.format(shown),
                problem="it would quantize adapters too, and freezes nothing",
                strategy=asked,
            )


def _mode(call: ast.Call | None) -> str | None:
    """Returns the constant ``mode`` of a call without other arguments."""
    if call is None:
        return None
    word = keyword(call, "mode")
    value = word.value if word else next(iter(call.args), None)
    others = {w.arg for w in call.keywords} - {"mode"}
    known = isinstance(value, ast.Constant) and not others and len(call.args) < 2
    return str(value.value) if known and isinstance(value, ast.Constant) else None


class BitsandbytesConfig(MentionRule):
    """transformers' own quantization by bitsandbytes."""

    name = "quantization-config"
    names = frozenset({"BitsAndBytesConfig"})
    becomes = "may stay: the layers are recognised. Or remove it: QLoRAStrategy quantizes"


_OLD_ARGUMENTS = ("load_in_4bit", "load_in_8bit")
_TAKE_THEM = {"BitsAndBytesConfig", "QLoRAStrategy", "QLoRACallback"}


class OldQuantizationArguments(Rule):
    """``load_in_4bit`` and ``load_in_8bit`` as arguments on their way to ``from_pretrained``."""

    name = "quantization-argument"
    becomes = "remove it: QLoRAStrategy() quantizes; for 8-bit, QLoRAStrategy(load_in_8bit=True)"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields such calls."""
        # These hand the argument on to a call that is found itself.
        functions = {f.name for one in base.sources for f in nodes(one.tree, ast.FunctionDef)}
        for source in base.sources:
            for mention in source.mentions:
                words = [] if mention.call is None else mention.call.keywords
                asked = any(w.arg in _OLD_ARGUMENTS and not is_false(w.value) for w in words)
                if mention.call and asked and mention.last not in functions | _TAKE_THEM:
                    found = source.code(mention.call)
                    problem = "transformers 5 takes a BitsAndBytesConfig only"
                    yield self.finding(source, mention.line, found, problem=problem)


class AutomaticDeviceMap(Rule):
    """A model spread over devices by accelerate, under a Trainer."""

    name = "device-map"
    becomes = "remove it: the Trainer puts the module on its device"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields ``device_map="auto"`` and its like."""
        for source, mention in base.mentions("from_pretrained", "from_config"):
            word = mention.call and keyword(mention.call, "device_map")
            if (
                mention.call
                and word
                and re.search(r"'(auto|balanced|sequential)", ast.unparse(word))
            ):
                problem = "in each process it spreads the model over all devices"
                yield self.finding(source, mention.line, source.code(mention.call), problem=problem)


class OtherFormats(MentionRule):
    """Quantization that this package has no layers for."""

    name = "other-quantization"
    names = frozenset({
        "GPTQConfig", "AwqConfig", "HqqConfig", "TorchAoConfig", "EetqConfig", "QuantoConfig",
        "AqlmConfig", "CompressedTensorsConfig", "FineGrainedFP8Config", "Mxfp4Config",
    })  # fmt: skip
    served = "no"
    becomes = (
        "a dense model (dequantize=True where transformers can), which QLoRAStrategy quantizes"
    )
