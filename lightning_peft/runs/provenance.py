"""Provenance of an adapter, sufficient to verify and repeat its training."""

from __future__ import annotations

import hashlib
import json
import os
import time
from typing import Any

from lightning_peft import engine
from lightning_peft.runs.machine import hardware, versions


def text_digest(text: str) -> str:
    """Returns the sha256 of a text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def provenance(module: Any, datamodule: Any, recipe: str, seed: int | None) -> dict[str, Any]:
    """Returns the provenance of a run, once the module is built."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "recipe_sha256": text_digest(recipe),
        # Where relative paths of the recipe begin.
        "directory": os.getcwd(),
        "seed": seed,
        "task": _name(module),
        "base": _base(module),
        "data": data_record(datamodule),
        **output_settings(module),
        "versions": versions(),
        "hardware": hardware(),
    }


def output_settings(module: Any) -> dict[str, Any]:
    """Returns the settings by which outputs are made, of a module that names some."""
    record = getattr(module, "output_settings", None)
    return {"output_settings": record} if isinstance(record, dict) else {}


def data_record(datamodule: Any) -> dict[str, Any] | None:
    """Returns the known facts of the data: everything for the data modules of this package."""
    if datamodule is None:
        return None
    record = getattr(datamodule, "record", None)
    known = json.loads(json.dumps(record, default=str)) if isinstance(record, dict) else {}
    return {"class": _name(datamodule), **known}


def _base(module: Any) -> dict[str, Any]:
    record = engine.record_of(module)
    if record is None:
        return {}
    return {
        name or "(whole module)": {
            **entry.base_id,
            "fingerprint": entry.base.digest(),
            "quantization": entry.quantization,
            "adapters": {key: info.config for key, info in entry.adapters.items()},
        }
        for name, entry in record.parts.items()
    }


def _name(instance: object) -> str:
    cls = getattr(type(instance), "unbound_class", type(instance))
    return f"{cls.__module__}.{cls.__qualname__}"
