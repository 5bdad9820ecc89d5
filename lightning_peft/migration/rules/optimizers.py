"""Rules for optimizers that miss or duplicate adapter parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from lightning_peft.migration.finding import Finding, Rule
from lightning_peft.migration.source import CodeBase, Source, nodes


class OptimizerGroups(Rule):
    """What the optimizers of ``configure_optimizers`` are given."""

    name = "optimizer"
    becomes = "self.parameters(), or a filter by `p.requires_grad`, in configure_optimizers"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields selections that can miss adapters, and lists in which one is inside another."""
        for source, _, method in base.methods("configure_optimizers"):
            yield from self._misses(source, method)
            yield from self._doubles(source, method)

    def _misses(self, source: Source, method: ast.FunctionDef) -> Iterator[Finding]:
        for node in ast.walk(method):
            if not isinstance(node, (ast.GeneratorExp, ast.ListComp, ast.DictComp)):
                continue
            loop = node.generators[0]
            tests = [ast.unparse(test) for test in loop.ifs]
            named = "named_parameters" in ast.unparse(loop.iter)
            by_name = [test for test in tests if " in " in test or "startswith" in test]
            if not named or not by_name or any("no_decay" in test for test in by_name):
                continue
            keeps = any("lora" in test.lower() for test in by_name)
            yield self.finding(
                source,
                node,
                source.code(node),
                problem="heads and modules that train in full have no `lora` in their names"
                if keeps
                else "adapters are there only where the names of their layers match",
            )

    def _doubles(self, source: Source, method: ast.FunctionDef) -> Iterator[Finding]:
        owners = {
            f"{ast.unparse(call.func.value)}.": call
            for call in nodes(method, ast.Call)
            if isinstance(call.func, ast.Attribute)
            and call.func.attr in ("parameters", "named_parameters")
        }
        for inner, call in owners.items():
            outer = [name for name in owners if name != inner and inner.startswith(name)]
            if outer:
                yield self.finding(
                    source,
                    call,
                    source.code(call),
                    problem=f"it is inside of {outer[0]}parameters() in the same method: torch "
                    "refuses the same tensor in two groups, and two optimizers step it twice",
                    becomes="one of the two, or a filter that keeps them apart",
                )


class EarlyOptimizer(Rule):
    """Optimizers made in the constructor, before there are adapters."""

    name = "early-optimizer"
    becomes = "nothing: adapters take the place of the weights of their layers in its groups"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields optimizers of torch and bitsandbytes in constructors."""
        for source, _, method in base.methods("__init__"):
            for call in nodes(method, ast.Call):
                name = source.name_of(call.func)
                made = name.startswith(("torch.optim.", "bitsandbytes.optim."))
                if made and "lr_scheduler" not in name:
                    yield self.finding(source, call, source.code(call))
