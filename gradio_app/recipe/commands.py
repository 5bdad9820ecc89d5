"""A recipe as a command line and as equivalent Python code."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from gradio_app.recipe.content import class_name

FILE = "recipe.yaml"
_FOLDERS = {
    "package:": ("package", "package = Path(lightning_peft.__file__).parent"),
    "recipe:": ("recipes", "recipes = recipes_folder()"),
}
_INSTALLED = re.compile(r"installed:(\w+)/(.+)")
_WIDTH = 96


# Of the recipe that was downloaded.
COMMAND = f"lightning-peft fit --config {FILE}"


def python_code(content: dict[str, Any]) -> str:
    """Returns a program that trains as the recipe does."""
    return _Program().text(content)


class _Program:
    def __init__(self) -> None:
        self.imports: dict[str, set[str]] = defaultdict(set)
        self.folders: set[str] = set()

    def text(self, content: dict[str, Any]) -> str:
        trainer = content.get("trainer") or {}
        lines = [
            f"model = {self._value(content['model'], 0)}",
            f"data = {self._value(content['data'], 0)}",
            f"trainer = {self._call('Trainer', trainer, 0)}",
            "trainer.fit(model, datamodule=data)",
        ]
        self.imports["lightning.pytorch"].add("Trainer")
        seed = content.get("seed_everything", True)
        if seed is not False:
            self.imports["lightning.pytorch"].add("seed_everything")
            given = "" if seed is True or seed is None else str(seed)
            lines.insert(0, f"seed_everything({given})")
        return "\n".join([*self._head(), "", *lines]) + "\n"

    def _head(self) -> list[str]:
        head = []
        if "package:" in self.folders:
            head += ["from pathlib import Path", "", "import lightning_peft"]
        if "recipe:" in self.folders:
            self.imports["lightning_peft.recipe_files"].add("recipes_folder")
        for module in sorted(self.imports):
            head.append(f"from {module} import {', '.join(sorted(self.imports[module]))}")
        made = [line for mark, (_, line) in _FOLDERS.items() if mark in self.folders]
        return head + ([""] if made else []) + made

    def _value(self, value: Any, depth: int) -> str:
        if isinstance(value, dict) and "class_path" in value:
            module, _, _ = value["class_path"].rpartition(".")
            self.imports[module].add(class_name(value))
            return self._call(class_name(value), value.get("init_args") or {}, depth)
        if isinstance(value, list) and any(isinstance(one, dict) for one in value):
            inside = "    " * (depth + 1)
            rows = "".join(f"{inside}{self._value(one, depth + 1)},\n" for one in value)
            return f"[\n{rows}{'    ' * depth}]"
        if isinstance(value, str):
            return self._place(value)
        return repr(value)

    def _place(self, text: str) -> str:
        installed = _INSTALLED.fullmatch(text)
        if installed is not None:
            self.imports["lightning_peft.recipe_files"].add("installed_folder")
            return f"str(installed_folder({installed[1]!r}) / {installed[2]!r})"
        for mark, (name, _) in _FOLDERS.items():
            if text.startswith(mark):
                self.folders.add(mark)
                return f"str({name} / {text.removeprefix(mark)!r})"
        return repr(text)

    def _call(self, name: str, arguments: dict[str, Any], depth: int) -> str:
        given = {
            key: self._value(value, depth + 1)
            for key, value in arguments.items()
            # Empty init_args are none.
            if not (key == "callbacks" and not value)
        }
        line = f"{name}({', '.join(f'{key}={value}' for key, value in given.items())})"
        if len(line) + 4 * depth <= _WIDTH - 16 and "\n" not in line:
            return line
        inside = "    " * (depth + 1)
        rows = "".join(f"{inside}{key}={value},\n" for key, value in given.items())
        return f"{name}(\n{rows}{'    ' * depth})"
