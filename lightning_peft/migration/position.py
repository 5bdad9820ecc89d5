"""Position of a call: enclosing class and function, and relation to the trained module."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from lightning_peft.migration.source import CodeBase, Source, nodes

# Lightning calls these once for each module that trains.
_METHODS = ("__init__", "configure_model", "setup")
# Methods that return the module they are called on.
_CHAINED = ("train", "eval", "to", "cuda", "cpu", "half", "bfloat16", "float")


@dataclass(frozen=True)
class CallPlace:
    """Where a call stands."""

    # Why it may not run, or not for the module that trains.
    problem: str = ""
    # Path in the module of what it is assigned to, where that is certain.
    attribute: str = ""


def place_of(base: CodeBase, source: Source, call: ast.Call) -> CallPlace:
    """Returns where a call stands; certain is what follows from the syntax alone."""
    above = _above(source.tree, call)
    names = [type(node).__name__ for node in above]
    statement = next(i for i, node in enumerate(above) if isinstance(node, ast.stmt))
    inner, (line, *outer) = above[:statement], above[statement:]
    plain = all(isinstance(node, (ast.Call, ast.Attribute, ast.keyword)) for node in inner)
    several = isinstance(line, ast.Assign) and len(line.targets) > 1
    if not plain or several or not isinstance(line, (ast.Assign, ast.AnnAssign, ast.Expr)):
        return CallPlace("it is in a branch, or part of an expression that may not run")
    if names[statement + 1 :] == ["Module"]:
        return CallPlace(_other_modules(base, ""))
    if names[statement + 1 :] != ["FunctionDef", "ClassDef", "Module"]:
        return CallPlace("it is in a branch, a loop or a function, which may not run")
    method, cls = outer[0], outer[1]
    assert isinstance(method, ast.FunctionDef)
    assert isinstance(cls, ast.ClassDef)
    if method.name not in _METHODS or cls.name not in base.lightning_modules:
        return CallPlace(
            f"{cls.name}.{method.name} may not run: it is not __init__, configure_model or setup "
            "of a LightningModule"
        )
    before = method.body[: method.body.index(line)]
    if any(list(nodes(one, ast.Return)) for one in before):
        return CallPlace(f"{cls.name}.{method.name} may return before it")
    chained = all(_passes_on(outer, one) for one, outer in zip([call, *inner], inner, strict=False))
    attribute = _attribute(line, method) if chained else ""
    return CallPlace(_other_modules(base, cls.name), attribute)


def _above(tree: ast.Module, call: ast.Call) -> list[ast.AST]:
    """Returns the nodes around a call, from the inside."""
    parents = {id(c): node for node in ast.walk(tree) for c in ast.iter_child_nodes(node)}
    found: list[ast.AST] = []
    node: ast.AST | None = call
    while (node := parents.get(id(node))) is not None:
        found.append(node)
    return found


def _passes_on(outer: ast.AST, inner: ast.AST) -> bool:
    """Whether an expression is what is inside of it, as ``x.train()`` is ``x``."""
    if isinstance(outer, ast.Call):
        return outer.func is inner
    return isinstance(outer, ast.Attribute) and outer.attr in _CHAINED


def _attribute(line: ast.stmt, method: ast.FunctionDef) -> str:
    """Returns the path of the module's attribute that a statement assigns to."""
    target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
    first, _, path = ("" if target is None else ast.unparse(target)).partition(".")
    own = bool(method.args.args) and first == method.args.args[0].arg
    return path if own and all(step.isidentifier() for step in path.split(".")) else ""


def _other_modules(base: CodeBase, name: str) -> str:
    """Returns that there are LightningModules besides a class and those above it."""
    own, before = {name}, 0
    while len(own) != before:
        before = len(own)
        own |= {above for one in own for above in base.bases.get(one, ())}
    others = sorted(base.bases.keys() & base.lightning_modules - own)
    if len(others) > (not name):
        return f"the Trainer may train another LightningModule: {', '.join(others)}"
    return ""
