"""Generated Python code that loads an export with common libraries."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lightning_peft.model_reference import written_reference
from lightning_peft.task_registry import TASKS, TaskSpec

WEIGHTS = "adapter_model.safetensors"
_BASE_WEIGHT = ".base_layer.weight"
# Last layers of the classification heads of transformers.
_HEADS = (".score.weight", ".classifier.weight", ".classifier.out_proj.weight")
_READER = "AutoTokenizer"
# Or its weights stay in the blocks of the file.
_GGUF_SETTINGS = "settings = GgufConfig(dequantize=True)"


def adapter_code(
    facts: Mapping[str, Any], adapter: str, base: str, revision: str | None, folder: Path | None
) -> str:
    """Returns code that loads a base as an adapter was trained on it, and the adapter with PEFT.

    ``adapter`` and ``base`` are folders or names on the hub, as the code shall name them;
    ``folder`` is where its weights are now.
    """
    model, reader = model_class(facts), reader_class(facts)
    labels = None if folder is None else labels_of(folder)
    merged = folder is not None and bool(merged_layers(folder))
    settings = "" if merged else _settings(facts.get("quantization"))
    reference = written_reference(base)
    arguments = repr(reference.place) + (f", revision={revision!r}" if revision else "")
    if reference.gguf_file is not None:
        arguments += f", gguf_file={reference.gguf_file!r}"
        settings = _GGUF_SETTINGS
    needed = [settings.partition(" = ")[2].partition("(")[0]] if settings else []
    names = [model, *([reader] if reader else []), *needed]
    more = ", quantization_config=settings" if settings else ""
    heads = [spec for spec in TASKS.values() if spec.head and spec.auto_class == model]
    if labels is not None and heads:
        replaces = any(spec.replaces_head for spec in heads)
        other = ", ignore_mismatched_sizes=True" if replaces else ""
        more = f", num_labels={labels}{other}{more}"
    lines = ["from peft import PeftModel", f"from transformers import {', '.join(sorted(names))}"]
    lines.append("")
    if settings == _GGUF_SETTINGS:
        if facts.get("quantization"):
            lines.append("# The adapter was trained on the base in fewer bits; here it is dense.")
        lines += ["# Older versions of transformers have no GgufConfig, and need none.", settings]
    elif settings:
        lines += ["# The adapter was trained on the base in fewer bits.", settings]
    elif merged:
        lines.append("# Adapters were merged in training: the folder has weights of a dense base.")
    elif facts.get("quantization"):
        method = facts["quantization"].get("quant_method")
        lines.append(
            f"# The adapter was trained on a base quantized by {method}, which this does not do."
        )
    lines += [
        f"base = {model}.from_pretrained({arguments}{more})",
        f"model = PeftModel.from_pretrained(base, {adapter!r})",
    ]
    return "\n".join([*lines, *_reader_line(facts, arguments)])


def merged_model_code(facts: Mapping[str, Any], place: str) -> str:
    """Returns code that loads a merged model from a folder or the hub, by its adapter's record."""
    model, reader = model_class(facts), reader_class(facts)
    names = sorted([model, *([reader] if reader else [])])
    lines = [f"from transformers import {', '.join(names)}", ""]
    lines.append(f"model = {model}.from_pretrained({place!r})")
    return "\n".join([*lines, *_reader_line(facts, repr(place))])


def sentence_code(name: str, place: str) -> str:
    """Returns code that loads and uses a model by a class of sentence-transformers."""
    call = (
        'embeddings = model.encode(["What is it?", "It is this."])'
        if name == "SentenceTransformer"
        else 'scores = model.predict([("What is it?", "It is this.")])'
    )
    return f"from sentence_transformers import {name}\n\nmodel = {name}({place!r})\n{call}"


def sentence_class(facts: Mapping[str, Any]) -> str | None:
    """Returns the class of sentence-transformers that loads models of a task; ``None`` for none."""
    task = str(facts.get("task", "")).rpartition(".")[2]
    return next((one.sentence_class for one in TASKS.values() if one.class_name == task), None)


def _reader_line(facts: Mapping[str, Any], arguments: str) -> list[str]:
    spec = _task_of_data(facts)
    reader, name = (spec.reader, spec.processor_argument) if spec else (_READER, "tokenizer")
    return [f"{name} = {reader}.from_pretrained({arguments})"] if reader else []


def model_class(facts: Mapping[str, Any]) -> str:
    """Returns the class of transformers of a base: an ``Auto`` class, or its own."""
    base = facts.get("base")
    name = str(base.get("class", "")) if isinstance(base, Mapping) else ""
    known = {spec.base_suffix: spec.auto_class for spec in TASKS.values() if spec.base_suffix}
    known["ForQuestionAnswering"] = "AutoModelForQuestionAnswering"
    auto = next((cls for suffix, cls in known.items() if name.endswith(suffix)), None)
    return auto or (name if name.isidentifier() else "AutoModel")


def reader_class(facts: Mapping[str, Any]) -> str | None:
    """Returns the class that makes inputs of text, pictures or sound; ``None`` if none does."""
    spec = _task_of_data(facts)
    return spec.reader if spec else _READER


def _task_of_data(facts: Mapping[str, Any]) -> TaskSpec | None:
    data = facts.get("data")
    name = str(data.get("class", "")) if isinstance(data, Mapping) else ""
    return next((spec for spec in TASKS.values() if spec.owns_data(name)), None)


def labels_of(folder: Path) -> int | None:
    """Returns the rows of the classification head in an adapter folder; ``None`` without one."""
    file = folder / WEIGHTS
    if not file.is_file():
        return None
    # Loading the adapter says what is wrong with it.
    with suppress(SafetensorError), safe_open(file, framework="numpy") as weights:
        for name in weights.keys():  # noqa: SIM118
            if name.endswith(_HEADS):
                return int(weights.get_slice(name).get_shape()[0])
    return None


def keys_in(folder: Path) -> list[str]:
    """Returns the names of the tensors in an adapter's file, without PEFT's prefix.

    Empty where it cannot be read: loading the adapter says what is wrong with it.
    """
    with (
        suppress(OSError, SafetensorError),
        safe_open(folder / WEIGHTS, framework="numpy") as opened,
    ):
        return [key.removeprefix("base_model.model.") for key in opened.keys()]  # noqa: SIM118
    return []


def merged_layers(folder: Path) -> list[str]:
    """Returns the layers into which adapters were merged in training: their weights are there.

    Not embeddings, whose weights are in the file of a vocabulary that was resized too.
    """
    keys = keys_in(folder)
    layers = {key.removesuffix(".lora_A.weight") for key in keys}
    return [
        name
        for key in keys
        if key.endswith(_BASE_WEIGHT) and (name := key.removesuffix(_BASE_WEIGHT)) in layers
    ]


def _is_texts(value: object) -> bool:
    # Names of what is not quantized.
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _settings(quantization: object) -> str:
    # That of bitsandbytes has no name.
    if not isinstance(quantization, Mapping) or "quant_method" in quantization:
        return ""
    plain = {
        name: value
        for name, value in quantization.items()
        if (isinstance(value, (str, bool, int, float)) or _is_texts(value)) and name.isidentifier()
    }
    if not plain:
        return ""
    arguments = "".join(f"    {name}={value!r},\n" for name, value in sorted(plain.items()))
    return f"settings = BitsAndBytesConfig(\n{arguments})"
