"""Keys of rows and turns: each is used, named with its rows, or refused."""

import json
import logging
from dataclasses import replace
from functools import partial

import pytest

from lightning_peft.data.preview import preview
from lightning_peft.data.row_keys import describe_unused
from lightning_peft.data.samples import Sample
from lightning_peft.data.sequence_to_sequence import Seq2SeqData
from lightning_peft.data.shapes import detect_layout
from lightning_peft.demo.run import BASE
from lightning_peft.errors import ConfigError

from .conftest import pairs

TALK = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}]
# Reads what the templates of chat models read.
READS = (
    "{%- if tools %}{{ '[tools]' }}{%- for t in tools %}{{ t | tojson }}{%- endfor %}\n{%- endif %}"
    "{%- if style %}{{ '[' + style + ']' }}{%- endif %}"
    "{%- for m in messages %}{{- '[' + m.role }}{%- if m.name %}{{ ':' + m.name }}{%- endif %}]"
    "{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{%- endif %}"
    "{{- m.content }}{%- for c in m.tool_calls or [] %}"
    "{{- '<call>' + c.function.name + (c.function.arguments | tojson) + '</call>' }}{%- endfor %}"
    "{{- eos_token if m.role == 'assistant' }}\n{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '[assistant]' }}{%- endif %}"
)


def parsed(row, variables=frozenset(), first=None):
    layout = detect_layout([first or row], None, "auto")
    return replace(layout, variables=variables).parse(row)


def talk(**keys):
    return [TALK[0], {**TALK[1], **keys}]


def shown(data):
    """Returns the trained and untrained texts of each row, in order."""
    prepared = data.read()
    return [[(s.trained, s.text) for s in data.render_row(row)] for row in prepared.splits["train"]]


@pytest.fixture
def made(make, write):
    """Makes data of rows whose template reads names, tools, thoughts and a variable."""
    reading = partial(make, chat_template=READS, validation_share=0.0)
    return lambda rows, **options: reading(write(rows), **options)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"weight": 0.5}, "has weight=0.5 for the whole row: it is trained (1) or not (0)"),
        ({"weight": 0}, "has weight=0 for the whole row: to leave a row out, take it out"),
        ({"train": False}, "has train=False for the whole row"),
        ({"sample_weight": "2.0"}, "has sample_weight='2.0' for the whole row"),
        ({"label": False}, "has label=False: a bad answer would be learnt as a good one"),
        ({"images": ["a.png"]}, "has images, and the answer would be learnt without seeing"),
        ({"audio": "a.wav"}, "has audio, and the answer"),
        ({"sytem": "Be brief."}, "has the key 'sytem' (nearest key that is read: 'system')"),
        ({"Tools": [{"name": "f"}]}, "has the key 'Tools'"),
        ({"chat_template_kwarg": {"a": 1}}, "nearest key that is read: 'chat_template_kwargs'"),
        ({"system": "a", "system_prompt": "b"}, "has the key 'system_prompt' (is read twice)"),
        ({"tools": "weather"}, "has 'weather' as tools, not a list of tools"),
        ({"chat_template_kwargs": "[1]"}, "as chat_template_kwargs, not an object"),
        ({"chat_template_kwargs": {"tokenize": False}}, "has tokenize in chat_template_kwargs"),
        ({"documents": "a text"}, "has 'a text' as documents, not a list of objects"),
    ],
)
@pytest.mark.parametrize("base", [{"messages": TALK}, {"prompt": "a?", "completion": "b."}])
def test_columns_that_change_what_is_learnt_are_refused(base, row, message):
    problems = parsed({**base, **row})
    assert isinstance(problems, list)
    assert any(message in text for _, text in problems), problems


def test_what_a_question_is_about_is_not_left_out():
    """Rows of questions, contexts and answers were trained without their contexts."""
    row = {"question": "Who?", "context": "Ada sat.", "answer": "Ada"}
    ((kind, text),) = parsed(row)
    assert kind == "key"
    assert "has context, which the model would answer without" in text
    columns = {"instruction": "question", "input": "context", "output": "answer"}
    sample = detect_layout([row], columns, "auto").parse(row)
    assert sample.messages[0]["content"] == "Who?\n\nAda sat."
    assert parsed({**row, "messages": TALK}).unused == ("question", "context", "answer")


def test_what_the_prompt_has_already_is_only_named():
    """Sets of instructions have a column with all that the model is asked, made of the others."""
    asked = {"instruction": " Add. ", "input": "1\n2", "contexts": ["Add.", 3]}
    row = {**asked, "prompt": "Do this: Add.\n\n### Input:\n1 2", "response": "3"}
    assert parsed(row).unused == ("instruction", "input", "contexts")
    turns = [{"role": "user", "content": row["prompt"]}]
    assert parsed({**row, "prompt": turns}).unused == ("instruction", "input", "contexts")
    ((_, text),) = parsed({**row, "input": "4"})
    assert "has input, which the model would answer without" in text


def test_of_two_answers_too_what_they_are_about_is_not_left_out():
    row = {"prompt": "Who?", "chosen": "Ada", "rejected": "Bob", "context": "Ada sat."}
    ((_, text),) = parsed(row)
    assert text == "has context, which the model would answer without: put it into the prompt"


@pytest.mark.parametrize(
    "row",
    [
        {"weight": 1, "train": True, "sample_weight": "1.0"},
        {"images": [], "audio": None, "tools": [], "chat_template_kwargs": {}, "label": None},
    ],
)
def test_columns_that_ask_for_nothing_special_are_neither_named_nor_refused(row):
    assert parsed({"messages": TALK, **row}) == Sample(TALK)


def test_a_column_is_found_in_a_row_after_the_first_ones(made):
    rows = [{"prompt": f"{i}?", "completion": f"{i}."} for i in range(120)]
    rows[110]["system"] = "Be brief."
    rows[111]["tools"] = json.dumps([{"name": "weather", "parameters": {}}])
    rows[112]["style"] = "loud"
    rows[113]["note"] = "late"
    data = made(rows)
    texts = ["".join(text for _, text in row) for row in shown(data)]
    assert "Be brief." in texts[110]
    assert '"name": "weather"' in texts[111]
    assert "[loud]" in texts[112]
    assert [describe_unused([key]) for key in data.read().summary["keys_unused"]] == [
        "'note' (rows 114)"
    ]


def test_keys_that_nothing_uses_are_named_with_their_rows(made, caplog):
    rows = [{"messages": talk(id=i), "source": "web"} for i in range(1, 4)]
    rows.append({"messages": [{**TALK[0], "name": "Ada", "mood": "glad"}, TALK[1]]})
    rows += [
        {"messages": [TALK[0], {**TALK[1], "content": [{"type": "text", "text": "c", "at": 1}]}]},
        {"conversations": None, "messages": talk(content="d", source="x")},
    ]
    data = made(rows, duplicates="keep")
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
        data.setup("fit")
    (line,) = [r.getMessage() for r in caplog.records if "that are not used" in r.getMessage()]
    assert "'messages[].id' (rows 1-3); 'source' (rows 1-3)" in line
    assert "'messages[].content[].at' (rows 5)" in line
    assert "'messages[].mood' (rows 4)" in line
    assert "'messages[].source' (rows 6)" in line
    assert "name" not in line.partition("ignored_keys")[0]
    found = preview(data, 0).numbers["keys_unused"]
    assert {"key": "source", "count": 3, "rows": {"rows.jsonl": "1-3"}} in found
    assert len(found) == 5


def test_ignored_keys_are_neither_named_nor_refused(made):
    rows = [
        {"messages": talk(weight=0.5, id=1, content=[{"type": "text", "text": "b", "at": 1}])},
        {"prompt": 3, "messages": [TALK[0], {"role": "assistant", "content": "c"}], "weight": 0.5},
    ]
    assert len(made(rows).read().problems) == 2
    data = made(rows, ignored_keys=["weight", "id", "at", "prompt"])
    assert data.read().problems == []
    assert data.read().summary["keys_unused"] == []
    with pytest.raises(ConfigError, match=r"no row has 'wieght'; near names: weight"):
        made(rows, ignored_keys=["wieght"]).read()


def test_unused_keys_are_described_by_file():
    summary = {
        "keys_unused": [
            {"key": "id", "count": 5, "rows": {"a.jsonl": "1-3", "b.jsonl": "2, 4"}},
            {"key": "url", "count": 1, "rows": {"b.jsonl": "4"}},
        ]
    }
    found = describe_unused(summary["keys_unused"])
    assert found == "'id' (rows 1-3 of a.jsonl; rows 2, 4 of b.jsonl); 'url' (rows 4)"
    assert describe_unused([]) == ""


def test_a_variable_that_is_given_twice_is_named():
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}]
    row = {"messages": turns, "style": "loud", "chat_template_kwargs": {"style": "low"}}
    layout = replace(detect_layout([row], None, "auto"), variables=frozenset({"style"}))
    sample = layout.parse(row)
    assert sample.context == {"style": "low"}
    assert sample.unused == ("style",)
    assert layout.parse(row | {"style": "low"}).unused == ()


def test_a_row_with_messages_and_two_answers_is_a_preference_where_those_are_wanted():
    other = [TALK[0], {"role": "assistant", "content": "c."}]
    row = {"messages": TALK, "chosen": TALK, "rejected": other, "prompt": "a?"}
    layout = detect_layout([row], None, "auto", ("preference",))
    assert layout.shape.name == "preference"
    assert (layout.parse(row).messages, layout.parse(row).rejected) == (TALK, other)
    assert detect_layout([row], None, "auto", ("messages",)).shape.name == "messages"
    # A label is still not left out for a shape without one.
    assert detect_layout([{"text": "a", "label": "b"}], None, "auto", ("text",)).shape.name == (
        "text_label"
    )


def test_a_conversation_with_two_answers_to_its_end():
    row = {
        "conversations": [{"from": "human", "value": "a?"}],
        "chosen": {"from": "gpt", "value": "b."},
        "rejected": {"from": "gpt", "value": "c."},
    }
    sample = detect_layout([row], None, "auto", ("preference",)).parse(row)
    assert sample.messages == TALK
    assert sample.rejected[-1] == {"role": "assistant", "content": "c."}


def test_a_prompt_that_is_not_in_its_answers_is_refused():
    other = [TALK[0], {"role": "assistant", "content": "c."}]
    row = {"prompt": "Another one?", "chosen": TALK, "rejected": other}
    assert parsed(row) == [
        ("preference", "has the prompt 'Another one?', and answers that begin with other turns")
    ]


def test_turns_in_json_text_and_history_are_read():
    assert parsed({"messages": json.dumps(TALK)}) == Sample(TALK)
    assert parsed({"prompt": json.dumps(TALK[:1]), "completion": "b."}) == Sample(TALK)
    # JSON that is not turns is a text like any other.
    (user, _) = parsed({"prompt": '[{"a": 1}]', "completion": "b."}).messages
    assert user["content"] == '[{"a": 1}]'
    row = {"instruction": "a?", "output": "b.", "history": [["c?", "d."]]}
    earlier = [{"role": "user", "content": "c?"}, {"role": "assistant", "content": "d."}]
    assert parsed(row) == Sample([*earlier, *TALK])
    assert parsed({**row, "history": "c?"}) == [
        ("missing", "has 'c?' as history, not a list of questions with their answers")
    ]


def test_two_system_texts_are_refused_unless_they_are_the_same():
    turns = [{"role": "system", "content": "s"}, *TALK]
    assert parsed({"messages": turns, "system": "s"}) == Sample(turns)
    assert parsed({"messages": turns, "system": "t"}) == [
        ("roles", "has one text as system and another in the system turn of its messages")
    ]


def test_an_encoder_without_a_template_refuses_what_only_a_template_writes(build, write):
    rows = [{"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}]
    rows.append({"prompt": "a", "completion": [{"role": "assistant", "content": "b", "x": 1}]})
    rows.append({"prompt": "c", "completion": "d", "id": 3})
    data = build(Seq2SeqData, write(rows), tokenizer=str(BASE), shape="prompt_completion")
    assert [problem.detail for problem in data.read().problems] == [
        "has tools, and no chat template that would write it",
        "has x in turn 2, and no template writes them",
    ]
    assert [key["key"] for key in data.read().summary["keys_unused"]] == ["id"]


def test_extra_columns_are_named_for_every_kind_of_data(make, write):
    rows = [{"text": f"Text {i}.", "id": i, "weight": 1} for i in range(3)]
    data = make(write(rows), chat_template=None, validation_share=0.0)
    assert [describe_unused([key]) for key in data.read().summary["keys_unused"]] == [
        "'id' (rows 1-3)"
    ]
    heavy = make(write([{"text": "Text.", "weight": 0.5}], "heavy.jsonl"), chat_template=None)
    (problem,) = heavy.read().problems
    assert problem.kind == "weight"


def test_rows_with_equal_texts_are_duplicates_whatever_their_ids(make, write):
    rows = [{"messages": talk(id=1)}, {"messages": talk(id=2)}, *pairs(1)]
    found = make(write(rows[:2]), validation_share=0.0).read().problems
    assert [problem.kind for problem in found] == ["duplicate"]
