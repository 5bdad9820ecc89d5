"""``lightning-peft recipes``: list, show and copy the packaged configs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yaml import safe_load

from lightning_peft.cli.options import command_parser
from lightning_peft.cli.output import print_json, print_table
from lightning_peft.errors import ConfigError
from lightning_peft.recipe_files import find_recipe, recipe_files, recipes_folder, resolved

ABOUT = "List, show and copy the recipes: configs for `lightning-peft fit`."
_MORE = """\
Recipes called small/... are laid over another one for a trial that runs offline in less than a
minute: lightning-peft fit --config sft-qlora --config small/sft. The memory in the list is that of
the small trial; `lightning-peft plan` says what your model needs.

exit code: 0, or 2 for a name that is none
"""
# Made by benchmarks/recipes.py.
_RESULTS = "results.json"


def measured() -> dict[str, dict[str, Any]]:
    """Returns the measured results of the recipes' small trials, by the name of the recipe."""
    file = recipes_folder() / _RESULTS
    if not file.is_file():
        return {}
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return {row["recipe"]: row for row in rows if row["method"] != "full"}


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = command_parser("recipes", ABOUT, _MORE)
    commands = parser.add_subparsers(dest="command")
    show = commands.add_parser("show", help="print a recipe")
    show.add_argument("name")
    copy = commands.add_parser("copy", help="copy a recipe to a file of your own")
    copy.add_argument("name")
    copy.add_argument("file", type=Path)
    args = parser.parse_args(list(arguments))
    if args.command == "show":
        print(find_recipe(args.name).read_text(encoding="utf-8"), end="")
    elif args.command == "copy":
        _copy(find_recipe(args.name), args.file)
    else:
        _list(args.json)
    return 0


def _copy(recipe: Path, file: Path) -> None:
    if file.exists():
        raise ConfigError(f"{str(file)!r} is there already, and is left alone. Name another file.")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(resolved(recipe), encoding="utf-8")
    print(f"{file}  (lightning-peft fit --config {file})")


def _list(as_json: bool) -> None:
    results = measured()
    rows = [_row(name, file, results.get(name)) for name, file in recipe_files().items()]
    if as_json:
        print_json(rows)
    else:
        print_table([{name: str(cell or "-") for name, cell in row.items()} for row in rows])


def _row(name: str, file: Path, result: dict[str, Any] | None) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8")
    content = safe_load(text)
    model = content.get("model", {})
    strategy = content.get("trainer", {}).get("strategy", {})
    comments = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
    return {
        "name": name,
        "task": str(model.get("class_path", "")).rpartition(".")[2] or None,
        "method": str(strategy.get("class_path", "")).rpartition(".")[2] or None,
        "model": model.get("init_args", {}).get("model"),
        "memory": result and memory_text(result),
        "small trial": result and result_text(result),
        "about": " ".join(comments).partition(". ")[0].rstrip(".") + ".",
    }


def memory_text(result: dict[str, Any]) -> str:
    """Returns the peak memory of the small trial."""
    peak = result.get("peak_memory", {}).get("process_bytes")
    return f"{peak / 1e6:,.0f} MB" if peak else "-"


def result_text(result: dict[str, Any]) -> str:
    """Returns the metric of the small trial before and after, or why there is none."""
    if "error" in result:
        return str(result["error"])
    name = result["metric"]
    before, after = result["before"].get(name), result["after"][name]
    return f"{name} {'-' if before is None else f'{before:.3g}'} to {after:.3g}"
