"""Holds the rooms and floors of the package: who may import whom, and how big a room may get.

Each rule is a function from a parsed package to a list of problems. The first half of the tests
applies the rules to ``lightning_peft``; the second half applies them to small packages that break
them, which proves that each rule can fail.
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_peft"

# Room -> rooms it may import, top floor first. The root may not be imported by anyone.
FLOORS: dict[str, set[str]] = {
    "": {"tasks", "data", "runs", "plan", "plugin", "engine", "errors"},
    "cli": {
        "sweeps",
        "demo",
        "doctor",
        "migration",
        "chat",
        "evaluation",
        "export",
        "tasks",
        "data",
        "runs",
        "plan",
        "plugin",
        "engine",
        "errors",
    },
    "doctor": {"engine", "errors"},
    "migration": {"errors"},
    "demo": {"tasks", "data", "runs", "plan", "plugin", "engine", "errors"},
    "generation": {"data", "plan", "engine", "errors"},
    "tasks": {"generation", "data", "runs", "plan", "plugin", "engine", "errors"},
    "data": {"tasks", "runs", "plan", "plugin", "engine", "errors"},
    "runs": {"plan", "plugin", "engine", "errors"},
    "plan": {"engine", "errors"},
    "sweeps": {"tasks", "runs", "plugin", "engine", "errors"},
    "export": {"runs", "plan", "plugin", "engine", "errors"},
    "evaluation": {"chat", "export", "data", "runs", "plan", "plugin", "engine", "errors"},
    "chat": {"generation", "export", "data", "runs", "plan", "plugin", "engine", "errors"},
    "plugin": {"plan", "engine", "errors"},
    "engine": {"errors"},
    "errors": set(),
}
# What every room may import, and what imports no other room.
GROUND = {
    *("arguments", "errors", "compat", "exports", "file_errors", "json_equality"),
    *("model_reference", "processes", "recipe_files", "sentence_folder", "task_registry"),
    "torchvision_errors",
}
FLOORS |= {room: set() for room in GROUND}
# One floor, two rooms: they may use each other's public names only.
NEIGHBOURS = {("tasks", "data"), ("data", "tasks")}

# Third party -> the only room that may import it. Imports for type checkers alone cost nothing and
# are free, except that the engine must not even speak of Lightning.
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
OWNERS = {"peft": "engine", **dict.fromkeys(LIGHTNING, "plugin")}

# Libraries that only the handlers of quantization backends may import.
QUANTIZERS = {"bitsandbytes", "torchao", "hqq", "gptqmodel"}

DRAWERS = {"util", "utils", "helper", "helpers", "common", "misc", "tools"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
HEAVY = {"torch", "peft", "bitsandbytes", "transformers", "datasets", "gradio"} | LIGHTNING


@dataclass(frozen=True)
class Source:
    """One parsed module."""

    name: str
    path: Path
    tree: ast.Module = field(repr=False)
    lines: int

    @property
    def room(self) -> str:
        """First part of the name below the root, such as ``engine``."""
        return room_of(self.name)

    @property
    def parent(self) -> str:
        """The package that a relative import starts from."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Import:
    """One imported name: ``name`` is empty when a module is imported as a whole."""

    target: str
    name: str
    place: str
    lazy: bool
    typing_only: bool


class ImportCollector(ast.NodeVisitor):
    """Collects imports, and whether they run at import time, on a call, or never."""

    def __init__(self, source: Source, modules: set[str]) -> None:
        self.source, self.modules = source, modules
        self.lazy = self.typing_only = False
        self.found: list[Import] = []

    def add(self, target: str, name: str, line: int) -> None:
        if name and f"{target}.{name}" in self.modules:
            target, name = f"{target}.{name}", ""
        place = f"{self.source.name}:{line}"
        self.found.append(Import(target, name, place, self.lazy, self.typing_only))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name, "", node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        target = node.module or ""
        if node.level:
            start = self.source.parent.split(".")[: 1 - node.level or None]
            target = ".".join([*start, *([node.module] if node.module else [])])
        for alias in node.names:
            self.add(target, alias.name, node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func).rpartition(".")[2]
        first = node.args[0] if node.args else None
        if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
            self.add(str(first.value), "", node.lineno)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.AST) -> None:
        outer, self.lazy = self.lazy, True
        self.generic_visit(node)
        self.lazy = outer

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        outer, guard = self.typing_only, ast.unparse(node.test).rpartition(".")[2]
        self.typing_only = outer or guard == "TYPE_CHECKING"
        self.generic_visit(ast.Module(node.body, []))
        self.typing_only = outer
        self.generic_visit(ast.Module([ast.Expr(node.test), *node.orelse], []))


class Package(dict[str, Source]):
    """All modules of the package below ``folder``, by dotted name."""

    def __init__(self, folder: Path, name: str = PACKAGE) -> None:
        super().__init__()
        for path in sorted((folder / name).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text, filename=str(path))
            self[name] = Source(name, path, tree, len(text.splitlines()))

    def imports(self) -> Iterator[tuple[Source, Import]]:
        """Every import statement of every module."""
        for source in self.values():
            collector = ImportCollector(source, set(self))
            collector.visit(source.tree)
            for found in collector.found:
                yield source, found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def inside(module: str) -> bool:
    return module.split(".")[0] == PACKAGE


def floor_problems(package: Package) -> list[str]:
    """Imports that go up, sideways, or from or to a room that is not in ``FLOORS``."""
    unknown = [source for source in package.values() if source.room not in FLOORS]
    found = [f"{source.name}: room {source.room!r} is not in FLOORS" for source in unknown]
    for source, imported in package.imports():
        room = room_of(imported.target)
        if not inside(imported.target) or imported.typing_only or source.room not in FLOORS:
            continue
        if room not in {"", source.room, *FLOORS[source.room], *GROUND}:
            found.append(f"{imported.place}: {source.room or 'root'} imports {room}")
    return found


def neighbour_problems(package: Package) -> list[str]:
    """Private modules or names taken from a room of the same floor."""
    found = []
    for source, imported in package.imports():
        if inside(imported.target) and (source.room, room_of(imported.target)) in NEIGHBOURS:
            parts = [*imported.target.split("."), imported.name]
            if any(part.startswith("_") for part in parts):
                taken = ".".join(filter(None, parts))
                found.append(f"{imported.place}: takes the private {taken}")
    return found


def root_problems(package: Package) -> list[str]:
    """Imports of the package's own public surface from inside."""
    return [
        f"{imported.place}: imports {imported.name or 'all'} from the root {PACKAGE}"
        for source, imported in package.imports()
        if imported.target == PACKAGE
    ]


def owner_problems(package: Package) -> list[str]:
    """Third parties imported outside the one room that owns them."""
    found = []
    for source, imported in package.imports():
        # What is private in a third party belongs to the same room. The module of Lightning's does
        # not import it, so that everyone above the engine may use it.
        party = imported.target.removeprefix(f"{PACKAGE}.compat.").split(".")[0]
        if party not in OWNERS or source.room == OWNERS[party]:
            continue
        if imported.target == f"{PACKAGE}.compat.lightning" and source.room != "engine":
            continue
        if source.name == f"{PACKAGE}.compat.{'lightning' if party in LIGHTNING else party}":
            continue
        if not imported.typing_only or (source.room == "engine" and party in LIGHTNING):
            found.append(f"{imported.place}: only {OWNERS[party]} imports {party}")
    return found


# What a quantized parameter consists of, which only the handlers know.
QUANTIZATION = re.compile(
    r"(quant_state|Params4bit|Int8Params|Linear4bit|Linear8bitLt|QuantState|MatmulLtState|SCB)"
)
BACKENDS = f"{PACKAGE}.engine.backends"


def is_backend(source: Source, library: str) -> bool:
    handler = f"{source.name}.".startswith(f"{BACKENDS}.")
    return handler or source.name == f"{PACKAGE}.compat.{library}"


def backend_problems(package: Package) -> list[str]:
    """Code outside of the handlers that imports or knows a quantization library."""
    found = []
    for source, imported in package.imports():
        library = imported.target.removeprefix(f"{PACKAGE}.compat.").split(".")[0]
        if library in QUANTIZERS and not is_backend(source, library):
            found.append(f"{imported.place}: only {BACKENDS} imports {library}")
    for source in package.values():
        if any(is_backend(source, library) for library in QUANTIZERS):
            continue
        for node in ast.walk(source.tree):
            name = getattr(node, "attr", getattr(node, "id", None))
            name = node.value if isinstance(node, ast.Constant) else name
            if isinstance(name, str) and QUANTIZATION.fullmatch(name):
                found.append(f"{source.name}:{node.lineno}: only {BACKENDS} knows {name}")
    return found


def cycle_problems(package: Package) -> list[str]:
    """A cycle of imports, those on a call, by a string or for type checkers included."""
    graph: dict[str, set[str]] = {name: set() for name in package}
    for source, imported in package.imports():
        if imported.target in package and imported.target != source.name:
            graph[source.name].add(imported.target)
            if imported.lazy or imported.typing_only:
                continue
            # The packages of that module are loaded too, unless the importing one sits in them.
            above = imported.target.rpartition(".")[0]
            while above and not f"{source.name}.".startswith(f"{above}."):
                graph[source.name].add(above)
                above = above.rpartition(".")[0]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def drawer_problems(package: Package) -> list[str]:
    """Modules named after nothing in particular."""
    vague = [name for name in package if name.rpartition(".")[2].strip("_") in DRAWERS]
    return [f"{name}: name it after what is in it" for name in vague]


def size_problems(package: Package) -> list[str]:
    """Files and functions that are too long to hold one idea."""
    found = []
    for source in package.values():
        if source.lines > MAX_FILE_LINES:
            found.append(f"{source.name}: {source.lines} lines, at most {MAX_FILE_LINES}")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    place = f"{source.name}:{node.lineno} {node.name}"
                    found.append(f"{place}: {length} lines, at most {MAX_FUNCTION_LINES}")
    return found


RULES: list[Callable[[Package], list[str]]] = [
    floor_problems,
    neighbour_problems,
    root_problems,
    owner_problems,
    backend_problems,
    cycle_problems,
    drawer_problems,
    size_problems,
]


def undocumented(names: Iterable[str], reference: str) -> list[str]:
    """Public names without an ``auto...`` directive of their own in the reference page."""
    shown = set(re.findall(rf"^\.\. auto\w+:: {PACKAGE}\.(\w+)$", reference, flags=re.MULTILINE))
    return sorted(set(names) - shown)


def loaded_by_import(folder: Path, name: str = PACKAGE) -> set[str]:
    """Which heavy packages an import loads in a fresh interpreter."""
    code = f"import sys, {name}; print(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return HEAVY & set(run.stdout.split())


# --- the package keeps the rules ---------------------------------------------------------------


@pytest.fixture(scope="module")
def package() -> Package:
    found = Package(ROOT)
    assert len(found) == len(list((ROOT / PACKAGE).rglob("*.py"))) > 1, "no modules were read"
    assert any(True for _ in found.imports()), "no imports were read"
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps(rule: Callable[[Package], list[str]], package: Package) -> None:
    problems = rule(package)
    assert not problems, f"{rule.__doc__}\n" + "\n".join(problems)


def test_every_public_name_is_in_the_reference() -> None:
    import lightning_peft

    names = [name for name in lightning_peft.__all__ if not name.startswith("__")]
    assert names, "nothing is public"
    missing = undocumented(names, (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"))
    assert not missing, f"add to docs/reference.md: {missing}"


@pytest.mark.parametrize("name", [PACKAGE, f"{PACKAGE}.engine", f"{PACKAGE}.compat"])
def test_importing_is_cheap(name: str) -> None:
    assert not loaded_by_import(ROOT, name)


# --- the rules can fail ------------------------------------------------------------------------


def make_package(folder: Path, files: dict[str, str]) -> Package:
    """Writes ``files`` (path below the package -> text) and parses the result."""
    for name, text in {"__init__.py": "", **files}.items():
        path = folder / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Package(folder)


STRING_CYCLE = {
    "engine/a.py": "from .b import x",
    "engine/b.py": "def f():\n    import_module('lightning_peft.engine.a')",
}
TYPING_CYCLE = {
    "engine/a.py": "from .b import x",
    "engine/b.py": "if TYPE_CHECKING:\n    from lightning_peft.engine.a import T",
}
MODULE_CYCLE = {"engine/a.py": "from .b import x", "engine/b.py": "import lightning_peft.engine.a"}
PACKAGE_CYCLE = {"engine/__init__.py": "from .a import x", "engine/a.py": "from . import y"}
ROOM_CYCLE = {
    "tasks/__init__.py": "from lightning_peft.data import a",
    "data/__init__.py": "from lightning_peft.tasks import b",
    **dict.fromkeys(["data/a.py", "tasks/b.py"], ""),
}
LONG_FUNCTION = "def f():\n" + "    x = 1\n" * 60
TYPED = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "

BROKEN = [
    (
        floor_problems,
        {"engine/a.py": "from lightning_peft.plugin import b"},
        "imports plugin",
    ),
    (floor_problems, {"engine/a.py": "def f():\n    import lightning_peft.cli"}, "imports cli"),
    (floor_problems, {"engine/a.py": "from ..plan.b import c"}, "engine imports plan"),
    (floor_problems, {"engine/a.py": "from .. import plan", "plan.py": ""}, "engine imports plan"),
    (floor_problems, {"plugin/a.py": "import_module('lightning_peft.tasks')"}, "imports tasks"),
    (floor_problems, {"attic/a.py": ""}, "'attic' is not in FLOORS"),
    (floor_problems, {"compat/torch.py": "from ..engine import a"}, "compat imports engine"),
    (neighbour_problems, {"tasks/a.py": "from lightning_peft.data.b import _c"}, "data.b._c"),
    (neighbour_problems, {"data/a.py": "from lightning_peft.tasks._b import c"}, "tasks._b.c"),
    (root_problems, {"cli.py": "from lightning_peft import QLoRAStrategy"}, "imports QLoRAStr"),
    (root_problems, {"engine/a.py": "import lightning_peft"}, "imports all from the root"),
    (root_problems, {"engine/a.py": "from .. import merge"}, "imports merge from the root"),
    (owner_problems, {"plugin/a.py": "from peft import LoraConfig"}, "only engine imports peft"),
    (backend_problems, {"cli.py": "def f():\n    import bitsandbytes"}, "imports bitsandbytes"),
    (backend_problems, {"engine/a.py": "import torchao.quantization"}, "imports torchao"),
    (backend_problems, {"engine/a.py": "x = y.weight.quant_state"}, "a:1: only lightning_peft.eng"),
    (backend_problems, {"plan/a.py": "getattr(x, 'quant_state', None)"}, "knows quant_state"),
    (backend_problems, {"engine/a.py": "isinstance(x, Params4bit)"}, "knows Params4bit"),
    (owner_problems, {"data.py": "from lightning_peft.compat.peft import a"}, "imports peft"),
    (owner_problems, {"compat/torch.py": "import peft"}, "only engine imports peft"),
    (owner_problems, {"engine/a.py": "from ..compat.lightning import b"}, "imports lightning"),
    (owner_problems, {"tasks/a.py": "import lightning.pytorch as pl"}, "only plugin imports lig"),
    (owner_problems, {"engine/a.py": "import pytorch_lightning"}, "imports pytorch_lightning"),
    (owner_problems, {"engine/a.py": TYPED + "import lightning"}, "only plugin imports lightning"),
    (owner_problems, {"data.py": "importlib.import_module('peft.tuners')"}, "imports peft"),
    (owner_problems, {"data.py": TYPED + "x = 1\nelse:\n    import peft"}, "imports peft"),
    (cycle_problems, MODULE_CYCLE, "lightning_peft.engine.a <- lightning_peft.engine.b"),
    (cycle_problems, STRING_CYCLE, "lightning_peft.engine.a <- lightning_peft.engine.b"),
    (cycle_problems, TYPING_CYCLE, "lightning_peft.engine.a <- lightning_peft.engine.b"),
    (cycle_problems, PACKAGE_CYCLE, "lightning_peft.engine"),
    (cycle_problems, ROOM_CYCLE, "lightning_peft.tasks"),
    (drawer_problems, {"engine/_utils.py": ""}, "lightning_peft.engine._utils"),
    (drawer_problems, {"plugin/common/__init__.py": ""}, "lightning_peft.plugin.common"),
    (size_problems, {"engine/a.py": "x = 1\n" * 401}, "401 lines, at most 400"),
    (size_problems, {"engine/a.py": LONG_FUNCTION}, "f: 61 lines, at most 60"),
]


@pytest.mark.parametrize(("rule", "files", "message"), BROKEN)
def test_rule_finds(
    rule: Callable[[Package], list[str]], files: dict[str, str], message: str, tmp_path: Path
) -> None:
    problems = rule(make_package(tmp_path, files))
    assert len(problems) == 1
    assert message in problems[0]


def test_rules_allow_what_the_design_allows(tmp_path: Path) -> None:
    files = {
        "__init__.py": "def __getattr__(name):\n    from lightning_peft import plugin",
        "cli.py": "from lightning_peft import demo, engine\nfrom lightning_peft.plugin import run",
        "demo/__init__.py": "",
        "tasks/a.py": TYPED + "from lightning.pytorch import LightningModule\n"
        "from lightning_peft.data.b import c",
        "data/b.py": "def f():\n    from lightning_peft.tasks import c",
        "tasks/c.py": "",
        "plugin/__init__.py": "import lightning\nfrom ..engine import _private",
        "engine/__init__.py": "from .a import f",
        "compat/lightning.py": "import pytorch_lightning",
        "engine/a.py": "import peft\nfrom lightning_peft.compat import peft\n# quant_state\n"
        "from .b import g\n" + TYPED + "from lightning_peft.demo import h",
        "engine/backends/b.py": "import bitsandbytes\nx.quant_state",
        "engine/b.py": "def f():\n    import peft\n" + "    x = 1\n" * 58,
        "errors.py": "x = 1\n" * 400,
    }
    package = make_package(tmp_path, files)
    assert len(package) == len(files)
    assert [problem for rule in RULES for problem in rule(package)] == []


def test_reference_needs_a_directive_for_each_name() -> None:
    page = "inject in prose\n.. autofunction:: lightning_peft.merge\n"
    assert undocumented(["inject", "merge", "mer"], page) == ["inject", "mer"]


def test_an_expensive_import_is_noticed(tmp_path: Path) -> None:
    make_package(tmp_path, {"__init__.py": "import peft"})
    (tmp_path / "peft.py").touch()
    assert loaded_by_import(tmp_path) == {"peft"}
