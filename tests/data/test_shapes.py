import pytest

from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import SHAPES, detect_layout
from lightning_peft.errors import ConfigError

USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
TALK = [USER, ANSWER]

ROWS = [
    ("messages", {"messages": TALK}, TALK),
    ("messages", {"messages": [SYSTEM, *TALK], "id": 1}, [SYSTEM, *TALK]),
    (
        "messages",
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
            ],
            "system": "s",
        },
        [SYSTEM, *TALK],
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWER]},
        TALK,
    ),
    ("alpaca", {"instruction": "a", "input": "", "output": "b"}, TALK),
    (
        "alpaca",
        {"instruction": "a", "input": "x", "output": "b"},
        [{"role": "user", "content": "a\n\nx"}, ANSWER],
    ),
    ("prompt_completion", {"prompt": "a", "completion": "b"}, TALK),
    ("prompt_completion", {"prompt": "a", "response": "b"}, TALK),
    ("prompt_completion", {"question": "a", "answer": "b"}, TALK),
    ("prompt_completion", {"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, *TALK]),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, TALK),
    ("preference", {"chosen": TALK, "rejected": [USER, {**ANSWER, "content": "c"}]}, TALK),
    (
        "preference",
        {"prompt": "a", "chosen": TALK, "rejected": [USER, {**ANSWER, "content": "c"}]},
        TALK,
    ),
    ("preference", {"chosen": "b", "rejected": "c"}, [ANSWER]),
    ("source_target", {"source": "a", "target": "b"}, TALK),
    ("source_target", {"document": "a", "summary": "b", "id": "1"}, TALK),
    ("source_target", {"article": "a", "highlights": "b"}, TALK),
]
# What these hold is tested where they are used.
OTHERS = {"prompt", "text", "text_label", "unpaired", "tokens_tags", "image_label"}
OTHERS |= {"translation", "speech", "image_messages", "image_prompt"}
OTHERS |= {"anchor_positive", "scored_pair"}


@pytest.mark.parametrize(("shape", "row", "turns"), ROWS)
def test_a_shape_is_recognised_and_read(shape, row, turns):
    layout = detect_layout([row], None, "auto")
    assert layout.shape.name == shape
    sample = layout.parse(row)
    assert isinstance(sample, Sample), sample
    assert sample.messages == turns
    if shape == "preference":
        assert sample.rejected == [*turns[:-1], {**ANSWER, "content": "c"}]


def test_every_shape_is_tested():
    assert {shape for shape, _, _ in ROWS} | OTHERS == set(SHAPES)


def test_images_and_labels(tmp_path):
    (tmp_path / "one.png").write_bytes(b"bytes")
    path = str(tmp_path / "one.png")
    for image in (b"bytes", path, {"bytes": b"bytes", "path": "x"}, {"bytes": None, "path": path}):
        row = {"img": image, "label": 3}
        layout = detect_layout([row], None, "auto")
        assert layout.shape.name == "image_label"
        assert layout.parse(row) == Sample(image=b"bytes", label="3")
    assert Sample(image=b"a", label="x").digest() == Sample(image=b"a", label="y").digest()
    assert Sample(image=b"a", label="x").digest() != Sample(image=b"b", label="x").digest()


def test_texts_and_labels():
    assert detect_layout([{"text": "x"}], None, "auto").parse({"text": "x"}) == Sample(text="x")
    layout = detect_layout([{"text": "x", "label": 0}], None, "auto")
    assert layout.shape.name == "text_label"
    assert layout.parse({"text": "x", "label": 0}) == Sample(text="x", label="0")
    assert layout.parse({"text": "", "label": None}) == [
        ("missing", "has an empty text"),
        ("missing", "has no label"),
    ]


def test_two_texts_and_their_label():
    row = {"text": "x", "text_pair": "y", "label": "a"}
    layout = detect_layout([row], None, "auto")
    sample = layout.parse(row)
    assert sample == Sample(text="x", text_pair="y", label="a")
    assert sample.digest() != Sample(text="x", label="a").digest()
    # Where there is a second text, a row without it is not a row with one text.
    assert layout.parse({"text": "x", "label": "a"}) == [("missing", "has no text_pair")]


@pytest.mark.parametrize(
    ("label", "found"),
    [
        (" a ", "a"),
        (3, "3"),
        (3.0, "3"),
        (True, "True"),
        (0.5, [("label", "has the label 0.5; labels are names or whole numbers")]),
        (["a", "b"], [("label", "has ['a', 'b'] as label, and one label is trained")]),
        (" ", [("missing", "has no label")]),
    ],
)
def test_labels_are_names_or_whole_numbers(label, found):
    layout = detect_layout([{"text": "x", "label": "a"}], None, "text_label")
    parsed = layout.parse({"text": "x", "label": label})
    assert parsed == (found if isinstance(found, list) else Sample(text="x", label=found))


@pytest.mark.parametrize("column", ["tags", "ner_tags", "labels"])
def test_tokens_and_tags(column):
    row = {"tokens": ["a", "b"], column: [0, "B-X"]}
    layout = detect_layout([row], None, "auto")
    assert layout.shape.name == "tokens_tags"
    assert layout.parse(row) == Sample(tokens=["a", "b"], tags=["0", "B-X"])


@pytest.mark.parametrize(
    ("tokens", "tags", "kind", "message"),
    [
        (["a", "b"], ["O"], "tags", "has 2 tokens and 1 tags"),
        ([], ["O"], "missing", "has empty tokens"),
        ("a b", ["O"], "missing", "has no list as tokens: 'a b'"),
        (["a", " "], ["O", "O"], "missing", "' ' as number 1 of its tokens, which is not text"),
        (
            ["a"],
            [None],
            "missing",
            "None as number 0 of its tags, which is not text or a whole number",
        ),
        (["a"], [True], "missing", "True as number 0 of its tags"),
    ],
)
def test_wrong_tokens_and_tags_are_reported(tokens, tags, kind, message):
    layout = detect_layout([{"tokens": ["a"], "tags": ["O"]}], None, "auto")
    ((found, text),) = layout.parse({"tokens": tokens, "tags": tags})
    assert found == kind
    assert message in text


def test_most_rows_decide_and_columns_can_be_mapped():
    rows = [{"q": 1}, {"q": "a", "a": "b", "id": 3}, {"q": "c", "a": "d", "id": 4}]
    layout = detect_layout(rows, {"prompt": "q", "completion": "a"}, "auto")
    assert layout.shape.name == "prompt_completion"
    assert layout.parse(rows[1]).unused == ("id",)
    assert layout.parse(rows[1]).messages == TALK
    assert layout.parse(rows[0]) == [
        ("missing", "has a number as prompt, not text: 1"),
        ("missing", "has no completion (column 'a')"),
    ]


@pytest.mark.parametrize(
    ("rows", "columns", "shape", "message"),
    [
        ([{"a": "x"}], None, "auto", "none of the shapes that are known. Its columns: a"),
        ([{"prompt": "x"}], None, "prompt_completion", "no completion for shape="),
        ([{"prompt": "x"}], None, "alpacca", "none of auto, messages"),
        (
            [{"prompt": "x"}],
            {"promt": "prompt"},
            "auto",
            "'promt' is not a field; near names: prompt",
        ),
        ([{"query": "x"}], {"prompt": "qeury"}, "auto", "no row has a column 'qeury'; near names"),
        (
            [{"Prompt": "x", "RESPONSE": "y"}],
            None,
            "auto",
            "need columns={'prompt': 'Prompt', 'completion': 'RESPONSE'}",
        ),
        # "OpenAI format" in reports: the turns of one conversation in the place of rows.
        (TALK, None, "auto", "a row is a whole conversation, as {'messages': [turns]}"),
    ],
)
def test_unrecognised_shapes_are_refused(rows, columns, shape, message):
    with pytest.raises(ConfigError) as error:
        detect_layout(rows, columns, shape)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("turns", "kind", "message"),
    [
        (None, "missing", "has no messages"),
        ([], "missing", "has an empty messages"),
        ("text", "missing", "has no list in messages"),
        ([{"role": "robot", "content": "a"}, ANSWER], "roles", "turn 1 of messages has the role"),
        ([{"content": "a"}, ANSWER], "roles", "turn 1 of messages has no role (or from); its keys"),
        (
            [USER, {**ANSWER, "content": "<think>a"}],
            "thoughts",
            "turn 2 that do not end",
        ),
        ([{**USER, "content": "[{'type': 'text', 'text': 'a'}]"}, ANSWER], "missing", "as text"),
        (["a", ANSWER], "missing", "is 'a', not an object"),
        ([USER, {"role": "assistant", "content": " "}], "missing", "turn 2 of messages (assistant"),
        ([USER, {"role": "assistant"}], "missing", "has no text as content"),
        ([{**USER, "content": [{"type": "image"}]}, ANSWER], "missing", "parts that are not text"),
        ([USER, USER, ANSWER], "roles", "two user turns in a row"),
        ([ANSWER, USER, ANSWER], "roles", "begins with assistant"),
        ([USER, SYSTEM, ANSWER], "roles", "a system turn at place 2"),
        ([USER, ANSWER, USER], "roles", "ends with user"),
        ([USER, {"role": "tool", "content": "1"}, ANSWER], "roles", "no assistant turn asked for"),
    ],
)
def test_wrong_turns_are_reported(turns, kind, message):
    layout = detect_layout([{"messages": TALK}], None, "auto")
    found = layout.parse({"messages": turns})
    assert any(k == kind and message in text for k, text in found), found


def test_tool_calls_are_kept():
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
    }
    turns = [USER, call, {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}, ANSWER]
    sample = detect_layout([{"messages": turns}], None, "auto").parse({"messages": turns})
    assert sample.messages[1] == {**call, "content": ""}
    assert len(sample.messages) == 5


def test_identical_answers_are_not_a_preference():
    row = {"prompt": "a", "chosen": "b", "rejected": "b"}
    (problem,) = detect_layout([row], None, "auto").parse(row)
    assert problem[0] == "preference"


def test_digests_are_of_what_is_said():
    one = detect_layout([{"prompt": "a", "response": "b"}], None, "auto")
    two = detect_layout([{"messages": TALK}], None, "auto")
    first, second = one.parse({"prompt": "a", "response": "b"}), two.parse({"messages": TALK})
    assert first.digest() == second.digest() != Sample(text="ab").digest()
    assert Sample(text="\ud800").digest() != Sample(text="?").digest()


def test_roles_and_flags_of_other_programs():
    turns = [
        {"role": "User", "content": "a?", "loss_mask": 0},
        {"role": "chatgpt", "content": "b.", "loss_mask": 1},
        {"role": "user", "content": "c?"},
        {"role": "ai", "content": "d.", "loss_mask": 0},
    ]
    found = detect_layout([{"messages": TALK}], None, "auto").parse({"messages": turns})
    assert [turn["role"] for turn in found.messages] == ["user", "assistant"] * 2
    assert [turn.get("train", True) for turn in found.messages][1::2] == [True, False]


def test_columns_of_other_programs_are_named():
    turn = {"text": "a?", "role": "prompter", "message_id": "1"}
    (problem,) = detect_layout([turn], None, "auto").parse(turn)
    assert "a row is one turn, and was to be a whole conversation" in problem[1]
    choices = {"prompt": "a?", "completion": "b", "choices": ["b", "c"]}
    (problem,) = detect_layout([choices], None, "auto").parse(choices)
    assert "choices" in problem[1]
    with pytest.raises(ConfigError, match="'instruction': 'instruction', 'input': 'context'"):
        detect_layout([{"instruction": "a", "context": "b", "response": "c"}], None, "auto")
