"""Base model on disk: files, tensors and meta model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from lightning_peft import engine
from lightning_peft.compat.transformers import tied_weights
from lightning_peft.errors import (
    CheckpointError,
    ConfigError,
    UnsupportedError,
    first_line,
    itemize,
)
from lightning_peft.export.file_layout import FileLayout, StoredTensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Weights in a file, where this package chooses.
_SHARD_BYTES = 5_000_000_000
# What a model folder has besides weights.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "README.md", "LICENSE*")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass
class Base:
    """A base model as files.

    ``shards`` are, by file name, the tensors in it; of a ``gguf`` file, how they would be stored.
    """

    name: str
    folder: Path
    config: Any
    shards: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    gguf: engine.GgufModel | None = None

    @cached_property
    def keys(self) -> dict[str, StoredTensor]:
        """All tensors by their names in the files."""
        return {key: stored for shard in self.shards.values() for key, stored in shard.items()}

    @cached_property
    def gguf_tensors(self) -> dict[str, Any]:
        """The tensors of the GGUF file by their names in the model; empty without one."""
        return {} if self.gguf is None else engine.gguf_tensors(self.gguf, make_outline(self, None))

    def layout(self, outline: nn.Module) -> FileLayout:
        """Returns how the tensors of the model are laid out in the files."""
        return FileLayout(self.name, self.keys, outline)

    def tensors(self, keys: list[str]) -> Iterator[Tensor]:
        """Yields tensors, of mapped files; those of a GGUF file are dequantized one by one."""
        if self.gguf is not None:
            yield from (self.gguf_tensors[key][...] for key in keys)
            return
        where = {key: name for name, shard in self.shards.items() for key in shard}
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            for key in keys:
                name = where[key]
                if name not in files:
                    opened = safe_open(self.folder / name, framework="pt")
                    files[name] = stack.enter_context(opened)
                yield files[name].get_tensor(key)


def find_base(name: str, revision: str | None = None) -> Base:
    """Returns a base model by folder, by its name on the hub, or by GGUF file."""
    gguf = engine.find_gguf(name, revision)
    if gguf is not None:
        made = Base(name, gguf.folder, engine.load_config(name, revision=revision), gguf=gguf)
        made.shards = _shards(made.gguf_tensors)
        return made
    folder = Path(name) if Path(name).is_dir() else _from_hub(name, revision)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{name!r} is not a transformers model that can be read: {first_line(error)}"
        ) from error
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        raise UnsupportedError(
            f"The files of {name!r} are quantized already ({_method(quantized)}), and an adapter "
            "is merged into weights of 16 or 32 bits. Give the model that it was made from by "
            "--base."
        )
    return Base(name, folder, config, {file: _header(folder / file) for file in _files(folder)})


def _shards(tensors: Mapping[str, Any]) -> dict[str, dict[str, StoredTensor]]:
    """Shares tensors out over files that ``from_pretrained`` reads, in their order."""
    groups: list[dict[str, StoredTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        stored = StoredTensor(tensor.dtype, tensor.shape)
        size += stored.numel * stored.dtype.itemsize
        if size > _SHARD_BYTES and groups[-1]:
            groups.append({})
            size = stored.numel * stored.dtype.itemsize
        groups[-1][name] = stored
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    total = len(groups)
    return {
        f"model-{number:05d}-of-{total:05d}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def _from_hub(name: str, revision: str | None) -> Path:
    patterns = ["*.safetensors", *COMPANIONS]
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns)
    except (OSError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"The base {name!r} is not a folder here, and the hub did not give it "
            f"({first_line(error)}). Check the name and the network (HF_HUB_OFFLINE must not be "
            "set), or name a folder."
        ) from error
    return Path(folder)


def _method(settings: Any) -> Any:
    fields = settings if isinstance(settings, dict) else vars(settings)
    return getattr(fields.get("quant_method"), "value", fields.get("quant_method"))


def _files(folder: Path) -> list[str]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{str(index)!r} is not an index of shards: {error!r}") from error
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise CheckpointError(
                f"{str(index)!r} names files that are not there:" + itemize(absent)
            )
        return names
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    raise UnsupportedError(
        f"{str(folder)!r} holds no {WEIGHTS} and no index of shards. Pickled weights (.bin) can "
        "run code when they are read: convert them with transformers' save_pretrained where you "
        "trust their source."
    )


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            return {
                key: StoredTensor(DTYPES[part.get_dtype()], tuple(part.get_shape()))
                for key, part in slices.items()
            }
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(
            f"{str(file)!r} is not a complete safetensors file ({error}). It was cut short, or is "
            "another format; fetch it again."
        ) from error


def make_outline(base: Base, class_name: str | None, labels: int | None = None) -> nn.Module:
    """Returns the model of ``base`` on the meta device, in the class trained or the config's.

    ``labels`` are outputs of the classification head, where the class has one.
    """
    listed = list(getattr(base.config, "architectures", None) or [])
    classes = [getattr(transformers, name, None) for name in (class_name, *listed) if name]
    cls = next((c for c in classes if isinstance(c, type) and issubclass(c, PreTrainedModel)), None)
    if cls is None:
        raise UnsupportedError(
            f"{base.name!r} is a {class_name or ', '.join(listed) or 'model of an unnamed class'}, "
            "which transformers itself does not have, so its weights cannot be merged file by "
            "file. In Python: lightning_peft.load_adapter, lightning_peft.merge and "
            "lightning_peft.unload on the module."
        )
    base.config.architectures = [cls.__name__]
    if labels is not None and labels != getattr(base.config, "num_labels", None):
        base.config.num_labels = labels
    with torch.device("meta"):
        model: Any = cls(base.config)
    model.tie_weights()
    _untie(model, base)
    outline: nn.Module = model.eval()
    return outline


def _untie(model: Any, base: Base) -> None:
    """Separates tied tensors of which the files hold different values, as transformers does."""
    tied = tied_weights(model)
    if base.gguf is not None or not tied:
        return
    in_files = base.layout(model).by_name
    for target, source in list(tied.items()):
        keys = [in_files[name].keys[0] for name in (target, source) if name in in_files]
        if len(keys) < 2:
            continue
        one, other = base.tensors(keys)
        if torch.equal(one, other.to(one.dtype)):
            continue
        owner, _, leaf = target.rpartition(".")
        own = nn.Parameter(torch.empty_like(model.get_parameter(target)))
        setattr(model.get_submodule(owner), leaf, own)
        del tied[target]
        if not tied:
            base.config.tie_word_embeddings = False


def license_of(folder: Path) -> str | None:
    """Returns the license that a model card in ``folder`` names, if there is one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.S)
    match = front and re.search(r"^license:\s*([\w.\-]+)\s*$", front[1], re.M)
    return match[1] if match else None
