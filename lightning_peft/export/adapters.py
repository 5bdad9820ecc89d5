"""Lookup of a finished adapter from a folder, checkpoint or run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_peft import engine
from lightning_peft.errors import ConfigError, itemize
from lightning_peft.export.loading_code import merged_layers

CONFIG = "adapter_config.json"
PROVENANCE = "provenance.json"
# What the model without an adapter is called among them.
BASE = "base"
# Where a run keeps the adapters of its checkpoints.
_IN_RUN = ("checkpoints/adapters", "adapters")


@dataclass(frozen=True)
class Adapter:
    """A finished adapter on disk; ``facts`` is its provenance, which others do not write."""

    name: str
    folder: Path
    config: dict[str, Any]
    facts: dict[str, Any]

    @property
    def base(self) -> dict[str, Any]:
        """What is recorded of the base that it was trained on; empty where nothing is."""
        return self.facts.get("base") or {}

    @property
    def base_name(self) -> str | None:
        """Folder or hub name of that base, where it is recorded."""
        return self.base.get("name_or_path") or self.config.get("base_model_name_or_path") or None

    @property
    def base_revision(self) -> str | None:
        """Commit of that base on the hub, where it is recorded."""
        return self.base.get("revision") or self.config.get("revision")

    @property
    def quantization(self) -> Any | None:
        """The config by which that base was quantized in training; ``None`` if it was not."""
        return engine.quantization_from_dict(self.facts.get("quantization"))

    @property
    def bits(self) -> int:
        """Bits per weight of the base in training: 4, 8 or 16 (which stands for dense)."""
        settings = self.quantization
        return 16 if settings is None else engine.backend_for(settings).bits

    @property
    def merged_layers(self) -> list[str]:
        """The layers of :func:`merged_layers` in its file."""
        return merged_layers(self.folder)

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the chat template that it was trained with, where that is recorded."""
        for place in (self.facts, self.facts.get("data")):
            for key in ("chat_template", "template"):
                value = place.get(key) if isinstance(place, dict) else None
                text = value.get("text") if isinstance(value, dict) else value
                if isinstance(text, str) and ("{%" in text or "{{" in text):
                    return text
        return None

    @property
    def encoding(self) -> dict[str, Any]:
        """How the rows were encoded that it was trained on, where that is recorded."""
        record: Any = self.facts
        for key in ("data", "settings", "encoding"):
            record = record.get(key) if isinstance(record, dict) else None
        return record if isinstance(record, dict) else {}

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        """Values for variables of the chat template that it was trained with."""
        variables = self.encoding.get("chat_template_kwargs")
        return variables if isinstance(variables, dict) else {}


def find_adapter(path: str) -> Adapter:
    """Returns the adapter that ``path`` means; ``NAME=PATH`` gives it another name.

    That is an adapter folder, a ``.ckpt`` file with its adapter folder, or the folder of a run,
    whose best adapter is taken, or the newest.
    """
    name, equals, rest = path.partition("=")
    named = bool(equals) and "/" not in name and not Path(path).exists()
    folder = _folder_of(Path(rest if named else path))
    written = folder / PROVENANCE
    return Adapter(
        name=name if named else folder.resolve().name,
        folder=folder,
        config=engine.read_json(folder / CONFIG),
        facts=engine.read_json(written) if written.is_file() else {},
    )


def find_adapters(paths: Iterable[str]) -> list[Adapter]:
    """Returns several adapters; those whose names are the same, or the base's, get numbers."""
    adapters: list[Adapter] = []
    for path in paths:
        adapter = find_adapter(path)
        taken = {BASE, *(other.name for other in adapters)}
        # A name becomes a part of parameter names, in which dots separate.
        original = name = adapter.name.replace(".", "_")
        number = 2
        while name in taken:
            name, number = f"{original}-{number}", number + 1
        adapters.append(replace(adapter, name=name))
    return adapters


def _folder_of(path: Path) -> Path:
    if path.suffix == ".ckpt":
        return _adapter_of_checkpoint(path)
    if not path.is_dir():
        raise ConfigError(
            f"{str(path)!r} is neither a folder nor a checkpoint here. Give an adapter folder "
            f"(with {CONFIG}), a .ckpt file, or the folder of a run."
        )
    if (path / CONFIG).is_file():
        return path
    for place in _IN_RUN:
        folders = sorted((path / place).glob(f"*/{CONFIG}"), key=_age)
        # The recipes keep the best one by that name; after it comes the newest.
        best = [file for file in folders if file.parent.name == "best"]
        if folders:
            return (best or folders)[-1].parent
    _refuse_parts(path)
    raise ConfigError(
        f"{str(path)!r} holds no {CONFIG}, and no checkpoints/adapters/ with one: it is neither an "
        "adapter folder nor the folder of a run that has saved a checkpoint."
    )


def _adapter_of_checkpoint(checkpoint: Path) -> Path:
    folder = checkpoint.parent / "adapters" / checkpoint.name.removesuffix(".ckpt")
    if (folder / CONFIG).is_file():
        return folder
    _refuse_parts(folder)
    raise ConfigError(
        f"There is no adapter folder {str(folder)!r} next to the checkpoint. Checkpoints of "
        "lightning_peft have one; it may have been moved. In Python, "
        "lightning_peft.load_from_checkpoint and lightning_peft.save_adapter write it again."
    )


def _refuse_parts(folder: Path) -> None:
    parts = sorted(file.parent for file in folder.glob(f"*/{CONFIG}"))
    if parts:
        raise ConfigError(
            f"{str(folder)!r} holds several adapters, each for a model of its own. Give one of "
            "them:" + itemize(str(part) for part in parts)
        )


def _age(file: Path) -> tuple[str, float]:
    facts = file.with_name(PROVENANCE)
    written = engine.read_json(facts).get("written") if facts.is_file() else None
    return (str(written or ""), file.stat().st_mtime)
