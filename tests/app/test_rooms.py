"""Holds the rooms of the page: only pages know of Gradio, and the web process stays light."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_architecture import (
    HEAVY,
    Package,
    cycle_problems,
    drawer_problems,
    inside,
    size_problems,
)

ROOT = Path(__file__).parents[2]
PAGE = "gradio_app"
# Who may import Gradio; all others can be tried without a browser.
SHOWN = {"pages", "assets", "serving", "app", "command"}
# What everyone may use, and who may use what else. Pages and the parts that join them use all.
GROUND = {"errors", "guards", "redaction", "settings", "texts", "uploads", "visitors"}
ROOMS: dict[str, set[str]] = {
    "runs": set(),
    "recipe": {"runs"},
    "chat": {"runs"},
    "export": {"runs", "recipe"},
    "compare": {"runs"},
    "experiments": {"runs", "recipe"},
}
# Of the library, what costs nothing to import.
LIGHT = {
    "lightning_peft.compat.gradio",
    "lightning_peft.arguments",
    "lightning_peft.chat.answer_scores",
    "lightning_peft.cli",
    "lightning_peft.cli.options",
    "lightning_peft.data.charsets",
    "lightning_peft.data.data_files",
    "lightning_peft.data.file_format",
    "lightning_peft.data.open_files",
    "lightning_peft.data.progress",
    "lightning_peft.json_equality",
    "lightning_peft.demo.real_base",
    "lightning_peft.errors",
    "lightning_peft.processes",
    "lightning_peft.runs.folder",
    "lightning_peft.export.loading_code",
    "lightning_peft.model_reference",
    "lightning_peft.task_registry",
    "lightning_peft.recipe_files",
    "lightning_peft.runs.status",
}


@pytest.fixture(scope="module")
def package() -> Package:
    found = Package(ROOT, PAGE)
    assert len(found) > 10
    return found


@pytest.mark.parametrize("rule", [cycle_problems, drawer_problems, size_problems])
def test_the_page_keeps_the_rules_of_the_library(rule, package):
    assert rule(package) == []


def test_only_what_is_shown_knows_of_gradio(package):
    found = [
        imported.place
        for source, imported in package.imports()
        if imported.target.split(".")[0] == "gradio" and source.room not in SHOWN
    ]
    assert found == []


def test_the_web_process_takes_only_light_parts_of_the_library(package):
    found = [
        f"{imported.place}: {imported.target}"
        for _, imported in package.imports()
        if inside(imported.target)
        and not imported.typing_only
        and imported.target not in LIGHT
        and f"{imported.target}.{imported.name}" not in LIGHT
        or imported.target.split(".")[0] in HEAVY - {"gradio"}
    ]
    assert found == []


def test_rooms_use_what_lies_below_them(package):
    found = []
    for source, imported in package.imports():
        parts = imported.target.split(".")
        if parts[0] != PAGE or source.room not in {*ROOMS, *GROUND}:
            continue
        room = parts[1] if len(parts) > 1 else imported.name
        if room not in {source.room, *GROUND, *ROOMS.get(source.room, set())}:
            found.append(f"{imported.place}: {source.room} imports {room}")
    assert found == []
