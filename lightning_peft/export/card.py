"""Model cards, filled from the adapter's record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lightning_peft import engine
from lightning_peft.export.adapters import Adapter
from lightning_peft.export.loading_code import adapter_code, sentence_code
from lightning_peft.model_reference import written_reference

# Facts of provenance.json that have a row or a section of their own.
_SHOWN = {
    *("base", "config", "quantization", "versions", "seed", "written", "adapter_sha256"),
    *("chat_template", "data", "metrics"),
}
_SETTINGS = (
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"),
    *("init_lora_weights", "target_modules", "modules_to_save", "bias"),
)


def adapter_card(adapter: Adapter, license: str | None) -> str:
    """Returns the card of an adapter folder; ``license`` is that of the base, if it is known."""
    name = adapter.name
    front = _front(adapter, license, ["lora", "lightning-peft"], "peft")
    base = adapter.base_name or "BASE"
    code = adapter_code(
        adapter.facts,
        "PATH_OR_NAME_OF_THIS_FOLDER",
        public_name(base),
        adapter.base_revision,
        adapter.folder,
    )
    use = f"## Use\n\n```python\n{code}\n```\n"
    if adapter.bits != 16:
        use += (
            f"\nIt was trained on a {adapter.bits}-bit base. On the 16-bit base its "
            "answers may differ; `lightning-peft merge` says by how much.\n"
        )
    return f"{front}\n# {name}\n\n{_about(adapter)}\n{use}\n{_provenance_rows(adapter, license)}"


def merged_card(adapter: Adapter, license: str | None, report: Mapping[str, Any]) -> str:
    """Returns the card of a merged model folder, from its report."""
    front = _front(adapter, license, ["lightning-peft", "merged"], "transformers")
    into = {
        "dequantized": "the dequantized base, on which it was trained",
        "original": "the base as it is in its files",
    }[report["into"]]
    text = f"The adapter `{adapter.name}` is built into the weights: merged into {into}, and "
    text += f"stored in {report['dtype']}.\n"
    errors = report.get("logit_errors") or {}
    if errors:
        text += (
            "\nDifference to the base with the adapter as it was trained, in the outputs on a few "
            "prompts:\n\n| merged into | relative error of logits | KL, nats per token | same next "
            "token |\n| --- | --- | --- | --- |\n"
        )
        for way, error in errors.items():
            chosen = " (this folder)" if way == report["into"] else ""
            text += (
                f"| {way}{chosen} | {error['relative']:.2%} | {error['kl']:.2e} | "
                f"{error['same_choice']:.1%} |\n"
            )
    elif report.get("not_measured"):
        text += f"\nThe outputs were not compared: {report['not_measured']}.\n"
    title = f"# {adapter.name}, merged"
    return f"{front}\n{title}\n\n{_about(adapter)}\n{text}\n{_provenance_rows(adapter, license)}"


def sentence_card(card: str, kind: str, place: str) -> str:
    """Returns the card of a merged model or adapter for a class of sentence-transformers."""
    pipeline = "sentence-similarity" if kind == "SentenceTransformer" else "text-ranking"
    front, mark, rest = card.removeprefix("---\n").partition("\n---\n")
    lines = [line for line in front.splitlines() if not line.startswith("library_name:")]
    first = ["library_name: sentence-transformers", f"pipeline_tag: {pipeline}", *lines]
    code = sentence_code(kind, place)
    use = f"## Use with sentence-transformers\n\n```python\n{code}\n```\n\n"
    before, title, after = rest.partition("## How it was made")
    return "---\n" + "\n".join(first) + mark + before + use + title + after


def dense_experts(size: int) -> str:
    """Returns the note on weights of experts that stay dense in a quantized folder."""
    return (
        f"the weights of experts ({size / 1e9:.2f} GB) are as in the merged model, since "
        "bitsandbytes in transformers quantizes linear layers only"
    )


def quantized_section(found: Mapping[str, Any]) -> str:
    """Returns the card's section on quantization of a merged model."""
    text = (
        f"\n## Quantized\n\nThe linear layers are {found['bits']}-bit ({found['kind']}, "
        "bitsandbytes).\n"
    )
    if found["dense_expert_bytes"]:
        text += f"Not quantized: {dense_experts(found['dense_expert_bytes'])}.\n"
    return text + _difference(found)


def _difference(found: Mapping[str, Any]) -> str:
    """Returns how far outputs are from those in training, or why that is not known."""
    error = found["logit_error"]
    if error is None:
        return f"The outputs were not compared: {found['not_measured']}.\n"
    return (
        f"Difference to the base with the adapter as it was trained: {error['relative']:.2%} of "
        f"the logits, {error['kl']:.2e} nats per token, {error['same_choice']:.1%} of the next "
        "tokens the same.\n"
    )


def gguf_card(adapter: Adapter, license: str | None, record: Mapping[str, Any]) -> str:
    """Returns the card of a folder with GGUF files; ``record`` is its ``gguf_report.json``."""
    front = _front(adapter, license, ["gguf", "lightning-peft"], "gguf")
    text = "| file | what | sha256 |\n| --- | --- | --- |\n"
    parts = {
        "model": "model with the adapter built in",
        "base": "base without the adapter",
        "adapter": "adapter, for `--lora`",
    }
    for file in record["files"]:
        text += f"| `{file['file']}` | {parts[file['part']]} | `{file['sha256']}` |\n"
    text += "\n" + _difference(record)
    title = f"# {adapter.name}, GGUF"
    return f"{front}\n{title}\n\n{_about(adapter)}\n{text}\n{_provenance_rows(adapter, license)}"


def _front(adapter: Adapter, license: str | None, tags: list[str], library: str) -> str:
    lines = ["---", f"library_name: {library}"]
    base = written_reference(adapter.base_name or "")
    of_hub = base.gguf_file is None or base.name == f"{base.place}:{base.gguf_file}"
    if base.place and of_hub and not _is_path(base.place):
        lines.append(f"base_model: {base.place}")
    if license:
        lines.append(f"license: {license}")
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""])


def _is_path(name: str) -> bool:
    # A name on the hub has at most one slash, does not begin with one, and has no mark before it.
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or bool({"\\", ":"} & set(name))


def public_name(name: str) -> str:
    """Returns the name of a model without the folders of the machine that it was on."""
    base = written_reference(name)
    if base.gguf_file is not None and not _is_path(base.place) and ":" in name:
        return name
    if base.gguf_file is not None:
        return base.gguf_file
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2] if _is_path(name) else name


def _about(adapter: Adapter) -> str:
    config, settings = adapter.config, adapter.facts.get("quantization")
    method = f"QLoRA ({engine.recorded_backend(settings).label(settings)})" if settings else "LoRA"
    base = public_name(adapter.base_name or "a base that is not recorded")
    rank = f" of rank {config['r']}" if "r" in config else ""
    return f"{method}{rank}, trained on `{base}` with lightning-peft.\n"


def _provenance_rows(adapter: Adapter, license: str | None) -> str:
    facts = adapter.facts
    trained = facts.get("config") or adapter.config
    rows = [
        ("base", public_name(adapter.base_name or "not recorded")),
        ("revision", adapter.base_revision),
        ("fingerprint of the base", adapter.base.get("fingerprint")),
        ("license of the base", license or "not known here: look it up before you pass this on"),
        ("quantization", facts.get("quantization") or "none"),
        *((key, trained[key]) for key in _SETTINGS if trained.get(key) not in (None, [], False)),
        ("seed", facts.get("seed")),
        ("written", facts.get("written")),
        ("sha256 of the adapter", facts.get("adapter_sha256")),
        *(facts.get("versions") or {}).items(),
    ]
    others = {
        key.replace("_", " "): value
        for key, value in facts.items()
        if key not in _SHOWN and value not in (None, {}, [])
    }
    plain = {key: public(value) for key, value in others.items() if _is_plain(value)}
    known = {key: value for key, value in rows if value is not None}
    text = "## How it was made\n\n" + _table(known | plain)
    text += _data(facts.get("data")) + _metrics(facts.get("metrics"))
    for key, value in others.items():
        if key not in plain:
            text += f"\n### {key.capitalize()}\n\n{_block(public(value))}"
    return text


def _is_plain(value: Any) -> bool:
    return not isinstance(value, (Mapping, list))


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {key} | {_cell(value)} |\n" for key, value in rows.items()]
    return "".join(["| | |\n| --- | --- |\n", *lines])


def _data(record: Any) -> str:
    """Returns the training data as recorded by the data module."""
    if not isinstance(record, Mapping) or not record:
        return ""
    splits = record.get("splits")
    counts = {
        f"rows for {split}": found.get("rows")
        for split, found in (splits.items() if isinstance(splits, Mapping) else ())
        if isinstance(found, Mapping)
    }
    plain = {
        key.replace("_", " "): value
        for key, value in record.items()
        if isinstance(value, (str, int, float)) and key != "class"
    }
    rows = public({**plain, **{split: count for split, count in counts.items() if count}})
    return f"\n### Data\n\n{_table(rows)}" if rows else ""


def _metrics(record: Any) -> str:
    """Returns the metrics before and after training, where both were measured."""
    if not isinstance(record, Mapping) or not record:
        return ""
    order = sorted(record, key=lambda name: name != "before")
    stages = {name: record[name] for name in order if isinstance(record[name], Mapping)}
    if len(stages) < len(record):
        return f"\n### Metrics\n\n{_block(public(record))}"
    names = dict.fromkeys(name for values in stages.values() for name in values)
    lines = [["", *stages], ["---"] * (1 + len(stages))]
    lines += [[name, *(_number(values.get(name)) for values in stages.values())] for name in names]
    return "\n### Metrics\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value: Any) -> str:
    return (
        f"{value:.4g}" if isinstance(value, (int, float)) else "" if value is None else str(value)
    )


def public(value: Any) -> Any:
    """Returns a record without the folders of the machine that it was written on."""
    if isinstance(value, Mapping):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    absolute = isinstance(value, str) and "\n" not in value and value.startswith(("/", "~"))
    return public_name(value) if absolute else value


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"`{text}`".replace("|", "\\|").replace("\n", " ")


def _block(value: Any) -> str:
    if isinstance(value, Mapping) and all(map(_is_plain, value.values())):
        return _table(value)
    return f"```json\n{json.dumps(value, indent=2, ensure_ascii=False)}\n```\n"
