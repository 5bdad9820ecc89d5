"""Parsed source files: Python, notebooks and LightningCLI YAML. Nothing is executed."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TypeVar

from lightning_peft.errors import ConfigError, first_line

_Node = TypeVar("_Node", bound=ast.AST)
_KINDS = (".py", ".ipynb", ".yaml", ".yml")
_SKIPPED = {"node_modules", "site-packages", "__pycache__"}
_LARGEST = 5_000_000
# Code for a later Python than the one that reads it may not parse.
_PYTHON = ".".join(map(str, sys.version_info[:2]))
_COMMAND = re.compile(
    r"^([ \t]*)(?:[\w, ]+=\s*)?(?:[%!?]|(?:pip|conda) install |[\w.]+\?+$)(?:.*\\[ \t\r]*\n)*.*$",
    re.MULTILINE,
)
_CLASS_PATH = re.compile(r"""^\s*(?:-\s*)?(?:class_path|_target_):\s*["']?([\w.]+)""")
_STRATEGY = re.compile(r"""^\s*strategy:\s*["']?([\w.]+)["']?\s*(?:#.*)?$""")


@dataclass(frozen=True)
class Place:
    """A line of a file, from 1; in a notebook, of a code cell, which are counted from 1 too."""

    path: Path
    line: int
    cell: int | None = None

    def __str__(self) -> str:
        cell = "" if self.cell is None else f":cell {self.cell}"
        return f"{self.path}{cell}:{self.line}"


@dataclass(frozen=True)
class Mention:
    """A class or function that is called in code, or named in YAML."""

    # Dotted, with imports resolved; "?" stands for an expression.
    name: str
    line: int
    # None in YAML.
    call: ast.Call | None = None

    @property
    def last(self) -> str:
        """The last step of the name."""
        return self.name.rpartition(".")[2]


@dataclass
class Source:
    """One file; of a notebook, the code of all cells; of YAML, an empty tree."""

    path: Path
    text: str
    tree: ast.Module = field(repr=False)
    encoding: str = "utf-8"
    # Of a notebook, the number of the cell and the line in it, for each line of the text.
    cells: tuple[tuple[int, int], ...] = ()
    # Sentences on cells that could not be parsed.
    left_out: tuple[str, ...] = ()

    def place(self, line: int) -> Place:
        """Returns where a line of ``text`` is."""
        if not self.cells:
            return Place(self.path, line)
        cell, within = self.cells[line - 1]
        return Place(self.path, within, cell)

    @cached_property
    def names(self) -> dict[str, str]:
        """What imported names stand for."""
        found: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first = alias.name.partition(".")[0]
                    found[alias.asname or first] = alias.name if alias.asname else first
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    module = f"{'.' * node.level}{node.module or ''}"
                    found[alias.asname or alias.name] = f"{module}.{alias.name}"
        return found

    def name_of(self, node: ast.AST) -> str:
        """Returns the dotted name of an expression, with imports resolved."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            return f"{self.name_of(node.value)}.{node.attr}"
        return "?"

    def bases(self, node: ast.ClassDef) -> set[str]:
        """Returns the last steps of the names of a class's bases."""
        return {self.name_of(base).rpartition(".")[2] for base in node.bases}

    def code(self, node: ast.AST) -> str:
        """Returns an expression on one line of at most 70 characters."""
        text = " ".join(ast.unparse(node).split())
        return text if len(text) <= 70 else f"{text[:66]} ..."

    def expression(self, node: ast.expr) -> str:
        """Returns an expression as it is written, in parentheses unless it can do without."""
        text = ast.get_source_segment(self.text, node) or ast.unparse(node)
        whole = isinstance(node, (ast.Name, ast.Attribute, ast.Call, ast.Subscript))
        return text if whole and node.lineno == node.end_lineno else f"({text})"

    @cached_property
    def mentions(self) -> tuple[Mention, ...]:
        """All calls, and all ``class_path`` and ``strategy`` of YAML."""
        if self.path.suffix in (".yaml", ".yml"):
            return tuple(_yaml_mentions(self.text))
        calls = nodes(self.tree, ast.Call)
        return tuple(Mention(self.name_of(call.func), call.lineno, call) for call in calls)

    @cached_property
    def classes(self) -> tuple[ast.ClassDef, ...]:
        """All classes."""
        return tuple(nodes(self.tree, ast.ClassDef))


@dataclass
class CodeBase:
    """All files that could be read, and a sentence for each that could not."""

    root: Path
    sources: list[Source]
    unreadable: list[str]

    def classes(self) -> Iterator[tuple[Source, ast.ClassDef]]:
        """Yields all classes."""
        for source in self.sources:
            for cls in source.classes:
                yield source, cls

    def methods(self, *names: str) -> Iterator[tuple[Source, ast.ClassDef, ast.FunctionDef]]:
        """Yields the methods of all classes, those with one of some names if there are any."""
        for source, cls in self.classes():
            for method in methods(cls, *names):
                yield source, cls, method

    @cached_property
    def bases(self) -> dict[str, set[str]]:
        """The last steps of the names of the bases of all classes, by their names."""
        return {cls.name: source.bases(cls) for source, cls in self.classes()}

    @cached_property
    def lightning_modules(self) -> set[str]:
        """Names of the classes that derive from Lightning's module, directly or by another one."""
        return self.derived("LightningModule")

    def derived(self, *names: str) -> set[str]:
        """Returns names of classes, with those that derive from them, directly or by another."""
        found, before = set(names), -1
        while len(found) != before:
            before = len(found)
            found |= {name for name, above in self.bases.items() if above & found}
        return found

    def mentions(self, *names: str) -> Iterator[tuple[Source, Mention]]:
        """Yields calls and mentions of classes or functions by the last step of their name."""
        for source in self.sources:
            for mention in source.mentions:
                if mention.last in names:
                    yield source, mention


def nodes(tree: ast.AST, kind: type[_Node]) -> Iterator[_Node]:
    """Yields the nodes of a kind that are in a tree."""
    return (node for node in ast.walk(tree) if isinstance(node, kind))


def methods(node: ast.ClassDef, *names: str) -> Iterator[ast.FunctionDef]:
    """Yields the methods of a class, those with one of some names if there are any."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and (not names or item.name in names):
            yield item


def keyword(call: ast.Call, name: str) -> ast.keyword | None:
    """Returns a keyword argument of a call."""
    return next((word for word in call.keywords if word.arg == name), None)


def saves_model(call: ast.Call) -> bool:
    """Whether a call is ``save_pretrained`` of something that may be a model."""
    if not isinstance(call.func, ast.Attribute) or call.func.attr != "save_pretrained":
        return False
    owner = ast.unparse(call.func.value).rpartition(".")[2].lower()
    return re.search(r"^self$|token|processor|extractor|config|scheduler", owner) is None


def is_false(node: ast.AST) -> bool:
    """Whether an expression is the constant ``False``."""
    return isinstance(node, ast.Constant) and node.value is False


def read_code_base(root: Path) -> CodeBase:
    """Reads the Python files, notebooks and YAML files below a folder, or one file."""
    if not root.exists():
        raise ConfigError(f"{str(root)!r}: there is no such file or folder to read.")
    files = [root] if root.is_file() else sorted(_files(root))
    found = CodeBase(root, [], [])
    for path in files:
        try:
            found.sources.append(_read(path))
            found.unreadable += found.sources[-1].left_out
        except SyntaxError as error:
            line = f":{error.lineno}" if error.lineno else ""
            reason = error.msg or first_line(error)
            found.unreadable.append(f"{path}{line}: {reason} (as Python {_PYTHON})")
        except (OSError, ValueError, RecursionError, MemoryError) as error:
            found.unreadable.append(f"{path}: {first_line(error)}")
    if not files:
        raise ConfigError(f"{str(root)!r} has no Python files, notebooks or YAML files in it.")
    return found


def _files(root: Path) -> Iterator[Path]:
    for folder, inner, names in os.walk(root):
        inner[:] = [
            name
            for name in inner
            if not name.startswith(".")
            and name not in _SKIPPED
            and not Path(folder, name, "pyvenv.cfg").is_file()
        ]
        for name in names:
            path = Path(folder, name)
            if path.suffix in _KINDS and path.is_file():
                yield path


def _read(path: Path) -> Source:
    content = path.read_bytes()
    if len(content) > _LARGEST:
        raise ValueError(f"{len(content) / 1e6:.0f} MB are too much for source code; not read")
    if path.suffix == ".ipynb":
        return _notebook(path, content)
    if path.suffix != ".py":
        return Source(path, content.decode("utf-8", "replace"), ast.Module([], []))
    encoding, _ = tokenize.detect_encoding(BytesIO(content).readline)
    text = content.decode(encoding)
    return Source(path, text, _parse(text), encoding)


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        # Such as escapes that a later Python will refuse.
        warnings.simplefilter("ignore")
        return ast.parse(text)


def _notebook(path: Path, content: bytes) -> Source:
    """Reads a notebook as one file, without commands of IPython and cells that are not Python."""
    notebook = json.loads(content)
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        raise ValueError("not a notebook of the current format (nbformat 4): it has no cells")
    lines: list[str] = []
    cells: list[tuple[int, int]] = []
    left_out = []
    code = [cell for cell in notebook["cells"] if cell.get("cell_type") == "code"]
    for number, cell in enumerate(code, 1):
        text = "".join(cell.get("source", ""))
        if re.match(r"%%(?!time|capture|prun)", text):
            continue
        # A command may continue on the next line.
        text = _COMMAND.sub(lambda found: f"{found[1]}pass" + "\n" * found[0].count("\n"), text)
        try:
            _parse(text)
        except SyntaxError as error:
            place = Place(path, error.lineno or 1, number)
            left_out.append(f"{place}: {error.msg} (as Python {_PYTHON})")
            continue
        within = text.splitlines()
        lines += within
        cells += [(number, line) for line in range(1, len(within) + 1)]
    whole = "\n".join(lines)
    return Source(path, whole, _parse(whole), cells=tuple(cells), left_out=tuple(left_out))


def _yaml_mentions(text: str) -> Iterator[Mention]:
    for number, line in enumerate(text.splitlines(), 1):
        named = _CLASS_PATH.match(line)
        if named:
            yield Mention(named[1], number)
        strategy = _STRATEGY.match(line)
        if strategy:
            yield Mention(f"strategy.{strategy[1]}", number)
