"""Rules for strategies: sharding and custom classes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from lightning_peft.migration.finding import Finding, MentionRule, Rule
from lightning_peft.migration.source import CodeBase, Mention, Source
from lightning_peft.migration.trainer import SHARDED, shards, strategy_text, trainer_calls

_STRATEGY_BASES = ("Strategy", "DDPStrategy", "SingleDeviceStrategy", "DeepSpeedStrategy",
                   "FSDPStrategy", "ModelParallelStrategy")  # fmt: skip
_OVERRIDDEN = ("load_model_state_dict", "lightning_module_state_dict", "save_checkpoint",
               "load_checkpoint")  # fmt: skip


class ShardedStrategy(Rule):
    """FSDP, DeepSpeed and model parallelism, by name or as objects."""

    name = "sharded-strategy"
    becomes = (
        "LoRAStrategy(sharding='fsdp2') where the base does not fit one device, else LoRAStrategy()"
    )
    served = "partly"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields names in Trainers, constructors, and ``strategy:`` of YAML."""
        for source, mention in base.mentions(*SHARDED):
            found = mention.name if mention.call is None else source.code(mention.call)
            yield self.finding(source, mention.line, found)
        for source in base.sources:
            for mention in source.mentions:
                if mention.call is None and mention.name.startswith("strategy."):
                    name = mention.name.partition(".")[2]
                    if name.startswith(("fsdp", "deepspeed")):
                        yield self.finding(source, mention.line, f"strategy: {name}")
        for source, call in trainer_calls(base):
            name = strategy_text(call)
            if name.startswith(("fsdp", "deepspeed")):
                asked = {"sharding": "'fsdp2'"} if shards(name) else {}
                yield self.finding(source, call, f"strategy={name!r}", strategy=asked)
        for source, cls in base.classes():
            if source.bases(cls) & set(SHARDED):
                yield self.finding(source, cls, f"class {cls.name}")


class PlainDdp(Rule):
    """DDP with arguments of its own, by name or as an object."""

    name = "ddp-strategy"
    becomes = "LoRAStrategy({})"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields them, with the change where they are the Trainer's."""
        trainers = list(trainer_calls(base))
        given = {id(word.value) for _, call in trainers for word in call.keywords}
        for source in base.sources:
            for mention in source.mentions:
                call = mention.call
                if mention.last in ("DDPStrategy", "DDPSpawnStrategy"):
                    found = mention.name if call is None else ast.unparse(call)
                    words = {} if call is None else {w.arg: w.value for w in call.keywords}
                    plain = call is not None and not call.args and _constants(words)
                    change = self._change(found, words, plain and id(call) in given)
                    shown = found if call is None else source.code(call)
                    yield self.finding(source, mention.line, shown, **change)
                elif call is None and mention.name.startswith("strategy.ddp_"):
                    name = mention.name.partition(".")[2]
                    yield self.finding(
                        source,
                        mention.line,
                        f"strategy: {name}",
                        **self._change(name, _named(name)),
                    )
        for source, trainer in trainers:
            name = strategy_text(trainer)
            if name.startswith("ddp_"):
                change = self._change(name, _named(name), certain=True)
                yield self.finding(source, trainer, f"strategy={name!r}", **change)

    def _change(
        self, found: str, words: dict[str | None, ast.expr], certain: bool = False
    ) -> dict[str, Any]:
        if re.search("spawn|fork|notebook", found, re.IGNORECASE):
            return {"served": "no", "becomes": _OWN_PROCESSES}
        text = ", ".join(f"{name!r}: {ast.unparse(value)}" for name, value in words.items())
        asked = {"ddp_kwargs": f"{{{text}}}"} if words else {}
        shown = ", ".join(f"{name}={value}" for name, value in asked.items())
        becomes = self.becomes.format(shown)
        return {"becomes": becomes, "strategy": {"ddp": "True", **asked} if certain else None}


def _constants(words: dict[str | None, ast.expr]) -> bool:
    return None not in words and all(isinstance(one, ast.Constant) for one in words.values())


def _named(strategy: str) -> dict[str | None, ast.expr]:
    """Returns the arguments that a name of DDP stands for."""
    unused = re.search("find_unused_parameters_(true|false)", strategy)
    return {"find_unused_parameters": ast.Constant(unused[1] == "true")} if unused else {}


_OWN_PROCESSES = (
    "refused: adapters of spawned or forked processes would be lost with them. A script, and "
    "LoRAStrategy()"
)


class OwnStrategy(Rule):
    """A strategy class whose methods load or save leniently."""

    name = "own-strategy"
    becomes = "LoRAStrategy(ddp_kwargs={...}): it saves adapters only and restores them strictly"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields classes that override how a strategy saves or loads."""
        for source, cls, method in base.methods(*_OVERRIDDEN):
            if source.bases(cls).isdisjoint(_STRATEGY_BASES):
                continue
            problems = []
            names = [a.arg for a in [*method.args.args, *method.args.kwonlyargs]]
            takes_strict = "strict" in names or method.args.kwarg
            if "strict=False" in ast.unparse(method):
                problems.append("it passes over keys that are missing")
            if method.name == "load_model_state_dict" and not takes_strict:
                problems.append("Lightning passes `strict`, which raises a TypeError here")
            found = f"{cls.name}.{method.name}"
            yield self.finding(source, method, found, problem=" and ".join(problems))


class ShardingByHand(MentionRule):
    """``fully_shard`` and tensor parallel plans in the module."""

    name = "sharding-by-hand"
    names = frozenset({"fully_shard", "parallelize_module", "FullyShardedDataParallel"})
    becomes = "LoRAStrategy(sharding='fsdp2'): it shards the repeated blocks; remove it"
    served = "partly"

    def details(self, source: Source, mention: Mention) -> dict[str, Any]:
        """Returns that tensor parallelism is not there."""
        if mention.last != "parallelize_module":
            return {}
        return {"served": "no", "becomes": "refused: there is no tensor parallelism here"}
