"""Unused columns and keys: reported, or refused."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from lightning_peft.data.json_text import texts_in
from lightning_peft.data.samples import shortened
from lightning_peft.data.template_context import is_empty, json_value
from lightning_peft.data.turns import FLAGS, REASONING_KEYS, ROLES, WEIGHT_HINT, parse_flag
from lightning_peft.data.validation import add_to_runs, format_runs
from lightning_peft.errors import ConfigError, similar_names

# How much a row counts, where rows are texts to learn.
_WEIGHTS = (*FLAGS[:4], "weights", "loss_weight", "sample_weight", "example_weight", "loss_scale")
# The same for rows of every shape: no data has these as a feature.
_WEIGHTS_OF_ALL = ("loss_weight", "sample_weight", "example_weight", "loss_scale")
_MEDIA = frozenset(
    name + ending
    for name in ("image", "audio", "video", "file", "image_url", "image_path", "audio_path")
    for ending in ("", "s")
)
# What changes an answer if it is left out, by shapes with turns.
_LEARNT = ("system", "tools", "functions", "documents", "chat_template_kwargs", "history")
# What a question is about, in columns of their own.
_OF_PROMPTS = (
    *("context", "contexts", "passage", "passages", "input", "inputs", "instruction"),
    *("choices", "options"),
)
# Common columns of data: `function` next to a prompt is code, and not a misspelled list of tools.
_ORDINARY = ("function", "tool", "document")


def check_column(
    name: str,
    value: Any,
    trains_text: bool,
    with_turns: bool,
    with_template: bool,
) -> list[tuple[str, str]] | None:
    """Returns the problems of a column that no field reads, as kind and text.

    An empty list where leaving it out changes nothing that is trained, so that it is only listed;
    ``None`` where it requests the default. ``trains_text``: whether rows are texts to train on,
    which a weight could apply to.
    """
    key = name.strip().lower()
    if key in (_WEIGHTS if trains_text else _WEIGHTS_OF_ALL):
        on = parse_flag(value)
        if on:
            return None
        why = "to leave a row out, take it out of the file" if on is False else WEIGHT_HINT
        return [("weight", f"has {name}={shortened(value)} for the whole row: {why}")]
    if not with_turns:
        part = trains_text and key == "role" and str(value).lower() in (*ROLES, "prompter")
        text = f"has {name}={value!r}: a row is one turn, and was to be a whole conversation"
        return [("key", text)] if part else []
    if key == "label" and parse_flag(value) is False and str(value).strip().lower() != "0":
        return [("key", f"has {name}={value!r}: a bad answer would be learnt as a good one")]
    if key in _MEDIA:
        return [("key", f"has {name}, and the answer would be learnt without seeing or hearing it")]
    if key in REASONING_KEYS:
        return [
            ("key", f"has {name} next to its turns: put the thoughts into the turn they are of")
        ]
    if not with_template and key in _LEARNT:
        return [("key", f"has {name}, and no chat template that would write it")]
    return _misspelled(name, key)


def is_of_prompt(name: str) -> bool:
    """Returns whether a column of this name holds what a question is about."""
    return name.strip().lower() in _OF_PROMPTS


def missing_in_prompt(name: str, value: Any, prompt: Any, as_fields: bool) -> list[tuple[str, str]]:
    """Returns the problem of a column whose text the prompt, text or turns, does not have.

    ``as_fields`` indicates whether prompt and answer can be read as the fields of Alpaca instead.
    """
    asked = " ".join(" ".join(texts_in(prompt)).split())
    if all(" ".join(text.split()) in asked for text in texts_in(value)):
        return []
    remedy = "put it into the prompt"
    if as_fields:
        fields = "{'instruction': ..., 'input': ..., 'output': ...}"
        remedy += f", or name the columns of all three by columns={fields}"
    return [("key", f"has {name}, which the model would answer without: {remedy}")]


def _misspelled(name: str, key: str) -> list[tuple[str, str]]:
    known = (*_LEARNT, "system_prompt", "reasoning_content")
    near = get_close_matches(key, known, n=1, cutoff=0.85)
    if not near or key in _ORDINARY:
        return []
    reason = "is read twice" if name == near[0] else f"nearest key that is read: {near[0]!r}"
    return [("key", f"has the key {name!r} ({reason})")]


def unread_columns(row: Mapping[str, Any], read: Collection[str]) -> dict[str, Any]:
    """Returns the columns of a row that are not in ``read`` and not empty."""
    return {name: value for name, value in row.items() if name not in read and not is_empty(value)}


def drop_ignored(
    row: Mapping[str, Any], ignored: Collection[str], seen_keys: set[str]
) -> dict[str, Any]:
    """Returns a row without some keys, in itself and its turns; adds all to ``seen_keys``."""

    def without_ignored(fields: Mapping[str, Any]) -> dict[str, Any]:
        seen_keys.update(fields)
        return {name: value for name, value in fields.items() if name not in ignored}

    def inside(value: Any) -> Any:
        found = json_value(value) if isinstance(value, str) and value[:1] in ("[", "{") else value
        if isinstance(found, list) and any(map(is_turn, found)):
            return [inside(one) for one in found]
        if is_turn(found):
            return {key: parts(one) for key, one in without_ignored(found).items()}
        return value

    def parts(value: Any) -> Any:
        listed = isinstance(value, list) and all(isinstance(one, dict) for one in value)
        return [without_ignored(part) for part in value] if listed else value

    return {name: inside(value) for name, value in without_ignored(row).items()}


def is_turn(value: Any) -> bool:
    """Returns whether a value is a turn of a conversation, by its keys."""
    return isinstance(value, Mapping) and bool({"role", "from"} & set(value))


def describe_unused(keys: Sequence[Mapping[str, Any]]) -> str:
    """Returns the keys and rows of a :meth:`KeyCount.summary` as a sentence without its end."""
    return "; ".join(f"{key['key']!r} ({_describe_rows(key['rows'])})" for key in keys)


def _describe_rows(rows: Mapping[str, str]) -> str:
    if len(rows) == 1:
        return f"rows {next(iter(rows.values()))}"
    return "; ".join(f"rows {numbers} of {file}" for file, numbers in rows.items())


class KeyCount:
    """Collects keys that nothing reads, while rows are taken in the order of their files."""

    def __init__(self) -> None:
        # Ranges, as a key is usually in every row.
        self._found: dict[str, dict[str, list[list[int]]]] = {}

    def add(self, keys: Iterable[str], file: str, row: int) -> None:
        """Notes the keys of a row."""
        for key in keys:
            add_to_runs(self._found.setdefault(key, {}).setdefault(file, []), row)

    def summary(self) -> list[dict[str, Any]]:
        """Returns the keys, most frequent first, with the number of rows and the rows by file."""
        counts = {
            key: sum(last - first + 1 for runs in files.values() for first, last in runs)
            for key, files in self._found.items()
        }
        return [
            {
                "key": key,
                "count": counts[key],
                "rows": {file: format_runs(runs) for file, runs in self._found[key].items()},
            }
            for key in sorted(counts, key=lambda key: (-counts[key], key))
        ]


def check_ignored(ignored: Collection[str], there: Collection[str]) -> None:
    """Refuses keys that are ignored on purpose and that no row has (``there``)."""
    absent = [f"{key!r}{similar_names(key, there)}" for key in ignored if key not in there]
    if absent:
        raise ConfigError(
            f"ignored_keys={sorted(ignored)!r}: no row has {', '.join(absent)}. Take it out, or "
            "correct it."
        )
