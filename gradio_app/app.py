"""Entry point of a Hugging Face Space, in the folder written by ``make space``."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Where a bucket is mounted if the Space has one. Without, runs end with the machine of the Space.
STORAGE = Path("/data")
# Packages that come with the repository: the model of the two-minute run.
PACKAGES = HERE / "packages"


def this_folder_as_package() -> Any:
    """Returns this folder as the package ``gradio_app``, whatever the folder is called.

    On a Space it is the root of the repository, and what is deployed must be what runs, also where
    another release of the page came with ``lightning-peft``.
    """
    spec = importlib.util.spec_from_file_location(
        "gradio_app", HERE / "__init__.py", submodule_search_locations=[str(HERE)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["gradio_app"] = package
    spec.loader.exec_module(package)
    return package


def main() -> int:
    """Serves the page: with a Space's rules on a Space, else as ``lightning-peft app`` does."""
    this_folder_as_package()
    if PACKAGES.is_dir():
        sys.path.append(str(PACKAGES))
        # Runs are processes of their own.
        found = (os.environ.get("PYTHONPATH"), str(PACKAGES))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, found))
    from gradio_app.serving import serve
    from gradio_app.settings import Settings, is_space

    if not is_space():
        from lightning_peft.cli import main as command_line

        return command_line(["app", *sys.argv[1:]])
    storage = STORAGE if os.access(STORAGE, os.W_OK) else HERE / "storage"
    # As Gradio calls them.
    host = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0")
    port = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    return serve(Settings.on_a_space(storage / "studio"), host, port)


if __name__ == "__main__":
    sys.exit(main())
