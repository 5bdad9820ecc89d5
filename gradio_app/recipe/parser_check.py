"""The last word on a recipe: the command line's own parser, which knows every argument."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradio_app.recipe.command_worker import CommandWorker
from gradio_app.recipe.preview import error_message
from gradio_app.recipe.yaml_text import dump_yaml

SECONDS = 120.0


def parser_error(
    content: dict[str, Any], worker: CommandWorker, still_needed: Callable[[], bool] | None = None
) -> str:
    """Returns the error of ``lightning-peft fit`` for a checked recipe; empty if there is none.

    Nothing is made and nothing is loaded: only names, kinds and values of arguments are checked.
    """
    with tempfile.TemporaryDirectory(prefix="studio-") as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(dump_yaml(content), encoding="utf-8")
        answer = worker.run(["fit", f"--config={file}", "--print_config"], SECONDS, still_needed)
    if answer.code == 0:
        return ""
    return error_message(answer) or "-"
