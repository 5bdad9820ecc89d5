"""Rules for checkpoints that drop, rename or lose tensors."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from lightning_peft.migration.finding import Edit, Finding, Rule
from lightning_peft.migration.source import (
    CodeBase,
    Source,
    is_false,
    keyword,
    methods,
    nodes,
    saves_model,
)

_HOOKS = ("on_save_checkpoint", "on_load_checkpoint", "state_dict", "load_state_dict")
_DROPS = re.compile(r"\bdel \w|\.pop\(|\.clear\(\)|\bif .*requires_grad|for .* in .* if ")
# Functions and methods that a hook may call and still do nothing but leave parameters out.
_READING = {
    *("named_parameters", "named_buffers", "get_parameter", "items", "keys", "values"),
    *("list", "set", "dict", "tuple", "isinstance", "hasattr", "getattr"),
    *("startswith", "endswith"),
}
_SIMPLE = (ast.If, ast.Try, ast.Pass, ast.Continue)
_NO_OPTIMIZER = "its files have no optimizer state: such a run cannot be resumed"
_RENAMES = re.compile(r"\.replace\(|\.removeprefix\(|\.removesuffix\(|re\.sub\(")


class CheckpointHooks(Rule):
    """Hooks that drop or rename keys of a checkpoint."""

    name = "checkpoint-hook"
    becomes = "nothing: the frozen base is left out of every checkpoint, everything else is in it"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields hooks that drop or rename, with their removal where they leave the base out."""
        modules = base.derived("LightningModule", "Module")
        for source, cls, method in base.methods(*_HOOKS):
            if not method.name.startswith("on_") and cls.name not in modules:
                continue
            code = ast.unparse(method)
            drops, renames = _DROPS.search(code), _RENAMES.search(code)
            if drops or renames:
                edits = () if renames else self._removal(source, method, code)
                yield self.finding(
                    source,
                    method,
                    f"{cls.name}.{method.name}",
                    problem=_lost(code),
                    edits=edits,
                    strategy={} if edits else None,
                    **({"becomes": _RENAMED} if renames else {}),
                )

    def _removal(self, source: Source, method: ast.FunctionDef, code: str) -> tuple[Edit, ...]:
        """Only where a saving hook does nothing but leave frozen parameters out."""
        given = method.args
        plain = method.name == "on_save_checkpoint" and "requires_grad" in code and given.args
        if not plain or method.decorator_list or given.vararg or given.kwonlyargs or given.kwarg:
            return ()
        leaves_out = _only_leaves_out(method.body, given.args[-1].arg)
        return (Edit.remove(source, method),) if leaves_out else ()


def _only_leaves_out(body: list[ast.stmt], checkpoint: str) -> bool:
    """Whether statements do nothing but leave keys of a checkpoint's state dict out."""
    state = f"{checkpoint}['state_dict']"
    inside = [node for statement in body for node in ast.walk(statement)]
    values: dict[str, set[str]] = {}
    for one in (node for node in inside if isinstance(node, ast.Assign)):
        for target in one.targets:
            values.setdefault(ast.unparse(target), set()).add(ast.unparse(one.value))
    lists = {name for name, given in values.items() if given <= {"[]", "set()", "list()"}}
    named = sum(isinstance(node, ast.Name) and node.id == checkpoint for node in inside)
    used = sum(isinstance(node, ast.Subscript) and ast.unparse(node) == state for node in inside)
    calls = (node.func for node in inside if isinstance(node, ast.Call))
    known = all(
        getattr(f, "attr", getattr(f, "id", "")) in _READING or _fills(f, lists) for f in calls
    )
    statements = (node for node in inside if isinstance(node, ast.stmt))
    return named == used and known and all(_is_plain(one, state, lists) for one in statements)


def _is_plain(node: ast.stmt, state: str, lists: set[str]) -> bool:
    """Whether one statement changes nothing but local names, and the keys of the state dict."""
    if isinstance(node, ast.Assign):
        return all(isinstance(t, ast.Name) for t in node.targets) or (
            [ast.unparse(target) for target in node.targets] == [state]
            and _filters(node.value, state)
        )
    if isinstance(node, ast.Delete):
        return all(
            isinstance(target, ast.Subscript) and ast.unparse(target.value) == state
            for target in node.targets
        )
    if isinstance(node, ast.For):
        return all(isinstance(n, (ast.Name, ast.Tuple, ast.Store)) for n in ast.walk(node.target))
    if isinstance(node, ast.Expr):
        filled = isinstance(node.value, ast.Call) and _fills(node.value.func, lists)
        return filled or isinstance(node.value, ast.Constant)
    return isinstance(node, _SIMPLE)


def _fills(function: ast.expr, lists: set[str]) -> bool:
    """Whether a method adds to a list or set of the hook's own."""
    adds = isinstance(function, ast.Attribute) and function.attr in ("append", "add")
    return adds and ast.unparse(function.value) in lists  # type: ignore[attr-defined]


def _filters(node: ast.expr, state: str) -> bool:
    """Whether an expression is a dict with some of the tensors under their names, unchanged."""
    if not isinstance(node, ast.DictComp) or len(node.generators) != 1:
        return False
    loop = node.generators[0]
    pair = f"({ast.unparse(node.key)}, {ast.unparse(node.value)})"
    source = ast.unparse(loop.iter)
    known = source in (f"{state}.items()", "self.named_parameters()")
    return known and ast.unparse(loop.target) in (pair, pair[1:-1])


_RENAMED = (
    "may stay where on_load_checkpoint renames back; else remove it, and bring old files over by "
    "`lightning-peft import`"
)


def _lost(code: str) -> str:
    if re.search(r"\b\w+\.clear\(\)", code) and "optimizer" not in code:
        return _NO_OPTIMIZER
    if "except AttributeError" in code and "get_parameter" in code:
        return (
            "what is not a parameter is dropped too: buffers, such as the running statistics of "
            "batch norm, are not in the file"
        )
    if re.search(r"named_parameters\(\) if", code):
        return "buffers, such as the running statistics of batch norm, are not in the file"
    return ""


class AdapterCheckpointCallback(Rule):
    """Callbacks that write adapters by themselves."""

    name = "checkpoint-callback"
    becomes = "ModelCheckpoint: each file has adapters and optimizer, and a folder in PEFT's format"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields subclasses of ModelCheckpoint or Callback that call PEFT's saving."""
        for source, cls in base.classes():
            code = ast.unparse(cls)
            saves = re.search(r"\.save_pretrained\(|get_peft_model_state_dict\(", code)
            own = any(methods(cls, "_save_checkpoint", "save_checkpoint"))
            if not any("Checkpoint" in b or "Callback" in b for b in source.bases(cls)):
                continue
            if saves or (own and "super()" not in code):
                lost = own and not re.search(r"super\(\)|optimizer", code)
                emptied = re.search(r"optimizer_states'\] = \[\]|pop\('optimizer_states'", code)
                problem = _NO_OPTIMIZER if lost or emptied else ""
                yield self.finding(source, cls, f"class {cls.name}", problem=problem)


class SavingByHand(Rule):
    """A LightningModule that writes its own files."""

    name = "saving-by-hand"
    becomes = "ModelCheckpoint, with its monitor; lightning_peft.save_adapter for adapters alone"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields methods of LightningModules that save a state dict or a model."""
        for source, cls, method in base.methods():
            code = ast.unparse(method)
            state = "torch.save(" in code and "state_dict" in code
            saves = state or any(map(saves_model, nodes(method, ast.Call)))
            if saves and cls.name in base.lightning_modules:
                problem = "" if "optimizer" in code else _NO_OPTIMIZER
                change = {} if state else {"becomes": _ADAPTERS_ALONE}
                name = f"{cls.name}.{method.name}"
                yield self.finding(source, method, name, problem=problem, **change)


_ADAPTERS_ALONE = (
    "may stay: save_pretrained writes the adapters in PEFT's format; ModelCheckpoint, with its "
    "monitor, for files to resume from"
)


class NotStrict(Rule):
    """Loading that passes over whatever does not fit."""

    name = "strict-false"
    becomes = "strict loading: ckpt_path=..., or lightning_peft.load_from_checkpoint"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields ``strict=False`` and ``strict_loading = False``, in YAML too."""
        problem = "what the file does not have, adapters too, stays as it was without an error"
        for source in base.sources:
            for mention in source.mentions:
                word = mention.call and keyword(mention.call, "strict")
                if mention.call and word and is_false(word.value) and "load" in mention.last:
                    found = source.code(mention.call)
                    change = {} if _of_lightning(mention.call) else {"becomes": _PRETRAINED}
                    yield self.finding(source, mention.line, found, problem=problem, **change)
            for node in ast.walk(source.tree):
                if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    names = [ast.unparse(target).rpartition(".")[2] for target in targets]
                    if "strict_loading" in names and is_false(node.value):
                        yield self.finding(source, node, source.code(node), problem=problem)
            if not source.tree.body:
                for number, line in enumerate(source.text.splitlines(), 1):
                    if re.match(r"\s*strict_loading:\s*[Ff]alse", line):
                        yield self.finding(source, number, line.strip(), problem=problem)


def _of_lightning(call: ast.Call) -> bool:
    """Whether what is loaded is a checkpoint of a Trainer, or goes into a LightningModule."""
    code = ast.unparse(call)
    return (
        re.search(r"^self\.load_|load_from_checkpoint|lightning_module|state_dict['\"]", code)
        is not None
    )


_PRETRAINED = (
    "may stay for pretrained weights that the constructor loads; adapters: load_adapter, ckpt_path"
)


class LoadFromCheckpoint(Rule):
    """``Module.load_from_checkpoint``, which builds no adapters."""

    name = "load-from-checkpoint"
    becomes = "lightning_peft.load_from_checkpoint(Module, path); files of before: import them once"

    def find(self, base: CodeBase) -> Iterator[Finding]:
        """Yields calls, without those of classes that are seen not to be LightningModules."""
        classes = [cls for _, cls in base.classes()]
        others = {cls.name for cls in classes} - base.lightning_modules
        # Files of modules without adapters stay files of the whole module.
        adapted = {
            cls.name
            for cls in classes
            if "get_peft_model(" in ast.unparse(cls)
            and not any(methods(cls, "load_from_checkpoint"))
        }
        for source, mention in base.mentions("load_from_checkpoint"):
            call = mention.call
            if call is None or mention.name.startswith("lightning_peft."):
                continue
            owner = mention.name.rpartition(".")[0].rpartition(".")[2]
            if owner not in others:
                edits = self._edits(source, call) if owner in adapted - others else ()
                yield self.finding(
                    source,
                    mention.line,
                    source.code(call),
                    edits=edits,
                    strategy={} if edits else None,
                )

    def _edits(self, source: Source, call: ast.Call) -> tuple[Edit, ...]:
        """Returns the change, where all arguments are known here."""
        unknown = {word.arg for word in call.keywords} & {"hparams_file", None}
        if unknown or len(call.args) != 1 or not isinstance(call.func, ast.Attribute):
            return ()
        arguments = [ast.unparse(call.func.value), ast.unparse(call.args[0])]
        words = [f"{w.arg}={ast.unparse(w.value)}" for w in call.keywords if w.arg != "strict"]
        text = f"load_from_checkpoint({', '.join([*arguments, *words])})"
        return (Edit.replace(source, call, text, "load_from_checkpoint"),)
