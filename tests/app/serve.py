"""Starts a page for a test: ``serve.py FOLDER PORT OPTIONS``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from gradio_app import serving
from gradio_app.settings import Limits, Settings


def main() -> int:
    folder, port, options = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    trainer = options.pop("trainer", "real")
    if options.pop("space", False):
        settings = Settings.on_a_space(folder)
    else:
        settings = Settings.on_this_machine(folder / "runs", folder / "data", folder / "models")
    if trainer == "fake":
        fake = str(Path(__file__).with_name("fake_trainer.py"))
        settings = dataclasses.replace(settings, command=(sys.executable, fake))
    if "limits" in options:
        limits = dataclasses.replace(settings.limits, **options.pop("limits"))
        settings = dataclasses.replace(settings, limits=Limits(**dataclasses.asdict(limits)))
    password = options.pop("password", None)
    settings = dataclasses.replace(settings, **options)
    serving.build = _telling(serving.build, folder / "handlers.json")
    return serving.serve(settings, "127.0.0.1", port, ("studio", password) if password else None)


def _telling(build: Any, file: Path) -> Any:
    """Returns a builder of the pages that records which of their handlers are one function."""

    def built(studio: Any) -> Any:
        demo = build(studio)
        rows = [
            {
                "number": number,
                "function": id(one.fn),
                "name": one.fn.__qualname__,
                "page": one.page,
                "given": sum(not block.stateful for block in one.inputs),
            }
            for number, one in demo.fns.items()
            if one.fn is not None
        ]
        file.write_text(json.dumps(rows), encoding="utf-8")
        return demo

    return built


if __name__ == "__main__":
    sys.exit(main())
