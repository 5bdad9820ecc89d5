"""Answers that are wanted or not: how rows are read, and the mismatched answers of a batch."""

import pytest

from lightning_peft.data.encoding import IGNORED
from lightning_peft.data.unpaired import UnpairedPreferenceData, collate
from lightning_peft.errors import ConfigError

from .conftest import TALKS, refusal


@pytest.fixture
def answers(build, write):
    return lambda rows, **options: build(UnpairedPreferenceData, write(rows), **TALKS, **options)


def rows(count):
    labels = [True, False, 1, 0, "True", "false"]
    return [
        {"prompt": f"What is {i}?", "completion": f"It is {i}.", "label": labels[i % 6]}
        for i in range(count)
    ]


def test_rows_keep_their_label_and_train_the_answer(answers):
    data = answers(rows(12), validation_share=0)
    found = data.read().splits["train"]
    assert [row["desirable"] for row in found] == [True, False] * 6
    for row in found:
        first = next(place for place, label in enumerate(row["labels"]) if label != IGNORED)
        number = row["row"] - 1
        assert data.tokenizer.decode(row["input_ids"][first:]) == f"It is {number}.</s>"
        assert f"What is {number}?" in data.tokenizer.decode(row["input_ids"][:first])
    counts = data.read().summary["splits"]["train"]
    assert (counts["rows"], counts["desirable"], counts["ends_trained"]) == (12, 6, 12)


def test_pairs_become_two_rows_of_the_same_tokens(answers):
    pairs = [{"prompt": f"{i}?", "chosen": f"Yes {i}.", "rejected": f"No {i}."} for i in range(6)]
    apart = [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair in pairs
        for name in ("chosen", "rejected")
    ]
    found = [
        answers(given, validation_share=0)
        .read()
        .splits["train"]
        .select_columns(["input_ids", "labels", "desirable"])
        .to_list()
        for given in (pairs, apart)
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 12


def test_each_prompt_gets_the_answer_of_the_row_before():
    batch = collate(
        [
            {"input_ids": [1, 5, 2], "labels": [-100, 5, 2], "desirable": True},
            {"input_ids": [1, 6, 7, 8, 2], "labels": [-100, -100, 7, 8, 2], "desirable": False},
        ],
        pad_token_id=9,
        max_length=4,
    )
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 5, 2, 9, 9], [1, 6, 7, 8, 2]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        "labels": [[-100, 5, 2, -100, -100], [-100, -100, 7, 8, 2]],
        "desirable": [True, False],
        "kl_input_ids": [[1, 7, 8, 2], [1, 6, 5, 2]],
        "kl_attention_mask": [[1, 1, 1, 1], [1, 1, 1, 1]],
        "kl_labels": [[-100, 7, 8, 2], [-100, -100, 5, 2]],
    }


def test_answers_to_the_same_prompt_are_no_mismatched_ones():
    prompts = [(1, 5), (1, 5), (1, 6), (1, 6)]
    batch = [
        {
            "input_ids": [*prompt, 10 + place],
            "labels": [-100, -100, 10 + place],
            "desirable": place % 2 == 0,
        }
        for place, prompt in enumerate(prompts)
    ]
    made = collate(batch, pad_token_id=9, max_length=4)
    assert made["kl_input_ids"].tolist() == [[1, 5, 13], [1, 5, 13], [1, 6, 11], [1, 6, 11]]
    one_prompt = collate(batch[:2], pad_token_id=9, max_length=4)
    assert one_prompt["kl_labels"].unique().tolist() == [-100]


def test_a_row_alone_has_no_mismatched_answer():
    row = {"input_ids": [1, 5, 2], "labels": [-100, 5, 2], "desirable": True}
    assert collate([row], 9, 4)["kl_labels"].tolist() == [[-100, -100, -100]]


def test_all_problems_are_reported_by_row(answers):
    bad = [
        {"prompt": "A?", "completion": "Yes.", "label": "good"},
        {"prompt": "", "completion": "", "label": True},
        {"prompt": "B?", "completion": "Yes.", "label": None},
    ]
    errors = refusal(answers([*rows(8), *bad]))
    assert "3 of 11 rows cannot be used" in errors
    assert "row 9 has 'good' as label, which is true or false" in errors
    assert "row 10 has an empty prompt" in errors
    assert "row 11 has no label" in errors


@pytest.mark.parametrize(("label", "name"), [(True, "true"), (False, "false")])
def test_one_label_teaches_nothing(label, name, answers):
    given = [{**row, "label": label} for row in rows(10)]
    with pytest.raises(ConfigError, match=rf"All 10 training rows of .* have the label {name}"):
        answers(given, validation_share=0).setup("fit")


def test_a_chat_is_not_shown_an_unwanted_answer_as_expected(answers):
    given = [{**row, "split": ("train", "validation")[i > 7]} for i, row in enumerate(rows(12))]
    held_out = answers(given).prompts["held_out"]
    assert [turns[-1]["content"] for turns in held_out] == ["It is 8.", "It is 10."]


def test_rows_with_a_label_are_still_pairs_where_no_label_is_read():
    from lightning_peft.data.shapes import detect_layout

    assert detect_layout(rows(3), None, "auto", ("messages", "prompt_completion")).shape.name == (
        "prompt_completion"
    )
    assert detect_layout(rows(3), None, "auto", ("unpaired",)).shape.name == "unpaired"
