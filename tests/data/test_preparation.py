"""Checking rows before training: all problems are reported at once, and nothing is silent."""

import json
from collections import Counter
from functools import partial

import pytest

from lightning_peft.data.preparation import draw_split
from lightning_peft.data.supervised import SupervisedData
from lightning_peft.data.text_classification import TextClassificationData
from lightning_peft.data.validation import KINDS, Problem, describe, ranges
from lightning_peft.demo.run import BASE
from lightning_peft.errors import ConfigError

from .conftest import pairs, refusal


@pytest.fixture
def classes(build):
    return partial(build, TextClassificationData, tokenizer=str(BASE))


@pytest.fixture
def texts(make):
    return partial(make, text_unit="document", validation_share=None)


BAD = [
    {"prompt": "one", "completion": "1"},
    "{not json",
    {"prompt": "two"},
    {"prompt": " ", "completion": ""},
    {"prompt": "one", "completion": "1"},
    {"prompt": "long", "completion": "long " * 300},
    {"prompt": "mark", "completion": "an </s> inside"},
    {"prompt": "three", "completion": "3"},
]
EXPECTED = [
    ("unreadable", 2, "is not JSON"),
    ("missing", 3, "has no completion"),
    ("missing", 4, "has an empty prompt"),
    ("missing", 4, "has an empty completion"),
    ("duplicate", 5, "is the same as row 1"),
    ("long", 6, "tokens of 256 allowed"),
    ("control", 7, "'</s>'"),
]


def test_all_problems_are_reported_at_once_with_their_rows(make, write):
    data = make(write(BAD), validation_share=0)
    found = data.read().problems
    assert len(found) == len(EXPECTED)
    for problem, (kind, row, words) in zip(found, EXPECTED, strict=True):
        assert (problem.kind, problem.row) == (kind, row)
        assert words in problem.detail
    text = refusal(data)
    assert "6 of 8 rows cannot be used" in text
    for kind, row, words in EXPECTED:
        title, fix = KINDS[kind]
        assert f"{title}: {2 if kind == 'missing' else 1}" in text
        assert fix in text
        assert f"row {row} " in text
        assert words in text
    assert "skip_bad_rows=" in text


def test_bad_rows_are_written_with_reasons_and_the_rest_is_trained(make, write, tmp_path, caplog):
    target = tmp_path / "new" / "rejected.jsonl"
    for _ in range(2):  # The second comes from the cache.
        data = make(write(BAD), validation_share=0, skip_bad_rows=str(target))
        data.setup("fit")
        written = [json.loads(line) for line in target.read_text().splitlines()]
        errors = [(r["kind"], row["row"]) for row in written for r in row["reasons"]]
        assert errors == [(kind, row) for kind, row, _ in EXPECTED]
        assert written[1]["value"] == {"prompt": "two"}
        assert data.read().splits["train"]["row"][:] == [1, 8]
        assert "6 of 8 rows are left out" in caplog.text
        caplog.clear()
        target.unlink()
    assert data.record["problems"] == Counter(kind for kind, _, _ in EXPECTED)


def test_nothing_left_is_an_error_even_when_skipping(make, write, tmp_path):
    data = make(write([{"prompt": "a", "completion": ""}]), skip_bad_rows=str(tmp_path / "r"))
    with pytest.raises(ConfigError, match="No row .* is left"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "There are no rows"), (["x", "y"], "None of the first 2 rows"), (["{}"], "no.*shapes")],
)
def test_data_without_rows_is_refused(make, write, rows, message):
    with pytest.raises(ConfigError, match=message):
        make(write(rows)).setup("fit")


def test_duplicates_can_be_kept_and_long_rows_cut_and_both_are_counted(make, write):
    rows = [*pairs(3), *pairs(2), {"prompt": "long", "completion": "long " * 300}]
    data = make(write(rows), validation_share=0, duplicates="keep", over_long="truncate")
    data.setup("fit")
    train = data.record["splits"]["train"]
    assert (train["rows"], train["duplicates"], train["truncated"]) == (6, 2, 1)
    assert train["tokens_cut"] > 50
    assert train["ends_trained"] == 5
    assert train["tokens"] == sum(data.read().lengths("train"))


def test_a_row_in_two_splits_is_a_leak(make, write):
    train, held_out = write(pairs(6), "a.jsonl"), write(pairs(3, start=5), "b.jsonl")
    with pytest.raises(ConfigError, match="b.jsonl|row 1 is for validation and the same as row 6"):
        make(train, validation_data=held_out).setup("fit")
    other = write([{"prompt": "What is 1?", "completion": "Nobody knows."}], "c.jsonl")
    data = make(train, validation_data=other)
    data.setup("fit")
    # The same question with another answer may be meant, and is counted.
    assert data.record["shared_prompts"] == 1
    assert data.record["split_by"] == {"by": "files"}


def test_splits_by_column_by_folder_and_by_file(make, write, tmp_path, caplog):
    rows = [{**row, "split": "dev" if i % 3 else "train"} for i, row in enumerate(pairs(9))]
    data = make(write(rows))
    assert {s: len(d) for s, d in data.read().splits.items()} == {"train": 3, "validation": 6}
    with pytest.raises(ConfigError, match="validation_share and test_share are given"):
        make(write(rows), validation_share=0.1).setup("fit")
    with pytest.raises(ConfigError, match="has 'tarin' as split"):
        make(write([*rows, {**pairs(1, 50)[0], "split": "tarin"}])).setup("fit")
    for number, name in enumerate(("train", "val", "test")):
        write(pairs(4, 10 * number), f"folder/{name}.jsonl")
    write(["About."], "folder/README.md")
    data = make(str(tmp_path / "folder"))
    data.setup("fit")
    assert {s: set(d["file"]) for s, d in data.read().splits.items()} == {
        "train": {"train.jsonl"},
        "validation": {"val.jsonl"},
        "test": {"test.jsonl"},
    }
    assert data.record["files_left_out"] == ["README.md"]
    assert "README.md" in caplog.text
    data = make(write(pairs(60), "a.jsonl"), test_data=write(pairs(3, 70), "b.jsonl"))
    assert len(data.read().splits["test"]) == 3
    assert len(data.read().splits["validation"]) > 0


@pytest.mark.parametrize("rows", [3, 101])
def test_files_say_their_split_however_many_rows_come_first(rows, make, write, tmp_path):
    """Of unnamed rows next to a file of held-out ones, some were held out beyond the first 100.

    After reports of samples that trainers move between splits without a warning.
    """
    write(pairs(rows), "rows/all.jsonl")
    write([{"prompt": "held out", "completion": "x"}], "rows/validation.jsonl")
    data = make(tmp_path / "rows")
    data.setup("fit")
    counts = {split: len(data.read().splits[split]) for split in ("train", "validation")}
    assert counts == {"train": rows, "validation": 1}


def test_a_split_that_later_rows_name_is_not_passed_over(make, write):
    late = {"prompt": "held out", "completion": "x", "split": "test"}
    file = write([*pairs(101), late])
    assert "row 102 has 'test' as split, and the first 100 rows have none" in refusal(make(file))
    make(file, ignored_keys=["split"]).setup("fit")


def test_a_column_split_that_is_left_out_decides_nothing(make, write):
    rows = [{**row, "split": "train"} for row in pairs(60)]
    data = make(write(rows), ignored_keys=["split"], validation_share=0.2)
    assert data.read().splits["validation"]
    late = [{**pairs(1, 200)[0], "fold": "test"}]
    first = [{**row, "fold": None} for row in pairs(101)]
    mapped = make(write([*first, *late], "b.jsonl"), columns={"split": "fold"})
    assert "row 102 has 'test' as fold, and the first 100 rows have none" in refusal(mapped)


def test_a_column_split_that_is_another_field_is_no_split(classes, write):
    rows = [{"text": f"text {i}", "split": ("train", "test")[i % 2]} for i in range(120)]
    rows = [{**row, "split": "a b"} for row in rows[:102]] + rows[102:]
    data = classes(write(rows), columns={"label": "split"})
    assert data.read().problems == []
    assert data.labels == ["a b", "test", "train"]


def test_titles_of_documents_are_no_splits(texts, tmp_path, caplog):
    """One title with such a word ended the split that is drawn, and nothing was held out."""
    names = [*(f"{number}.txt" for number in range(60)), "zz-testing-guide.txt", "dev/setup.txt"]
    for name in names:
        (tmp_path / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "docs" / name).write_text(f"The document {name}.")
    assert texts(tmp_path / "docs").read().splits["validation"]
    (tmp_path / "docs" / "test.txt").write_text("Held out.")
    found = texts(tmp_path / "docs").read().splits
    assert found["test"]["file"] == ["test.txt"]
    assert "No row is held out for validation." in caplog.text
    assert "test.txt (test)" in caplog.text
    with pytest.raises(ConfigError, match=r"itself which rows(.|\n)*test.txt \(test\)"):
        texts(tmp_path / "docs", validation_share=0.1).read()


def test_the_same_row_always_falls_in_the_same_split(make, write):
    def where(rows, **options):
        splits = make(write(rows), validation_share=0.2, test_share=0.1, **options).read().splits
        return {token: s for s, d in splits.items() for token in map(tuple, d["input_ids"])}

    before, after = where(pairs(300)), where(pairs(400, start=100)[::-1])
    both = before.keys() & after.keys()
    assert len(both) == 200
    assert all(before[row] == after[row] for row in both)
    counts = Counter(before.values())
    assert 40 <= counts["validation"] <= 80
    assert 15 <= counts["test"] <= 45
    other = where(pairs(300), split_seed=1)
    assert 0 < sum(before[row] != other[row] for row in before) < 250


def test_shares_are_kept_and_depend_on_the_seed():
    digests = [bytes([i % 256, i // 256]) for i in range(4000)]
    shares = {"validation": 0.1, "test": 0.3}
    counts = Counter(draw_split(digest, 0, shares) for digest in digests)
    assert abs(counts["validation"] / 4000 - 0.1) < 0.02
    assert abs(counts["test"] / 4000 - 0.3) < 0.03
    assert {draw_split(digest, 0, {}) for digest in digests} == {"train"}


def test_a_split_that_stays_empty_is_an_error(make, write):
    with pytest.raises(ConfigError, match="None of 2 rows falls into validation"):
        make(write(pairs(2)), split_seed=3).setup("fit")


def test_a_system_prompt_is_given_to_talks_without_one(make, write, tokenizer):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    own = [{"role": "system", "content": "Mine."}, *talk]
    rows = [{"messages": talk}, {"messages": own}]
    data = make(write(rows), validation_share=0, system_prompt="Yours.")
    texts = [tokenizer.decode(ids) for ids in data.read().splits["train"]["input_ids"]]
    assert "Yours." in texts[0]
    assert "Mine." in texts[1]
    assert "Yours." not in texts[1]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {}, "chosen and rejected answers"),
        ({"text": "a", "label": 1}, {}, 'columns={"prompt": "text", "completion": "label"}'),
        ({"prompt": "a", "completion": "b"}, {"over_long": "split"}, "is for plain text"),
        ({"text": "a"}, {"system_prompt": "s"}, "plain text has no turns"),
        ({"prompt": "a", "completion": "b"}, {"max_length": 999}, "more than the 256 tokens"),
        ({"prompt": "a", "completion": "b"}, {"tokenizer": "nobody/x"}, "tokenizer='nobody/x'"),
        ({"prompt": "a", "completion": "b"}, {"chat_template": None}, "has no chat template"),
    ],
)
def test_settings_that_do_not_fit_the_rows_are_refused(make, write, row, options, message):
    assert message in refusal(make(write([row]), **options))


def test_contradictory_arguments_are_refused_together():
    with pytest.raises(ConfigError) as error:
        SupervisedData(
            "a", "b", batch_size=0, validation_share=0.6, test_share=0.5, packing=True,
            length_grouping=True, test_data="c",
        )  # fmt: skip
    text = str(error.value)
    for words in ("leave nothing to train on", "drop one", "batch_size=0", "packing leaves no"):
        assert words in text


def test_many_problems_stay_readable_and_every_row_is_named():
    found = [Problem("missing", "a", row, "has no text") for row in [*range(1, 31), 40]]
    text = describe(found, 100, limit=3)
    assert "31 of 100 rows" in text
    assert text.count("has no text") == 3
    assert "and rows 4-30, 40" in text
    both = describe([*found, Problem("long", "b", 7, "is long")], 100, limit=3)
    assert "a row 1 has no text" in both
    assert "4-30, 40 of a" in both
    assert ranges([3, 1, 2, 7, 7]) == "1-3, 7"
