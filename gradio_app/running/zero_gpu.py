"""Runs on a Space with ZeroGPU, which lends a GPU for one call of one function.

A process of its own would have no GPU, so the command line runs inside that call, and writes the
folder of the run as always; the page reads it there. A visitor's quota pays for as many seconds as
are asked for, so what cannot run is refused before.

Nothing here could be run on ZeroGPU itself.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

# More is beyond what visitors who are not signed in may ask for at once.
MOST_SECONDS = 120


def train(folder: str) -> int:
    """Runs the recipe in a run's folder in this process.

    Args:
        folder: The folder, with its ``recipe.yaml``.

    Returns:
        The exit code of ``lightning-peft fit``.
    """
    recipe = Path(folder) / "recipe.yaml"
    main = import_module("lightning_peft.cli").main
    return int(main(["fit", f"--config={recipe}", f"--run_dir={folder}"]))


def lent(seconds: float) -> Callable[[str], int]:
    """Returns :func:`train` as a call that is lent a GPU.

    Args:
        seconds: For how long, at most :data:`MOST_SECONDS`.
    """
    gpu = import_module("spaces").GPU
    decorated: Callable[[str], int] = gpu(duration=round(min(seconds, MOST_SECONDS)))(train)
    return decorated
