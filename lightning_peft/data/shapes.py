"""Detection of row formats by their columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_peft.data.cells import ROLES, parse_cells
from lightning_peft.data.conversations import (
    parse_alpaca,
    parse_messages,
    parse_pair,
    parse_preference,
    parse_prompt,
    parse_source,
    parse_unpaired,
)
from lightning_peft.data.image_turns import parse_image_messages, parse_image_pair
from lightning_peft.data.row_keys import (
    check_column,
    drop_ignored,
    is_of_prompt,
    missing_in_prompt,
    unread_columns,
)
from lightning_peft.data.samples import (
    RowProblems,
    Sample,
    parse_image,
    parse_label,
    parse_speech,
    parse_tags,
    parse_text,
    parse_translation,
)
from lightning_peft.data.text_pairs import (
    NUMBERED,
    parse_anchor,
    parse_scored,
    refuse_two_texts,
    unread_beside_anchor,
)
from lightning_peft.data.turns import REASONING_KEYS
from lightning_peft.errors import ConfigError, similar_names

# Our field -> the column names that are recognised for it.
FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output",),
    "prompt": ("prompt", "question"),
    "completion": ("completion", "response", "answer"),
    "chosen": ("chosen", "preferred_output"),
    "rejected": ("rejected", "non_preferred_output"),
    "text": ("text",),
    "label": ("label",),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "reasoning": REASONING_KEYS,
    "tools": ("tools", "functions"),
    "documents": ("documents",),
    "chat_template_kwargs": ("chat_template_kwargs",),
    "split": ("split",),
    "text_pair": ("text_pair",),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "labels"),
    "image": ("image", "img", "file_name"),
    "images": ("images", "image", "image_path", "image_paths", "img", "file_name"),
    "source": ("source", "document", "article", "dialogue", "src"),
    "target": ("target", "summary", "highlights", "tgt"),
    "translation": ("translation",),
    "audio": ("audio", "file_name", "audio_path", "audio_filepath", "path"),
    "transcript": ("transcript", "transcription", "sentence", "text"),
    "anchor": ("anchor", "query", "question"),
    "positive": ("positive", "passage", "document", "answer"),
    "negative": ("negative",),
    "negatives": ("negatives", "hard_negatives"),
    **{name: (name,) for name in NUMBERED},
    "text_a": ("text_a", "sentence1", "sentence_1", "query"),
    "text_b": ("text_b", "sentence2", "sentence_2", "passage", "document"),
    "score": ("score", "similarity_score", "label"),
}
KNOWN_COLUMNS = frozenset(name for names in FIELDS.values() for name in names)
# What a chat template writes, in every shape that becomes turns by one.
CONTEXT = ("tools", "documents", "chat_template_kwargs")


@dataclass(frozen=True)
class Shape:
    """One shape of rows: its name, its title and parser, its fields, and its data module."""

    name: str
    title: str
    parse: Callable[[Mapping[str, Any]], Sample]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    data_class: str = "SupervisedData"

    @property
    def keeps_columns(self) -> bool:
        """Whether further columns are kept, for reward functions."""
        return self.name == "prompt"

    @property
    def has_turns(self) -> bool:
        """Whether rows become the turns of a conversation."""
        return "tools" in self.optional

    @property
    def has_answer(self) -> bool:
        """Whether a prompt and its answer are columns of their own."""
        return self.has_turns and bool({"completion", "output", "chosen"} & set(self.required))

    @property
    def has_negatives(self) -> bool:
        """Whether rows may name texts that do not belong to the first one."""
        return "negatives" in self.optional


_SYSTEM = ("system", *CONTEXT)
_ANSWERED = ("history", "reasoning", *_SYSTEM)
_COMPARED = ("prompt", "messages", "instruction", "input", *_SYSTEM)
# In this order: the first whose required fields are all there.
# fmt: off
_IN_ORDER = (
    Shape("messages", "messages (ChatML or ShareGPT)", parse_messages,
          ("messages",), _SYSTEM),
    Shape("preference", "chosen and rejected answers", parse_preference,
          ("chosen", "rejected"), _COMPARED, "PreferenceData"),
    Shape("alpaca", "Alpaca: instruction, input, output", parse_alpaca,
          ("instruction", "output"), ("input", *_ANSWERED)),
    Shape("prompt_completion", "prompt and completion", parse_pair,
          ("prompt", "completion"), _ANSWERED),
    Shape("unpaired", "prompt, completion and label", parse_unpaired,
          ("prompt", "completion", "label"), _ANSWERED, "UnpairedPreferenceData"),
    Shape("text_label", "text and label", parse_label,
          ("text", "label"), ("text_pair",), "TextClassificationData"),
    Shape("text", "plain text", parse_text,
          ("text",)),
    Shape("tokens_tags", "tokens and their tags", parse_tags,
          ("tokens", "tags"), (), "TokenClassificationData"),
    Shape("image_label", "image and label", parse_image,
          ("image", "label"), (), "ImageData"),
    Shape("source_target", "source and target", parse_source,
          ("source", "target"), (), "Seq2SeqData"),
    Shape("translation", "translations by language", parse_translation,
          ("translation",), (), "Seq2SeqData"),
    Shape("prompt", "prompts", parse_prompt,
          ("prompt",), _SYSTEM, "PromptData"),
    Shape("speech", "recordings and transcripts", parse_speech,
          ("audio", "transcript"), (), "SpeechData"),
    Shape("image_messages", "messages with images", parse_image_messages,
          ("messages",), ("images", *_SYSTEM), "ImageTextData"),
    Shape("image_prompt", "prompt and completion with images", parse_image_pair,
          ("prompt", "completion"), ("images", *_ANSWERED), "ImageTextData"),
    Shape("scored_pair", "two texts and their score", parse_scored,
          ("text_a", "text_b", "score"), (), "EmbeddingData or RerankingData"),
    Shape("anchor_positive", "a text and one that belongs to it", parse_anchor,
          ("anchor", "positive"), ("negative", "negatives", *NUMBERED),
          "EmbeddingData or RerankingData"),
)
# fmt: on
SHAPES = {shape.name: shape for shape in _IN_ORDER}


@dataclass(frozen=True)
class Layout:
    """The shape of some rows, and the column of each field.

    ``variables`` are names that the chat template uses next to the turns, ``None`` without one;
    ``ignored`` are keys that are left out on purpose, and ``seen_keys`` those of the rows so far.
    """

    shape: Shape
    columns: dict[str, str]
    split_column: str | None = None
    variables: frozenset[str] | None = None
    ignored: frozenset[str] = frozenset()
    seen_keys: set[str] = field(default_factory=set, compare=False)

    def parse(self, row: Mapping[str, Any]) -> Sample | list[tuple[str, str]]:
        """Returns the content of ``row``, or its problems as ``(kind, text)``."""
        row = drop_ignored(row, self.ignored, self.seen_keys) if self.ignored else row
        columns = self._columns_of(row)
        fields = {ours: row.get(theirs) for ours, theirs in columns.items()}
        rest = unread_columns(row, {*columns.values(), self.split_column or ""})
        own = {name: rest.pop(name) for name in sorted((self.variables or frozenset()) & set(rest))}
        kept = None
        if self.shape.keeps_columns:
            # Reward functions may read any of them, empty ones too.
            used = {*columns.values(), *own, self.split_column or ""}
            kept, rest = {name: row[name] for name in row if name not in used}, {}
        sample: Sample | None = None
        details: list[tuple[str, str]] = []
        try:
            sample = self.shape.parse(parse_cells(fields))
        except RowProblems as error:
            details = [(kind, self._with_column_name(problem)) for kind, problem in error.problems]
        # A text that is not parted into turns holds its prompt.
        prompt = fields if sample is None else sample.messages[:-1] or sample.messages
        problems, named = self._unread(rest, prompt)
        if sample is None or problems:
            return [*details, *problems]
        turns = [self.with_column_name(key) for key in sample.unused]
        context = {**own, **sample.context}
        replaced = [name for name, value in own.items() if context[name] != value]
        return replace(
            sample,
            context=context,
            columns=kept,
            unused=tuple(dict.fromkeys(named + replaced + turns)),
        )

    def _columns_of(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Returns the columns, with those that no row among the first had."""
        optional = [name for name in self.shape.optional if name not in self.columns]
        taken = set(self.columns.values())
        if not (self.shape.has_turns or self.shape.has_negatives):
            return self.columns
        if self.shape.has_turns and self.variables is None:
            absent = set(CONTEXT)
            return {ours: name for ours, name in self.columns.items() if ours not in absent}
        later = {
            ours: next((n for n in FIELDS[ours] if n in row and n not in taken), None)
            for ours in optional
        }
        return {**self.columns, **{ours: name for ours, name in later.items() if name}}

    def _unread(
        self, rest: Mapping[str, Any], prompt: Any
    ) -> tuple[list[tuple[str, str]], list[str]]:
        problems: list[tuple[str, str]] = []
        named, shape, with_template = [], self.shape, self.variables is not None
        trains_text = shape.has_turns or shape.name in ("text", "source_target", "translation")
        found: list[tuple[str, str]] | None
        for name, value in rest.items():
            if shape.has_answer and is_of_prompt(name):
                found = missing_in_prompt(name, value, prompt, shape.name == "prompt_completion")
            else:
                found = check_column(name, value, trains_text, shape.has_turns, with_template)
            if shape.has_negatives:
                found = unread_beside_anchor(name, value, FIELDS["score"]) or found
            problems += found or []
            named += [name] if found == [] else []
        return problems, named

    def with_column_name(self, key: str) -> str:
        """Returns a key of turns, ``"messages[].name"``, with the column's own name."""
        ours, mark, rest = key.partition("[]")
        return f"{self.columns.get(ours, ours)}{mark}{rest}"

    def _with_column_name(self, problem: str) -> str:
        last = problem.rpartition(" ")[2]
        theirs = self.columns.get(last, last)
        return problem if theirs == last else f"{problem} (column {theirs!r})"


def detect_layout(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str] | None,
    shape: str,
    accepts: Sequence[str] = (),
) -> Layout:
    """Returns the layout of most of ``rows``, of a shape in ``accepts`` where several fit."""
    counts = Counter(name for row in rows for name in row)
    mapping = _mapping(counts, columns or {})
    if shape != "auto" and shape not in SHAPES:
        raise ConfigError(f"shape={shape!r} is none of auto, {', '.join(SHAPES)}.")
    if shape == "auto":
        fits: Counter[str] = Counter(_shape_of(row, mapping, accepts) for row in rows)
        shape = max(("", *SHAPES), key=lambda name: (fits[name], name != ""))
        # Where each row lacks a value, which each then says.
        shape = shape or _shape_of(dict.fromkeys(counts, ""), mapping, accepts)
    found = SHAPES.get(shape)
    absent = [name for name in found.required if name not in mapping] if found else []
    if found is None or absent:
        candidates = "\n".join(f"  {s.name}: {', '.join(s.required)}" for s in SHAPES.values())
        lacking = f" has no {', '.join(absent)} for shape={shape!r}" if absent else ""
        raise ConfigError(
            f"The data{lacking or ' has none of the shapes that are known'}. Its columns: "
            f"{', '.join(sorted(counts)) or 'none'}. Shapes and what they need:\n{candidates}\n"
            'Say which column is which, such as columns={"prompt": "my_column"}. The first line '
            "of a table names its columns: where these are a row, add such a line above it."
            + _likely_columns(rows, counts)
        )
    used = {name: mapping[name] for name in (*found.required, *found.optional) if name in mapping}
    if found.data_class == "EmbeddingData or RerankingData":
        refuse_two_texts(rows, {n: FIELDS[n] for n in found.required if n not in (columns or {})})
    return Layout(found, used, mapping.get("split"))


def _likely_columns(rows: Sequence[Mapping[str, Any]], counts: Mapping[str, int]) -> str:
    if all(any(names <= row.keys() for names in ROLES) for row in rows):
        return (
            " Each row here is one turn: a row is a whole conversation, as {'messages': [turns]}."
        )
    if {"instruction", "response"} <= counts.keys():
        alpaca = {"instruction": "instruction", "input": "context", "output": "response"}
        return (
            f" Of these you may need columns={ {o: n for o, n in alpaca.items() if n in counts} }."
        )
    lower = {name.strip().lower(): name for name in counts if name not in KNOWN_COLUMNS}
    likely = {
        ours: lower[name] for ours, names in FIELDS.items() for name in names if name in lower
    }
    return f" Some differ in case only; of these you may need columns={likely}." if likely else ""


def _shape_of(row: Mapping[str, Any], mapping: Mapping[str, str], accepts: Sequence[str]) -> str:
    fitting = [
        shape
        for shape in SHAPES.values()
        if all(row.get(mapping.get(name, name)) is not None for name in shape.required)
    ]
    first = set(fitting[0].required) if fitting else set()
    # UltraFeedback has messages and two answers. A text with a label, though, is not plain text.
    candidates = [one for one in fitting if one.name in accepts and not set(one.required) < first]
    return next((one.name for one in (*candidates, *fitting)), "")


def _mapping(counts: Counter[str], columns: Mapping[str, str]) -> dict[str, str]:
    problems = []
    for ours, theirs in columns.items():
        if ours not in FIELDS:
            hint = similar_names(ours, FIELDS) or f"; fields: {', '.join(FIELDS)}"
            problems.append(f"{ours!r} is not a field{hint}")
        if theirs not in counts:
            problems.append(f"no row has a column {theirs!r}{similar_names(theirs, counts)}")
    if problems:
        raise ConfigError(
            f"columns={dict(columns)!r} cannot be used: {'; '.join(problems)}. The data has: "
            f"{', '.join(sorted(counts))}."
        )
    # A column is read as the user maps it, and as nothing else.
    free = [name for name in counts if name not in columns.values()]
    found = {
        ours: max(present, key=lambda name: counts[name])
        for ours, names in FIELDS.items()
        if (present := [name for name in names if name in free])
    }
    return {**found, **columns}
