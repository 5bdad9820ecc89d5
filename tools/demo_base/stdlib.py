"""Reads the documented public names of the running interpreter's standard library.

The ``.py`` files are parsed with :mod:`ast`; nothing is imported or executed. The order is that
of the sorted file paths and of the source, so two runs on one interpreter agree.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

SKIPPED_DIRECTORIES = frozenset(
    {
        "__phello__",
        "__pycache__",
        "_pyrepl",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib-dynload",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)

REMOVED_MODULES = frozenset(
    {
        "aifc", "asynchat", "asyncore", "audioop", "binhex", "cgi", "cgitb", "chunk", "crypt",
        "distutils", "imghdr", "imp", "lib2to3", "mailcap", "msilib", "nntplib", "pipes", "smtpd",
        "sndhdr", "sre_compile", "sre_constants", "sre_parse", "sunau", "telnetlib", "tkinter.tix",
        "uu", "xdrlib",
    }
)  # fmt: skip
"""Modules gone, or deprecated with no public use, by Python 3.13 (PEP 594, PEP 632 and the
"What's New" pages of 3.11 to 3.13). Questions about them would teach outdated facts."""

PUBLIC_NAMES = {
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "genericpath": "os.path",
    "posixpath": "os.path",
}
"""Files whose content is documented under the name of another, public module."""

UNASKED_MODULES = re.compile(
    r"(?:asyncio|ctypes|encodings|unittest)\.|concurrent\.futures\."
    r"|multiprocessing\.(?:dummy|forkserver|heap|popen|reduction|resource|spawn|util)"
    r"|(?:__future__|modulefinder|ntpath|nturl2path|opcode|pickletools|pydoc|tabnanny)\b"
    r"|xml\.(?:dom\.(?:domreg|expatbuilder)|sax\.expatreader)"
)
"""Modules that stay in the text but are asked about only under a public name, if at all."""

OWN_NOTICE = re.compile(
    r"permission\W+to\W+use,?\W+copy|permission\W+is\W+(?:hereby\W+)?granted"
    r"|redistribution\W+and\W+use|so\W+long\W+as\W+this\W+copyright"
    r"|can\W+be\W+redistributed\W+under|the\W+apache\W+license|GNU\W+GPL",
    re.IGNORECASE,
)
"""A permission notice of its own in a source file. Such a file came to CPython from elsewhere,
so its sentences stay out of the shipped pairs, which are covered by the PSF licence alone."""


@dataclass(frozen=True)
class Entry:
    """One documented public name of the standard library.

    Attributes:
        module: Public dotted module name, such as ``textwrap``.
        path: Dotted name inside the module, such as ``TextWrapper.wrap``; empty for the module.
        kind: ``module``, ``class``, ``function``, ``method``, ``property`` or ``special form``.
        signature: Parameters in parentheses without ``self``/``cls``; empty where none are known.
        parameters: ``(name, default source or None)`` of each parameter; ``None`` where the
            definition has ``*args``, ``**kwargs`` or markers, which the pairs do not ask about.
        doc: The docstring, cleaned by :func:`clean_markup`.
        public: Whether the name is one to ask about: in ``__all__`` where there is one, in a
            documented module, and in a file without a permission notice of its own.
    """

    module: str
    path: str
    kind: str
    signature: str
    parameters: tuple[tuple[str, str | None], ...] | None
    doc: str
    public: bool = True

    @property
    def name(self) -> str:
        """Qualified name, such as ``textwrap.TextWrapper.wrap``."""
        return f"{self.module}.{self.path}" if self.path else self.module


def stdlib_root() -> Path:
    """Returns the folder with the running interpreter's standard library sources.

    Raises:
        FileNotFoundError: If the interpreter comes without ``.py`` sources (frozen or zipped).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    if not (root / "textwrap.py").is_file():
        raise FileNotFoundError(
            f"No standard library sources found: {root} has no textwrap.py. The demo text is read "
            "from the .py files of the running Python, which an embedded or zipped interpreter "
            "does not have. Run this command with a regular Python installation; the demo itself "
            "needs no sources, because its base model and instructions.jsonl are shipped."
        )
    return root


@dataclass(frozen=True)
class _Source:
    """One parsed source file.

    Attributes:
        module: Dotted module name, private parts included.
        is_package: Whether the file is an ``__init__.py``.
        tree: Its syntax tree.
        exported: The literal ``__all__``, or None where there is none.
        own_notice: Whether it matches ``OWN_NOTICE``.
    """

    module: str
    is_package: bool
    tree: ast.Module
    exported: frozenset[str] | None
    own_notice: bool


def _literal_all(tree: ast.Module) -> frozenset[str] | None:
    """Returns the strings of ``__all__`` as far as they are written out, or None without one."""
    names: set[str] = set()
    found = False
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets: list[ast.expr] = node.targets
        elif isinstance(node, ast.AugAssign):
            targets = [node.target]
        else:
            continue
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            found = True
            for item in ast.walk(node.value):
                if isinstance(item, ast.Constant) and isinstance(item.value, str):
                    names.add(item.value)
    return frozenset(names) if found and names else None


def _parse_sources(root: Path) -> dict[str, _Source]:
    sources: dict[str, _Source] = {}
    for path in sorted(root.rglob("*.py"), key=lambda item: item.relative_to(root).as_posix()):
        parts = list(path.relative_to(root).with_suffix("").parts)
        if any(part in SKIPPED_DIRECTORIES or part.startswith("config-") for part in parts):
            continue
        if parts[0].startswith("_sysconfigdata"):
            continue
        is_package = parts[-1] == "__init__"
        if is_package:
            parts.pop()
        module = ".".join(parts)
        if module in REMOVED_MODULES or parts[0] in REMOVED_MODULES:
            continue
        source = path.read_bytes()
        with warnings.catch_warnings():
            # Old sources hold invalid escapes; these are the library's business, not the user's.
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse(source)
            except SyntaxError:
                continue
        own_notice = OWN_NOTICE.search(source.decode("utf-8", errors="replace")) is not None
        sources[module] = _Source(module, is_package, tree, _literal_all(tree), own_notice)
    return sources


def _defined(source: _Source) -> set[str]:
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in _statements(source.tree.body) if isinstance(node, kinds)}


def _public_homes(sources: dict[str, _Source]) -> dict[tuple[str, str], str]:
    """Finds the names that a package offers as its own: ``{(defining module, name): package}``.

    ``unittest.TestCase`` is defined in ``unittest.case`` and ``asyncio.gather`` in
    ``asyncio.tasks``; people know them by the package, so that is the name to learn.
    """
    homes: dict[tuple[str, str], str] = {}
    for package in sources.values():
        if not package.is_package:
            continue
        for node in _statements(package.tree.body):
            if not isinstance(node, ast.ImportFrom) or node.module is None or node.level > 1:
                continue
            target = f"{package.module}.{node.module}" if node.level else node.module
            source = sources.get(target)
            if source is None or not target.startswith(f"{package.module}."):
                continue
            for alias in node.names:
                if alias.name == "*":
                    names = source.exported or _defined(source)
                    homes.update({(target, name): package.module for name in names})
                elif alias.asname in (None, alias.name):
                    homes[target, alias.name] = package.module
        # Some packages load their submodules late and name the content only in __all__.
        inside = [
            source
            for source in sources.values()
            if source.module.rpartition(".")[0] == package.module
        ]
        for name in package.exported or ():
            defining = [source.module for source in inside if name in _defined(source)]
            if len(defining) == 1:
                homes[defining[0], name] = package.module
    return homes


def clean_markup(text: str) -> str:
    """Returns ``text`` with reStructuredText inline marks turned into plain backquotes.

    ``:func:`~os.path.join``` becomes ```os.path.join```, and double backquotes become single
    ones, so that one name is spelled one way for a model that sees few examples of each.
    """
    text = re.sub(r":(?:py:)?[a-z]+:`[~!]?([^`]+)`", r"`\1`", text)
    text = re.sub(r"``([^`\n]+)``", r"`\1`", text)
    text = re.sub(r"\t", "    ", text)
    text = re.sub(r"[ \r\f]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _signature(
    arguments: ast.arguments, drop_first: bool
) -> tuple[str, tuple[tuple[str, str | None], ...] | None]:
    """Returns the signature without annotations, and the parameters where they are plain."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    defaults += arguments.defaults
    listed = [
        (argument.arg, None if default is None else ast.unparse(default))
        for argument, default in zip(positional, defaults, strict=True)
    ]
    if drop_first:
        listed = listed[1:]
    shown = [name if default is None else f"{name}={default}" for name, default in listed]
    plain = not (arguments.vararg or arguments.kwarg or arguments.kwonlyargs)
    if arguments.vararg:
        shown.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        shown.append("*")
    for argument, keyword in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        shown.append(argument.arg if keyword is None else f"{argument.arg}={ast.unparse(keyword)}")
    if arguments.kwarg:
        shown.append(f"**{arguments.kwarg.arg}")
    return f"({', '.join(shown)})", tuple(listed) if plain else None


def _decorators(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> set[str]:
    names = set()
    for decorator in node.decorator_list:
        target = decorator.func if isinstance(decorator, ast.Call) else decorator
        names.add(ast.unparse(target).rpartition(".")[2])
    return names


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yields the statements of ``body``, looking into ``if``/``try`` blocks as well."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If):
            yield from _statements(statement.body)
            yield from _statements(statement.orelse)
        elif isinstance(statement, ast.Try):
            yield from _statements(statement.body)
            for handler in statement.handlers:
                yield from _statements(handler.body)
            yield from _statements(statement.orelse)


def _definitions(body: Sequence[ast.stmt], prefix: str) -> Iterator[Entry]:
    """Yields the documented definitions, with the module left empty."""
    for node in _statements(body):
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if node.name.startswith("_"):
            continue
        path = f"{prefix}{node.name}"
        doc = clean_markup(ast.get_docstring(node) or "")
        if isinstance(node, ast.ClassDef):
            signature, parameters = "", None
            for member in _statements(node.body):
                if isinstance(member, ast.FunctionDef) and member.name == "__init__":
                    signature, parameters = _signature(member.args, drop_first=True)
                    # Many classes are described where their arguments are.
                    doc = doc or clean_markup(ast.get_docstring(member) or "")
                    break
            if doc:
                yield Entry("", path, "class", signature, parameters, doc)
            yield from _definitions(node.body, f"{path}.")
            continue
        decorators = _decorators(node)
        if not doc or decorators & {"overload", "setter", "deleter"}:
            continue
        if prefix and decorators & {"property", "cached_property", "abstractproperty"}:
            yield Entry("", path, "property", "", None, doc)
            continue
        if any(name.endswith("SpecialForm") for name in decorators):
            # typing defines NoReturn and its like as functions, which they are not to a reader.
            yield Entry("", path, "special form", "", None, doc)
            continue
        bound = bool(prefix) and "staticmethod" not in decorators
        signature, parameters = _signature(node.args, drop_first=bound)
        yield Entry("", path, "method" if prefix else "function", signature, parameters, doc)


def read_entries(root: Path | None = None) -> list[Entry]:
    """Reads the documented public names of the standard library, each once.

    Of the names that share one docstring (inherited text, aliases) only the first is kept, because
    the others would carry held-out text into the training text.
    """
    sources = _parse_sources(stdlib_root() if root is None else root)
    homes = _public_homes(sources)
    entries: list[Entry] = []
    names: set[str] = set()
    docs: set[str] = set()
    for source in sources.values():
        own_module = PUBLIC_NAMES.get(source.module, source.module)
        found: list[Entry] = []
        doc = clean_markup(ast.get_docstring(source.tree) or "")
        if doc and own_module == source.module:
            found.append(Entry("", "", "module", "", None, doc))
        found.extend(_definitions(source.tree.body, ""))
        for entry in found:
            top = entry.path.partition(".")[0]
            module = homes.get((source.module, top), own_module)
            if any(part.startswith("_") for part in module.split(".")):
                continue
            listed = not top or source.exported is None or top in source.exported
            public = (
                (listed or module != own_module)
                and not source.own_notice
                and not UNASKED_MODULES.match(module)
            )
            entry = replace(entry, module=module, public=public)
            if entry.name in names or entry.doc in docs:
                continue
            names.add(entry.name)
            docs.add(entry.doc)
            entries.append(entry)
    return entries
