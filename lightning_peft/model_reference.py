"""Model references: a hub name, a folder, or a GGUF file in either.

| written | meaning |
| --- | --- |
| `org/model`, `folder` | what transformers takes |
| `folder/model.Q4_K_M.gguf` | a GGUF file |
| `org/model-GGUF:model.Q4_K_M.gguf`, `folder:model.gguf` | a GGUF file of a repository or folder |
| `folder` with one GGUF file and no other weights | that file |
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from lightning_peft.errors import ConfigError, UnsupportedError, itemize

SUFFIX = ".gguf"
# What else a folder may hold weights in; then GGUF files do not count.
_OTHER_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin")
# What makes a folder of several GGUF files a tokenizer or a config of its own.
_OWN_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
# Two letters at least before the colon: `C:\models\x.gguf` is a path. `installed:` is a mark of
# recipes.
_FILE_OF_PLACE = re.compile(
    r"(?!installed:)(?P<place>.{2,}):(?P<file>[^:]+\.gguf)", re.IGNORECASE | re.DOTALL
)
_HUB_PATH = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[^:]+\.gguf)", re.IGNORECASE)


@dataclass(frozen=True)
class ModelReference:
    """A model by name, as the user wrote it."""

    name: str
    # Folder, or name on the hub.
    place: str
    # Path of a GGUF file in it, if it is one.
    gguf_file: str | None = None

    @property
    def local_file(self) -> Path | None:
        """The GGUF file, where it is in a folder of this machine."""
        if self.gguf_file is None or not Path(self.place).is_dir():
            return None
        return Path(self.place) / self.gguf_file


def written_reference(name: str | os.PathLike[str]) -> ModelReference:
    """Parses the name of a model without a look at this machine: a folder stands for itself."""
    text = os.fspath(name)
    written = _FILE_OF_PLACE.fullmatch(text)
    if written is not None:
        return ModelReference(text, written["place"], written["file"])
    if text.lower().endswith(SUFFIX):
        return ModelReference(text, os.path.dirname(text) or ".", os.path.basename(text))
    return ModelReference(text, text)


def parse_model_reference(name: str | os.PathLike[str]) -> ModelReference:
    """Parses the name of a model. Nothing is read but the list of a folder.

    Raises:
        ConfigError: If a GGUF file is not there, or a folder holds several and none is named.
        UnsupportedError: If it is one part of a split model, or not a language model.
    """
    found = written_reference(name)
    text, place = found.name, found.place
    if found.gguf_file is None:
        found = ModelReference(text, place, _only_gguf_file(text))
    elif os.path.isfile(text):
        # A colon may be part of a path.
        found = ModelReference(text, os.path.dirname(text) or ".", os.path.basename(text))
    else:
        of_hub = text == f"{place}:{found.gguf_file}" and not os.path.isdir(place)
        if not of_hub and not (Path(place) / str(found.gguf_file)).is_file():
            raise _not_there(found)
    if found.gguf_file is not None:
        _refuse_part(found)
    return found


def gguf_files(folder: str | os.PathLike[str]) -> list[str]:
    """Returns the names of the GGUF files in a folder, without projectors, in order."""
    place = Path(folder)
    if not place.is_dir():
        return []
    files = (path for path in place.iterdir() if path.suffix.lower() == SUFFIX and path.is_file())
    return sorted(path.name for path in files if "mmproj" not in path.name.lower())


def _only_gguf_file(place: str) -> str | None:
    folder = Path(place)
    if not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in _OTHER_WEIGHTS):
        return None
    files = gguf_files(folder)
    if len(files) > 1 and any((folder / name).is_file() for name in _OWN_FILES):
        return None
    if len(files) > 1:
        raise ConfigError(
            f"{place!r} holds {len(files)} GGUF files, and none is named. Name one of them, as in "
            f"{os.path.join(place, files[0])!r}:" + itemize(files)
        )
    return files[0] if files else None


def _not_there(reference: ModelReference) -> ConfigError:
    place, there = reference.place, gguf_files(reference.place)
    if there:
        known = f" {place!r} holds:" + itemize(there)
    elif os.path.isdir(place):
        known = f" There is not a single GGUF file in {place!r}."
    else:
        known = f" {place!r} is not a folder of this machine."
        on_hub = _HUB_PATH.fullmatch(reference.name)
        if on_hub:
            known += f" For a repository of the hub, write {on_hub['repo']}:{on_hub['file']}."
    return ConfigError(f"{reference.name!r} is not a GGUF file that is there.{known}")


def _refuse_part(reference: ModelReference) -> None:
    file = str(reference.gguf_file)
    if _SPLIT.search(file):
        raise UnsupportedError(
            f"{reference.name!r} is one part of a model that is split into several GGUF files, "
            "and transformers reads a model from one file. Join them by llama.cpp's own program: "
            f"llama-gguf-split --merge {file} joined.gguf"
        )
    if "mmproj" in os.path.basename(file).lower():
        others = gguf_files(reference.place)
        raise UnsupportedError(
            f"{reference.name!r} is the projector of a vision model (mmproj), not a language "
            "model. Name the file with the language model"
            + (":" + itemize(others) if others else ".")
        )
