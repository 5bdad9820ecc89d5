"""API endpoints with plain values, for ``gradio_client`` or plain HTTP.

Everything else that the pages do is private to them. An endpoint checks what it gets as a page
does, and sees the runs of whoever calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import gradio as gr
import yaml

from gradio_app.errors import UserError
from gradio_app.guards import checked_run_id, shortened
from gradio_app.pages.error_reporting import report_errors
from gradio_app.recipe.validation import remote_code_model, validate_recipe
from gradio_app.redaction import Redactor
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from lightning_peft.recipe_files import recipe_files

# Most rows that one call returns; the next one requests those after them.
MAX_ROWS = 1000


def declare(studio: Studio, t: Texts) -> None:
    """Declares the endpoints, within the open Blocks."""
    for endpoint in (*_about_recipes(studio), *_about_runs(studio)):
        gr.api(report_errors(t)(endpoint), api_name=endpoint.__name__)


def _about_recipes(studio: Studio) -> tuple[Callable[..., Any], ...]:
    def checked(recipe: str, confirmed: object, owner: str) -> dict[str, Any]:
        content = validate_recipe(recipe, studio.settings, owner)
        name = remote_code_model(content)
        # As on the page: what somebody else wrote is not permission to run code.
        if name is not None and confirmed != name:
            raise UserError("checks.remote_named", name=shortened(name))
        return content

    def recipes() -> dict[str, str]:
        """Returns the YAML of every recipe, by name."""
        return {name: file.read_text("utf-8") for name, file in recipe_files().items()}

    def check(recipe: str, request: gr.Request, trust_remote_code_of: str = "") -> dict[str, Any]:
        """Returns a recipe as it would be run, or says all that is wrong with it.

        One that runs the code of a model needs the name of the model in the last argument.
        """
        content = checked(recipe, trust_remote_code_of, studio.owner(request))
        redactor = Redactor(studio.settings)
        return redactor.value(content, redactor.portable)

    def start(recipe: str, name: str, request: gr.Request, trust_remote_code_of: str = "") -> str:
        """Puts a run of a recipe into the line, and returns its id.

        One that runs the code of a model needs the name of the model in the last argument.
        """
        owner = studio.owner(request)
        content = checked(recipe, trust_remote_code_of, owner)
        return studio.start(owner, yaml.safe_dump(content, sort_keys=False), name).id

    return recipes, check, start


def _about_runs(studio: Studio) -> tuple[Callable[..., Any], ...]:
    def found(run: str, request: gr.Request) -> Any:
        return studio.run(request, checked_run_id(run))

    def runs(request: gr.Request) -> list[dict[str, Any]]:
        """Returns the runs of the caller, the newest first."""
        return [
            {"run": one.id, "name": one.name, "state": one.status.state}
            for one in studio.store.list(studio.owner(request))
        ]

    def status(run: str, request: gr.Request) -> dict[str, Any]:
        """Returns where a run is, as docs/runs.md describes ``status.json``."""
        return asdict(found(run, request).status)

    def metrics(run: str, after: int, request: gr.Request) -> list[dict[str, Any]]:
        """Returns logged rows of a run from row ``after`` on, at most a thousand."""
        one = found(run, request)
        rows = list(one.folder.rows(one.folder.metrics))
        start = max(int(after), 0)
        return one.redactor.value(rows[start : start + MAX_ROWS])

    def stop(run: str, request: gr.Request) -> dict[str, Any]:
        """Ends a run after its step and saves it; takes a waiting one out of the line."""
        one = found(run, request)
        return asdict(studio.queue.stop(one.owner, one.id).status)

    return runs, status, metrics, stop
