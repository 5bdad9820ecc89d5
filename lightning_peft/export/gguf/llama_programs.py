"""Conversion and quantization by the programs of llama.cpp."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

from lightning_peft.errors import ConfigError, similar_names
from lightning_peft.export.gguf.files import KINDS, gguf

PROGRAM = "llama-quantize"


def find_program(kind: str, given: str | None) -> str:
    """Returns llama.cpp's program for a kind that is not written here, ``given`` or on ``PATH``."""
    prefix = "MOSTLY_"
    names = [each.name.removeprefix(prefix).lower() for each in gguf().LlamaFileType]
    if kind not in names:
        raise ConfigError(
            f"outtype={kind!r} is not a type of GGUF files{similar_names(kind, names)}. Written "
            f"here: {', '.join(KINDS)}; by {PROGRAM} others, such as q4_k_m."
        )
    found = shutil.which(given or PROGRAM)
    if found is None:
        where = f"{given!r} is not a program here" if given else f"{PROGRAM} is not on PATH"
        raise ConfigError(
            f"outtype={kind!r} is written by llama.cpp's {PROGRAM} alone, and {where}. Install "
            f"llama.cpp, name the program by --llama-quantize, or write one of: {', '.join(KINDS)}."
        )
    return found


def quantize_file(program: str, source: Path, output: Path, kind: str) -> None:
    """Quantizes a GGUF file into another."""
    done = subprocess.run(
        [program, str(source), str(output), kind.upper()],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode or not output.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        reason = lines[-1] if lines else "it wrote nothing"
        raise ConfigError(
            f"{program} ended with exit code {done.returncode} for {kind.upper()}: {reason.strip()}"
        )


def converter_command(folder: Path) -> str:
    """Returns the command that makes a GGUF file of a model folder."""
    file = shlex.quote(f"{folder}-q8_0.gguf")
    return (
        f"python llama.cpp/convert_hf_to_gguf.py {shlex.quote(str(folder))} --outfile {file} "
        "--outtype q8_0"
    )
