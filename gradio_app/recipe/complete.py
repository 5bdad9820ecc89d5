"""The last word on a recipe: the command line's own parser, which knows every argument."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradio_app.recipe.data import said
from gradio_app.recipe.parsing import dumped
from gradio_app.recipe.warm import WarmCommands

SECONDS = 120.0


def completed_problem(
    content: dict[str, Any], warm: WarmCommands, wanted: Callable[[], bool] | None = None
) -> str:
    """Returns what ``lightning-peft fit`` says against a checked recipe; empty if nothing.

    Nothing is made and nothing is loaded: only names, kinds and values of arguments are checked.

    Args:
        content: The recipe.
        warm: What runs the command.
        wanted: Says whether the answer is still wanted.
    """
    with tempfile.TemporaryDirectory(prefix="studio-") as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(dumped(content), encoding="utf-8")
        answer = warm.run(["fit", f"--config={file}", "--print_config"], SECONDS, wanted)
    if answer.code == 0:
        return ""
    return said(answer) or "-"
