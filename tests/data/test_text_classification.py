"""Texts with labels: which labels there are, what is padded and cut, and what is refused."""

import json
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_peft.data.labels import similar_labels
from lightning_peft.data.text_classification import TextClassificationData
from lightning_peft.errors import ConfigError

from .conftest import ALL_ROWS, refusal


@pytest.fixture
def classified(build):
    return partial(build, TextClassificationData, **ALL_ROWS)


def rows(labels, **more):
    return [{"text": f"text {i}", "label": label, **more} for i, label in enumerate(labels)]


def train_labels(data):
    return [label for batch in data.train_dataloader() for label in batch["labels"].tolist()]


def test_labels_are_numbered_in_the_order_of_their_names(classified, write):
    data = classified(write(rows(["b", "a", "c", "b"])))
    assert data.labels == ["a", "b", "c"]
    texts = data.read().splits["train"]
    numbers = dict(zip(("a", "b", "c"), range(3), strict=True))
    batch = data.collator()(list(data.rows("train")))
    assert batch["labels"].tolist() == [numbers[label] for label in texts["label"]] == [1, 0, 2, 1]
    assert data.record["classes"] == {"train": {"a": 1, "b": 2, "c": 1}}
    assert data.record["labels"] == ["a", "b", "c"]


def test_whole_numbers_are_in_the_order_of_their_values(classified, write):
    data = classified(write(rows([10, 9, 0, 2.0])))
    assert data.labels == ["0", "2", "9", "10"]


def test_numbers_in_rows_stand_for_given_names(classified, write):
    data = classified(write(rows([1, "no", 0])), labels=["no", "yes"])
    assert data.labels == ["no", "yes"]
    assert data.read().splits["train"]["label"] == ["yes", "no", "no"]
    # Unless the names are numbers themselves.
    data = classified(write(rows([1, 2]), "other.jsonl"), labels=["2", "1"])
    assert data.read().splits["train"]["label"] == ["1", "2"]


def test_unknown_labels_are_all_reported_with_near_names(classified, write):
    data = classified(write(rows(["good", "bad", "god", 2])), labels=["bad", "good"])
    errors = refusal(data)
    assert "rows whose label cannot be used: 2" in errors
    assert (
        "row 3 has the label 'god', which is none of the 2 that are given; near names: goo"
        in errors
    )
    assert "row 4 has the label '2'" in errors


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "a"], "holds 'a' more than once"),
        (["a"], "leaves nothing to tell apart"),
        (["a", " "], "holds an empty name"),
    ],
)
def test_names_that_cannot_be_are_refused(labels, message, classified, write):
    with pytest.raises(ConfigError, match=message):
        classified(write(rows(["a"])), labels=labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "a"], "is 'a': a model that always says the same"),
        (["Not good", "not_good", "good"], "'Not good' and 'not_good'"),
        (["1", "01", "2"], "zeros .*: '01' and '1'"),
        (["1", "1.0", "2"], "zeros .*: '1' and '1.0'"),
        (["a", "b", "-100"], "has the label -100, by which programs mark what is not trained"),
        (
            ["caf\u00e9", "cafe\u0301", "bar"],
            "case, blanks, zeros or the bytes of an accent",
        ),
    ],
)
def test_labels_that_leave_nothing_to_learn_are_refused(labels, message, classified, write):
    with pytest.raises(ConfigError, match=message):
        classified(write(rows(labels))).setup("fit")


def test_other_characters_are_other_labels():
    assert similar_labels(["H\u2082O", "H2O"]) == []


def test_labels_that_differ_in_case_are_kept_where_they_are_named(classified, write):
    data = classified(write(rows(["a", "A"])), labels=["a", "A"])
    data.setup("fit")
    assert sorted(train_labels(data)) == [0, 1]


def test_classes_that_a_split_lacks_are_reported(classified, write, caplog):
    found = rows(["a", "b", "c", "a", "d"])
    for row, split in zip(found, ["train"] * 3 + ["validation"] * 2, strict=True):
        row["split"] = split
    data = classified(write(found), labels=["a", "b", "c", "d", "e"], validation_share=None)
    data.setup("fit")
    data.setup("validate")
    warnings = [record.message for record in caplog.records]
    assert warnings == data.record["notes"]
    assert warnings == [
        "Label 'd' is in validation (1 times) and never in train, so the model cannot learn to "
        "say so.",
        "Label 'e' is given and in no row.",
        "Labels 'b', 'c' are in train and not in validation.",
    ]
    assert data.record["classes"]["validation"] == {"a": 1, "b": 0, "c": 0, "d": 1, "e": 0}


def test_padding_is_not_attended_to(classified, write, tokenizer):
    texts = ["one", "one two three four"]
    data = classified(write([{"text": t, "label": t[:5]} for t in texts]))
    batch = data.collator()(list(data.rows("train")))
    wanted = [tokenizer(text)["input_ids"] for text in texts]
    for ids, mask, right in zip(batch["input_ids"], batch["attention_mask"], wanted, strict=True):
        assert ids[: len(right)].tolist() == right
        assert set(ids[len(right) :].tolist()) <= {tokenizer.pad_token_id}
        assert mask.tolist() == [1] * len(right) + [0] * (len(ids) - len(right))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_long_rows_are_refused_or_cut_and_counted(classified, write, tokenizer):
    long = "one two three four five six"
    path = write([{"text": long, "label": "a"}, {"text": "x", "label": "b"}])
    count = len(tokenizer(long)["input_ids"])
    with pytest.raises(ConfigError, match=f"row 1 has {count} tokens, and 5 are allowed"):
        classified(path, max_length=5).setup("fit")
    data = classified(path, max_length=5, over_long="truncate")
    assert data.read().splits["train"]["input_ids"][0] == tokenizer(long)["input_ids"][:5]
    train = data.record["splits"]["train"]
    assert (train["truncated"], train["tokens_cut"]) == (1, count - 5)


def test_texts_with_special_tokens_or_without_tokens_are_refused(classified, write):
    path = write([*rows("ab"), {"text": "the end</s>", "label": "a"}])
    with pytest.raises(ConfigError, match="row 3 has the special token '</s>' inside its text"):
        classified(path).setup("fit")


def test_two_texts_are_one_row_with_their_types(classified, write, bert):
    found = [
        {"text": "a b", "text_pair": "c", "label": "x"},
        {"text": "a", "text_pair": "d e f", "label": "y"},
    ]
    data = classified(write(found), tokenizer=bert)
    batch = data.collator()(list(data.rows("train")))
    cls, sep, pad = 2, 3, 0
    a, b, f, _, _, c, d, e = range(4, 12)
    assert batch["input_ids"].tolist() == [
        [cls, a, b, sep, c, sep, pad],
        [cls, a, sep, d, e, f, sep],
    ]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]
    cut = classified(write(found), tokenizer=bert, max_length=6, over_long="truncate")
    assert cut.read().splits["train"]["input_ids"][1] == [cls, a, sep, d, e, sep]


def test_a_text_of_which_nothing_is_left_is_refused(classified, write, bert):
    path = write([{"text": "a", "label": "x"}, {"text": "\u200b", "label": "y"}])
    with pytest.raises(ConfigError, match="row 2 has a text of which the tokenizer makes no token"):
        classified(path, tokenizer=bert).setup("fit")


def test_equal_texts_with_other_labels_are_counted(classified, write):
    found = [{**row, "split": "train"} for row in rows("ab")]
    found += [{**found[0], "label": "b"}, {**found[0], "label": "c", "split": "validation"}]
    data = classified(write(found), validation_share=None)
    record = data.record
    assert record["shared_prompts"] == 1
    assert record["splits"]["train"]["contradictions"] == 1
    assert record["splits"]["validation"]["contradictions"] == 1
    note = "1 rows of train have the text of an earlier row and another label."
    assert note in record["notes"]


def test_other_shapes_are_refused(classified, write):
    with pytest.raises(ConfigError, match="has no label for shape='text_label'"):
        classified(write([{"text": "a"}])).setup("fit")


def test_rows_that_also_look_like_another_shape(classified, write):
    found = rows("ab", prompt="p", completion="c")
    assert classified(write(found)).labels == ["a", "b"]


@pytest.mark.parametrize("name", ["docstrings", "names"])
def test_the_data_of_the_small_recipes_is_what_its_script_makes(name):
    script = Path(__file__).parents[2] / "recipes" / "small" / "data" / f"{name}.py"
    made = runpy.run_path(str(script))["rows"]()
    text = script.with_suffix(".jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == made
    assert len(text) < 60_000
