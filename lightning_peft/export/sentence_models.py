"""Export of embedding models and rerankers for sentence-transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.errors import UnsupportedError
from lightning_peft.export.adapter_folder import copy_adapter, notes_on_base
from lightning_peft.export.adapters import Adapter
from lightning_peft.export.base import INDEX, Base
from lightning_peft.export.card import public_name, sentence_card
from lightning_peft.export.loading_code import sentence_class
from lightning_peft.export.merged_folder import main_dtype
from lightning_peft.export.merging import merge
from lightning_peft.export.output import atomic_folder, copy_companions, write_json
from lightning_peft.export.request import ExportRequest
from lightning_peft.sentence_folder import (
    ENCODER,
    MODULES,
    SENTENCES,
    read_sentence_folder,
)

_PACKAGE = "sentence_transformers.models"
_DTYPES = "float32", "bfloat16", "float16"


def as_sentence_transformers(request: ExportRequest) -> dict[str, Any]:
    """Exports a folder for ``SentenceTransformer(folder)`` or ``CrossEncoder(folder)``.

    It holds the merged model in the base's own dtype, or with ``separate_adapter`` the adapter,
    whose base is then loaded from where it is.
    """
    adapter, base = request.adapter, request.base
    kind = _kind(adapter)
    files = _embedding_files(adapter, base) if kind == "SentenceTransformer" else {}
    report, notes = None, []
    with atomic_folder(request.output) as folder:
        if request.separate_adapter:
            if kind == "CrossEncoder":
                raise UnsupportedError(
                    "A reranker is exported with its adapter merged: sentence-transformers' "
                    "CrossEncoder loads models, not adapters. Leave out --with-adapter."
                )
            copy_adapter(request, folder)
            _name_base(folder, request)
            known = {file.name for file in folder.iterdir()}
            copy_companions(base.folder, folder, {INDEX, "config.json", *known})
            notes += notes_on_base(request)
            if adapter.bits != 16:
                notes.append(
                    f"the adapter was trained on a {adapter.bits}-bit base, and is loaded here on "
                    "the base as it is in its files: embeddings differ from those in training. "
                    "Without --with-adapter they are the same"
                )
        else:
            target = folder / "merged"
            own = main_dtype(base.keys.values())
            dtype = request.options.get("dtype") or (own if own in _DTYPES else None)
            report = merge(adapter, target, **{**request.options, "dtype": dtype})
            for file in target.iterdir():
                file.replace(folder / file.name)
            target.rmdir()
            report["output"] = str(request.output)
            if kind == "CrossEncoder":
                _describe_scores(folder, adapter)
                # Of a base that made embeddings.
                for name in (MODULES, ENCODER, SENTENCES):
                    (folder / name).unlink(missing_ok=True)
        for name, content in files.items():
            write_json(folder / name, content, ensure_ascii=False)
        card = folder / "README.md"
        text = card.read_text(encoding="utf-8")
        text = sentence_card(text, kind, public_name(str(request.output)))
        card.write_text(text, encoding="utf-8")
    python = f"from sentence_transformers import {kind}; model = {kind}({str(request.output)!r})"
    result = {"notes": notes, "commands": [f"python -ic {json.dumps(python)}"]}
    return result | ({"merge": report} if report else {})


def _kind(adapter: Adapter) -> str:
    kind = sentence_class(adapter.facts)
    if kind is None:
        name = str(adapter.facts.get("task", "")).rpartition(".")[2]
        raise UnsupportedError(
            f"{adapter.name} is of {name or 'a task that is not recorded'}, and sentence-"
            "transformers loads embedding models and rerankers (tasks SentenceEmbedder and "
            "Reranker, trained by `lightning-peft fit`). Choose another --format."
        )
    return kind


def _embedding_files(adapter: Adapter, base: Base) -> dict[str, Any]:
    """Returns the content of the JSON files by which sentence-transformers makes embeddings."""
    known = read_sentence_folder(str(base.folder))
    record: Mapping[str, Any] = adapter.facts["output_settings"]
    data: Mapping[str, Any] = adapter.facts.get("data") or {}
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules += [("2_Normalize", "Normalize")] if record["normalize"] else []
    # What training took is in the record, be it from these files or from the user.
    longest = data.get("max_length") or known.max_length
    prompts = {**known.prompts, **(data.get("prompts") or {})}
    return {
        MODULES: [
            {"idx": place, "name": str(place), "path": path, "type": f"{_PACKAGE}.{name}"}
            for place, (path, name) in enumerate(modules)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": base.config.get_text_config().hidden_size,
            "pooling_mode_cls_token": record["pooling"] == "cls",
            "pooling_mode_mean_tokens": record["pooling"] == "mean",
            "pooling_mode_lasttoken": record["pooling"] == "lasttoken",
            "include_prompt": True,
        },
        ENCODER: {"max_seq_length": longest, "do_lower_case": False},
        SENTENCES: {
            "prompts": prompts,
            "default_prompt_name": known.default_prompt,
            "similarity_fn_name": record["similarity"],
        },
    }


def _describe_scores(folder: Path, adapter: Adapter) -> None:
    """Writes into the configuration how scores are made, and what pads."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    record: Mapping[str, Any] = adapter.facts["output_settings"]
    config["sentence_transformers"] = {"activation_fn": record["activation"]}
    if config.get("pad_token_id") is None and record.get("pad_token_id") is not None:
        config["pad_token_id"] = record["pad_token_id"]
    config["id2label"], config["label2id"] = {"0": "LABEL_0"}, {"LABEL_0": 0}
    write_json(file, config, ensure_ascii=False)


def _name_base(folder: Path, request: ExportRequest) -> None:
    """Names the base of an adapter so that it is found from anywhere."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    named = Path(str(config.get("base_model_name_or_path")))
    if not request.base_name and (named.is_dir() or not config.get("base_model_name_or_path")):
        config["base_model_name_or_path"] = str(request.base.folder.resolve())
    write_json(file, config, ensure_ascii=False)
