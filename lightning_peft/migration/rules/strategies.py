"""The Trainer's strategy: sharding, and strategies written by hand."""

from __future__ import annotations

import ast
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
