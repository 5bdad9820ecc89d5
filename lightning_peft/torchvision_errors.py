"""Errors of a torchvision built for another torch version."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec


def install_command() -> str:
    """Returns the command that installs torchvision for the installed torch, and keeps that."""
    return f'pip install torchvision "torch=={version("torch")}"'


def loading_problem(error: BaseException | None) -> str | None:
    """Returns that torchvision does not load, and what to do; ``None`` where ``error`` is another.

    transformers raises errors of its own for what torchvision raises, such as "Could not import
    module 'AutoProcessor'", with the first one as their cause.
    """
    reason = ""
    while error is not None:
        reason = str(error) if "torchvision" in str(error) else reason
        error = error.__cause__ or error.__context__
    # Where it is absent, the error may ask for it.
    if not reason or find_spec("torchvision") is None:
        return None
    try:
        import_module("torchvision")
    except Exception:
        return (
            f"torchvision {version('torchvision')} does not load with torch {version('torch')} "
            f"({reason}), and transformers loads it wherever it is installed. It was built for "
            "another torch, or for CUDA where this torch is for CPUs. Remove it: pip uninstall "
            "torchvision. Where images need it, install the one for this torch then, from the "
            f"same index as torch: {install_command()}"
        )
    return None
