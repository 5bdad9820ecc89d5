"""Rows with any keys anywhere: none of them is dropped without being named or refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from properties import MANY

from lightning_peft.data.encoding import Encoder
from lightning_peft.data.row_keys import is_turn
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import detect_layout
from lightning_peft.data.template_context import is_empty
from lightning_peft.data.templates import find_template
from lightning_peft.data.turns import FLAGS, REASONING_KEYS, parse_flag
from lightning_peft.data.validation import EncodingProblem

from .test_row_keys import READS

ON = (*FLAGS, "weights", "loss_weight", "sample_weight", "example_weight", "loss_scale")
TURN_NAMES = [
    *("reasoning_content", "reasoning", "thinking", "thoughts", "weight", "train", "training"),
    *("loss", "trainable", "weights", "wieght", "train_detail", "tool_calls", "function_call"),
    *("tool_call_id", "name", "images", "audio", "refusal", "channel", "id", "date", "prefix"),
    *("mask", "tool_plan", "annotations", "tools", "recipient", "end_turn", "cache_control"),
]
ROW_NAMES = [
    *("tools", "functions", "documents", "chat_template_kwargs", "system", "system_prompt"),
    *("style", "history", "reasoning", "thinking", "weight", "sample_weight", "train", "label"),
    *("id", "source", "images", "audio", "parallel_tool_calls", "metadata", "sytem", "Tools"),
    *("enable_thinking", "split_by", "score", "text_pair", "function", "document", "input"),
]
TOOL = {"name": "f", "parameters": {"type": "object"}}
WORDS = st.sampled_from(["a", "No.", "0", "1", "0.5", "final", "analysis", "b c"])
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, 0.0, 1.0, 0.5, -1]),
    WORDS,
    st.sampled_from(
        [[], {}, "", [TOOL], {"style": "low"}, [{"text": "a"}], {"a": 1}, [["a", "b"]]]
    ),
    st.sampled_from([[{"name": "f", "arguments": {"a": 1}}], '[{"name": "f", "arguments": "{}"}]']),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.sampled_from(["a", "name"]), WORDS, max_size=2),
)
FREE = st.text("abcdefgh_", min_size=3, max_size=9)


def turn(role: str, content: Any) -> Any:
    keys = st.dictionaries(st.one_of(st.sampled_from(TURN_NAMES), FREE), VALUES, max_size=3)
    return keys.map(lambda extra: {**extra, "role": role, "content": content})


def answers(text: str) -> Any:
    part = st.dictionaries(FREE, WORDS, max_size=2)
    parts = part.map(lambda extra: [{**extra, "type": "text", "text": text}])
    return st.one_of(
        turn("assistant", text), parts.flatmap(lambda content: turn("assistant", content))
    )


def talk(ends: str = "b.") -> Any:
    return st.tuples(turn("user", "a?"), answers("x."), turn("user", "c?"), answers(ends)).map(list)


BASES = {
    "messages": st.fixed_dictionaries({"messages": talk()}),
    "pair": st.fixed_dictionaries(
        {
            "prompt": st.just("a?"),
            "completion": st.one_of(st.just("b."), answers("b.").map(lambda t: [t])),
        }
    ),
    "alpaca": st.fixed_dictionaries({"instruction": st.just("a?"), "output": st.just("b.")}),
    "preference": st.fixed_dictionaries(
        {
            "prompt": turn("user", "a?").map(lambda t: [t]),
            "chosen": answers("b.").map(lambda t: [t]),
            "rejected": answers("d.").map(lambda t: [t]),
        }
    ),
}


def rows(base: str) -> Any:
    names = st.one_of(st.sampled_from(ROW_NAMES), FREE)
    extra = st.dictionaries(names, VALUES, max_size=3)
    return st.tuples(BASES[base], extra).map(lambda both: {**both[1], **both[0]})


class Read:
    """What becomes of a row: problems, or tokens with labels and the keys that are not used."""

    def __init__(self, encoder: Encoder, row: dict[str, Any], like: dict[str, Any]) -> None:
        layout = replace(detect_layout([like], None, "auto"), variables=encoder.variables)
        sample = layout.parse(row)
        self.refused = not isinstance(sample, Sample)
        self.named: set[str] = set()
        self.rows: list[Any] = []
        if not isinstance(sample, Sample):
            return
        self.named |= set(sample.unused)
        try:
            for turns in filter(None, (sample.messages, sample.rejected)):
                one = Sample(turns, context=sample.context)
                self.named |= set(encoder.unused(one))
                self.rows += [(e.input_ids, e.labels) for e in encoder.encode(one)]
        except EncodingProblem:
            self.refused = True

    def names(self, path: tuple[Any, ...]) -> bool:
        key = ("content[]." if len(path) > 3 else "") + str(path[-1])
        if (
            len(path) == 3
            and key in REASONING_KEYS
            and f"messages[].{REASONING_KEYS[0]}" in self.named
        ):
            # An answer has them under one name.
            return True
        return any(
            name in (key, f"messages[].{key}") or name.endswith(f"[].{key}") for name in self.named
        )


def keys_of(row: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields the path and value of every key that a shape does not need."""
    for name, value in row.items():
        if isinstance(value, list) and value and all(map(is_turn, value)):
            for place, one in enumerate(value):
                for key, inner in one.items():
                    if key == "content" and isinstance(inner, list):
                        for part in inner[0]:
                            if part not in ("type", "text"):
                                yield (name, place, key, 0, part), inner[0][part]
                    elif key not in ("role", "content"):
                        yield (name, place, key), inner
        elif name not in ("prompt", "completion", "instruction", "output"):
            yield (name,), value


def without(row: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    less = copy.deepcopy(row)
    inner: Any = less
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    return less


def check(encoder: Encoder, row: dict[str, Any]) -> None:
    found = Read(encoder, row, row)
    if found.refused:
        return
    for path, value in keys_of(row):
        on = path[-1] in ON and parse_flag(value) is True
        # A turn that is not an answer is never trained.
        off = path[-1] in FLAGS and len(path) == 3 and row[path[0]][path[1]]["role"] == "user"
        # Nor is an answer before the last one where the loss is that of completions.
        off |= path[:2] == ("messages", 1) and encoder._texts.loss_on == "completion"
        variable = path[-1] == "style" or path[-1] == "chat_template_kwargs"
        if is_empty(value) or on or off or (variable and not value) or found.names(path):
            continue
        less = Read(encoder, without(row, path), without(row, path))
        assert less.refused or less.rows != found.rows, (path, value, found.named)


@pytest.fixture(scope="module")
def encoders(tokenizer: Any) -> list[Encoder]:
    # One template that reads many keys, one that reads none, and one that says what is an answer.
    marked = READS.replace(
        "{{- m.content }}", "{% generation %}{{- m.content }}{% endgeneration %}"
    )
    return [
        Encoder(tokenizer, find_template(tokenizer, template), 512, loss_on, "error", reasoning)
        for template, loss_on, reasoning in (
            (READS, "assistant", "train"),
            (READS, "completion", "mask"),
            ("plain", "assistant", "train"),
            (marked, "assistant", "train"),
        )
    ]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("examples", [40, MANY])
def test_every_key_is_used_named_or_refused(
    encoders: list[Encoder], base: str, examples: int
) -> None:
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(rows(base), st.sampled_from(range(len(encoders))))
    def holds(row: dict[str, Any], place: int) -> None:
        check(encoders[place], row)

    holds()


def test_the_check_can_fail(encoders: list[Encoder], monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "a?", "mood": "x"},
            {"role": "assistant", "content": "b."},
        ]
    }
    check(encoders[0], row)
    monkeypatch.setattr(Encoder, "unused", lambda self, sample: [])
    with pytest.raises(AssertionError, match="mood"):
        check(encoders[0], row)
