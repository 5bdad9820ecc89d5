"""A folder that is there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_peft.errors import ConfigError


def check_output_free(output: Path) -> None:
    """Refuses a place where something is.

    Raises:
        ConfigError: If ``output`` is a file, or a folder that is not empty.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ConfigError(
            f"The output {str(output)!r} is there already. Remove it, or name another."
        )


@contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """Yields an unfinished folder that becomes ``output`` if the body succeeds.

    What processes left that were killed while they wrote the same folder is removed.

    Raises:
        ConfigError: If ``output`` is there already.
    """
    check_output_free(output)
    unfinished = output.with_name(f".incomplete-{os.getpid()}-{output.name}")
    for left in output.parent.glob(f".incomplete-*-{output.name}"):
        shutil.rmtree(left, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if output.is_dir():
            output.rmdir()
        os.replace(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
