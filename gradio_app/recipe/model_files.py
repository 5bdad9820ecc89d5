"""Model metadata from files: problems, size and custom code, without loading weights."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from gradio_app.errors import UserError
from gradio_app.guards import shortened
from gradio_app.recipe.gguf_header import gguf_header
from gradio_app.runs.files import read_json_object
from lightning_peft.demo.real_base import SMOLLM2_PLACE, absence_of_smollm2

_INDEX = "model.safetensors.index.json"
# Projectors of vision models, and parts of models.
_OTHER_GGUF = re.compile(r"mmproj|-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def hub_cache() -> Path:
    """Returns the folder in which models of the hub are kept."""
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def cached_folder(name: str, revision: str | None = None) -> Path | None:
    """Returns the folder of a model of the hub; ``None`` if it is not on this machine.

    ``name`` and ``revision`` have been checked; without a revision, the newest that was fetched.
    """
    place = hub_cache() / f"models--{name.partition(':')[0].replace('/', '--')}"
    at = revision or "main"
    reference = place / "refs" / at
    try:
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else at
    except (OSError, UnicodeDecodeError):
        return None
    folder = place / "snapshots" / commit
    return folder if re.fullmatch(r"[\w.-]+", commit) and folder.is_dir() else None


def is_cached(name: str, weights: bool = True) -> bool:
    """Whether this machine has a model: in the hub's cache, or the demo's real one.

    Checking data fetches the tokenizer alone: without ``weights``, that is enough.
    """
    if name == SMOLLM2_PLACE:
        return absence_of_smollm2() is None
    repository, _, file = name.partition(":")
    snapshots = hub_cache() / f"models--{repository.replace('/', '--')}" / "snapshots"
    if ".." in file:
        # Of a recipe that was not checked.
        return False
    if file or not weights:
        return any(snapshots.glob(f"*/{file or '*'}"))
    return any(map(_has_weights, snapshots.glob("*")))


def _has_weights(folder: Path) -> bool:
    if indexed := _indexed_files(folder):
        return all((folder / file).is_file() for file in indexed)
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", *_PICKLES))


def cache_disk() -> Path:
    """Returns a folder on the disk on which models of the hub are kept."""
    place = hub_cache()
    while not place.exists():
        place = place.parent
    return place


def free_bytes() -> int:
    """Returns how much of the disk is free on which models of the hub are kept."""
    return shutil.disk_usage(cache_disk()).free


def remote_code_files(folder: Path) -> list[str]:
    """Returns the files of code that a model cannot do without; none if transformers knows it."""
    config = read_json_object(folder / "config.json")
    named = config.get("auto_map")
    if not isinstance(named, dict) or _in_transformers(config.get("model_type")):
        return []
    values = [one for value in named.values() for one in _as_list(value) if isinstance(one, str)]
    # `namespace/name--module.Class` is in another repository.
    files = {value.rpartition("--")[2].partition(".")[0] + ".py" for value in values}
    return sorted(shortened(file) for file in files) or ["auto_map"]


def validate_folder(folder: Path) -> None:
    """Refuses a folder that holds no whole model, with what is missing or damaged."""
    name = folder.name
    config = read_json_object(folder / "config.json")
    kind = config.get("model_type")
    if not config:
        raise UserError("checks.folder_config", path=shortened(name))
    if not remote_code_files(folder) and not _in_transformers(kind):
        raise UserError("checks.folder_kind", path=shortened(name), kind=shortened(kind))
    missing = [file for file in _indexed_files(folder) if not (folder / file).is_file()]
    if missing:
        raise UserError("checks.folder_missing", path=shortened(name), file=shortened(missing[0]))
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        pickled = any(file for pattern in _PICKLES for file in folder.glob(pattern))
        key = "checks.folder_pickled" if pickled else "checks.folder_empty"
        raise UserError(key, path=shortened(name))
    for file in found:
        if tensor_sizes(file) is None:
            raise UserError(
                "checks.folder_damaged", path=shortened(name), file=shortened(file.name)
            )


def validate_gguf(file: Path) -> None:
    """Refuses a GGUF file that does not begin as one."""
    try:
        with file.open("rb") as opened:
            whole = opened.read(4) == b"GGUF"
    except OSError:
        whole = False
    if not whole:
        name = shortened(file.name)
        raise UserError("checks.folder_damaged", path=shortened(file.parent.name), file=name)


def model_places(root: Path) -> list[str]:
    """Returns the models below ``root`` by name: subfolders, and GGUF files of one part."""
    found = {path.parent for path in (*root.glob("*/config.json"), *root.glob("*/*/config.json"))}
    for pattern in ("*.gguf", "*/*.gguf", "*/*/*.gguf"):
        found |= {path for path in root.glob(pattern) if not _OTHER_GGUF.search(path.name)}
    return sorted(path.relative_to(root).as_posix() for path in found)


def weight_bytes(folder: Path) -> int:
    """Returns how large the files with a model's weights are."""
    if folder.is_file():
        return folder.stat().st_size
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@dataclass(frozen=True)
class ModelInfo:
    """Properties of a model by its files; ``None`` or empty where they are unknown.

    ``parameters`` counts the values of its weight files; ``context`` is the most tokens it takes.
    """

    architecture: str
    parameters: int | None
    context: int | None
    dtype: str
    has_chat_template: bool


def model_info(folder: Path) -> ModelInfo:
    """Returns the properties of a model by the files in its folder, or by its GGUF file."""
    if folder.is_file():
        header = gguf_header(folder)
        values = sum(header.sizes) or None
        named = shortened(header.architecture)
        return ModelInfo(named, values, header.context, "GGUF", header.has_chat_template)
    config = read_json_object(folder / "config.json")
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    names = _as_list(config.get("architectures") or config.get("model_type") or "")
    context = (text or config).get("max_position_embeddings")
    dtype = next((config[key] for key in ("dtype", "torch_dtype") if config.get(key)), "")
    has_chat_template = (folder / "chat_template.jinja").is_file() or bool(
        read_json_object(folder / "tokenizer_config.json").get("chat_template")
    )
    counts = [tensor_sizes(file) or () for file in folder.glob("*.safetensors")]
    known = sum(map(sum, counts)) if counts and all(counts) else None
    # Packed numbers are fewer than what they stand for.
    parameters = None if config.get("quantization_config") else known
    whole = context if isinstance(context, int) else None
    return ModelInfo(shortened(names[0]), parameters, whole, shortened(dtype), has_chat_template)


def tensor_sizes(file: Path) -> list[int] | None:
    """Returns the number of values of each tensor in a file; ``None`` if it is not a whole one."""
    try:
        # By the header alone, whose length the file must have.
        with safe_open(file, "np") as opened:
            names = opened.keys()
            return [prod(opened.get_slice(name).get_shape()) for name in names]
    except (OSError, SafetensorError):
        return None


def _indexed_files(folder: Path) -> list[str]:
    """Returns the files that the weights are said to be in; none where nothing is said."""
    names = read_json_object(folder / _INDEX, "weight_map").values()
    return sorted({name for name in names if isinstance(name, str) and "/" not in name})


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _in_transformers(kind: object) -> bool:
    """Whether transformers has code of its own for a kind of model."""
    return isinstance(kind, str) and (kind in _model_types() or not _model_types())


@cache
def _model_types() -> frozenset[str]:
    """Returns the kinds of models that stand in transformers' tables, which is not imported.

    A few other words are among them.
    """
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return frozenset()
    folder = Path(spec.origin).parent / "models" / "auto"
    files = [folder / name for name in ("configuration_auto.py", "auto_mappings.py")]
    texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    return frozenset(re.findall(r'"([a-z][\w.-]*)"', "".join(texts)))
