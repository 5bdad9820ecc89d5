"""Numbers on all of the data: counted by hand here."""

import json

import pytest
from PIL import Image

from lightning_peft import (
    EmbeddingData,
    ImageData,
    PreferenceData,
    RerankingData,
    Seq2SeqData,
    SupervisedData,
    TextClassificationData,
)
from lightning_peft.data.preview import preview
from lightning_peft.data.row_content import writing_system
from lightning_peft.data.samples import Sample
from lightning_peft.demo.run import BASE

from .conftest import ALL_ROWS


def chat(*texts, system=None):
    turns = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    turns += [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]
    return {"messages": turns}


@pytest.fixture
def data_of(build, write):
    """Makes data of rows that are all trained on."""

    def data_of(rows, cls=SupervisedData, **options):
        return build(cls, write(rows), **{**ALL_ROWS, **options})

    return data_of


@pytest.mark.parametrize(
    ("text", "system"),
    [
        ("Straße 12, okay", "Latin"),
        ("Привет, GPU", "Cyrillic"),
        ("東京は大きい", "Kana"),
        ("北京很大", "Han"),
        ("123 + 4 = \ud800?", ""),
    ],
)
def test_writing_is_that_of_most_letters(text, system):
    assert writing_system(text) == system


def test_roles_turns_writing_and_rows_that_are_there_twice(data_of):
    long = chat("Two?", "Two.", "More?", "Three, four, " + "and so on, " * 30)
    rows = [chat("One?", "Yes.", system="Be short."), long, chat("Да?", "Нет"), long]
    data = data_of(rows, chat_template="plain", max_length=60, over_long="truncate")
    numbers = preview(data, 2).numbers
    found = numbers["statistics"]
    assert found["turns"] == {
        "conversations": 3,
        "least": 2,
        "most": 4,
        "mean": 3.0,
        "roles": {"user": 4, "assistant": 4, "system": 1},
    }
    assert found["writing"] == {"Latin": 2, "Cyrillic": 1}
    assert (found["duplicates"], found["in_two_splits"], found["shared_prompts"]) == (1, 0, 0)
    assert [one["row"] for one in found["longest_rows"]][0] == 2
    assert found["longest_rows"][0]["length"] == numbers["lengths"]["longest"] == 60
    assert len(found["longest_rows"]) == numbers["splits"]["train"]["rows"] == 3
    assert found["tokens"] == sum(one["length"] for one in found["longest_rows"])
    middle = sorted(one["length"] for one in found["longest_rows"])[1]
    assert (numbers["lengths"]["median"], numbers["lengths"]["percentile_95"]) == (middle, middle)
    *kept, cut = numbers["lengths"]["buckets"]
    more = numbers["splits"]["train"]["tokens_cut"]
    assert cut == {"from": 61, "to": 60 + more, "rows": 1, "cut": True}
    assert kept[-1]["to"] == 60
    assert [one["cut"] for one in kept] == [False] * len(kept)
    assert sum(one["rows"] for one in kept) == 2


def test_rows_whose_texts_differ_in_case_and_signs_are_near_duplicates(data_of):
    rows = [
        chat("What is 2 and 2?", "It is 4."),
        chat("what is  2 and 2", "It is 4!"),
        chat("What is 2 and 3?", "It is 5."),
        chat("WHAT IS 2 AND 2?", "it is 4"),
        chat("What is 2 and 3?", "It is 5."),
        chat("?!", "..."),
        chat("\u2026", "!"),
        chat("?!", "..."),
    ]
    data = data_of(rows, chat_template="plain", max_length=60, duplicates="keep")
    found = preview(data, 0).numbers["statistics"]
    # Rows that are there twice are none of them, and neither are those without letters.
    assert found["near_duplicates"] == 2
    pairs = [(one["row"], one["like_row"]) for one in found["near_duplicate_rows"]]
    assert pairs == [(2, 1), (4, 1)]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Yes, sure.", "yes \u2014 sure!", True),
        ("caf\u00e9", "Cafe\u0301", True),
        ("\u0915\u093f", "\u0915\u0940", False),
        ("\u0e01\u0e34", "\u0e01\u0e35", False),
        ("C++", "C", False),
        ("C#", "C.", False),
        ("1.5", "15", False),
        ("It is -3.", "It is 3.", False),
        ("2 - 2", "2 + 2", False),
    ],
)
def test_what_tells_texts_apart(one, other, same):
    assert (Sample(text=one).near_digest() == Sample(text=other).near_digest()) is same


def test_calls_of_tools_tell_rows_apart():
    def calling(day):
        call = {"function": {"name": "weather", "arguments": {"day": day}}}
        return Sample([{"role": "assistant", "content": "", "tool_calls": [call]}]).near_digest()

    assert calling(1) == calling(1) != calling(2)


_LONG = {"chosen": "a " * 60, "rejected": "b " * 50}


@pytest.mark.parametrize(
    ("cls", "options", "row"),
    [
        (PreferenceData, {"chat_template": "plain"}, {"prompt": "Count.", **_LONG}),
        (Seq2SeqData, {}, {"source": "c " * 60, "target": "d " * 50}),
        (EmbeddingData, {}, {"anchor": "a " * 60, "positive": "b " * 50}),
        (RerankingData, {}, {"query": "a", "positive": "b " * 60, "negative": "c " * 50}),
    ],
)
def test_a_row_of_several_texts_is_as_long_as_without_a_cut(data_of, cls, options, row):
    """Not the longest text with what is cut off all of them."""
    whole = preview(data_of([row], cls, max_length=256, **options), 0).numbers
    longest = whole["lengths"]["longest"]
    assert 60 <= longest < 256
    cut = preview(data_of([row], cls, max_length=40, over_long="truncate", **options), 0).numbers
    assert cut["splits"]["train"]["tokens_cut"] > longest - 40
    assert cut["lengths"]["longest"] == 40
    assert cut["lengths"]["buckets"][-1] == {"from": 41, "to": longest, "rows": 1, "cut": True}


def test_the_length_of_a_source_does_not_depend_on_its_target(data_of):
    rows = [{"source": "short", "target": "d " * 50}]
    options = {"max_length": 40, "max_target_length": 5, "over_long": "truncate"}
    found = preview(data_of(rows, Seq2SeqData, **options), 0).numbers
    assert found["splits"]["train"]["tokens_cut"] > 40
    assert not any(one["cut"] for one in found["lengths"]["buckets"])


def test_rows_are_found_by_their_text_whether_used_or_not(data_of):
    rows = [chat(f"What is {n}?", f"It is the number {n}.") for n in range(30)]
    rows += [chat("A lone NUMBER 7", "")]
    data = data_of(rows, chat_template="plain", validation_share=0.3)
    shown = preview(data, 2, search="Number 7")
    assert shown.numbers["search"] == {"text": "Number 7", "rows": 2}
    assert [one.row for one in shown.rows] == [8]
    assert preview(data, 2, search="the number").numbers["search"]["rows"] == 30
    assert len(preview(data, 2, search="the number").rows) == 2
    splits = {one.split for one in preview(data, 30, search="what is").rows}
    assert splits == {"train", "validation"}
    assert preview(data, 2, search="nowhere").rows == []


def test_of_a_row_that_is_split_the_part_with_the_text_is_shown(tmp_path):
    (tmp_path / "long.txt").write_text("word " * 100 + "zebra end")
    options = {"over_long": "split", "max_length": 64, "cache_dir": str(tmp_path / "cache")}
    data = SupervisedData(str(tmp_path / "long.txt"), str(BASE), validation_share=0, **options)
    (shown,) = preview(data, 3, search="Zebra").rows
    assert "zebra" in "".join(span.text for span in shown.runs)
    (first,) = preview(data, 3, search="word word").rows
    assert "zebra" not in "".join(span.text for span in first.runs)


def test_labels_are_counted_by_split(data_of):
    rows = [{"text": f"row {n}", "label": "bad" if n % 3 else "good"} for n in range(9)]
    data = data_of(rows, TextClassificationData)
    found = preview(data, 1).numbers["statistics"]
    assert found["label_counts"] == {"train": {"bad": 6, "good": 3}}
    assert "turns" not in found
    assert len(found["longest_rows"]) == 5


def test_images_have_labels_and_no_lengths(tmp_path):
    for number, label in enumerate(("cat", "cat", "dog")):
        (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
        color = (80 * number, 0, 0)
        Image.new("RGB", (8, 8), color).save(tmp_path / "images" / label / f"{number}.png")
    data = ImageData(
        str(tmp_path / "images"),
        processor={"image_processor_type": "ViTImageProcessor"},
        cache_dir=str(tmp_path / "cache"),
        validation_share=0,
    )
    shown = preview(data, 1)
    assert shown.numbers["statistics"]["label_counts"] == {"train": {"cat": 2, "dog": 1}}
    assert "lengths" not in shown.numbers
    assert shown.rows[0].runs[0].image.startswith("data:image/png;base64,")


def test_rows_of_files_of_one_name_keep_apart(tmp_path):
    bad = {"prompt": "incomplete"}
    sets = {
        "train": [chat(f"What is {n}?", f"It is {n}.") for n in range(4)],
        "held/out": [chat("Which zebra?", "This zebra."), bad, bad],
    }
    for folder, rows in sets.items():
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"tokenizer": str(BASE), "chat_template": "plain", "cache_dir": str(tmp_path / "c")}
    held = str(tmp_path / "held" / "out" / "rows.jsonl")
    rows = str(tmp_path / "train" / "rows.jsonl")
    data = SupervisedData(rows, validation_data=held, **options)
    found = preview(data, 5, search="zebra")
    # Row 1 of both files is used, and only one of them has the word.
    assert [(one.split, one.file, one.row) for one in found.rows] == [
        ("validation", "held/out/rows.jsonl", 1)
    ]
    assert [one["file"] for one in found.numbers["read_as"]] == [
        "train/rows.jsonl",
        "held/out/rows.jsonl",
    ]
    (problem,) = found.numbers["problems"]
    assert problem["numbers"] == "2-3 of held/out/rows.jsonl"
    # Of a folder, files are named with it; a file next to it keeps its name.
    folder = SupervisedData(str(tmp_path / "train"), validation_data=held, **options)
    assert {one["file"] for one in preview(folder, 0).numbers["read_as"]} == {
        "train/rows.jsonl",
        "held/out/rows.jsonl",
    }
