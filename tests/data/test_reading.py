import gzip
import json

import datasets
import pandas
import pytest
from datasets import Dataset

from lightning_peft.data.reading import Source, digest_of_files
from lightning_peft.errors import ConfigError


def rows(path, split=None, **options):
    return list(Source(str(path), split, **options).rows())


TABLE = [{"prompt": "What is 7?", "completion": "007"}, {"prompt": "None?", "completion": "NA"}]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    frame = pandas.DataFrame(TABLE)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, TABLE)))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, TABLE)))
    (tmp_path / "c.json").write_text(json.dumps(TABLE))
    (tmp_path / "d.json").write_text(json.dumps({"version": 1, "data": TABLE}))
    frame.to_csv(tmp_path / "e.csv", index=False)
    frame.to_csv(tmp_path / "f.tsv", index=False, sep="\t")
    Dataset.from_list(TABLE).to_parquet(tmp_path / "g.parquet")
    frame.to_csv(tmp_path / "h.csv.gz", index=False)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 8
    for file in files:
        found = rows(file)
        # "007" and "NA" stay text.
        assert [row.value for row in found] == TABLE, file.name
        assert [row.number for row in found] == [1, 2]
        assert {row.file for row in found} == {file.name}


def test_a_short_line_of_a_table_has_no_value(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n"1\n1",2\n3\n')
    assert [row.value for row in rows(tmp_path / "a.csv")] == [
        {"a": "1\n1", "b": "2"},
        {"a": "3", "b": ""},
    ]


def test_bad_lines_keep_their_numbers_and_do_not_hide_others(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{broken\n[1]\n{"a": "\xff"}\n{"a": 2}\n')
    found = rows(file)
    assert [(row.number, row.value) for row in found] == [
        (1, {"a": 1}),
        (3, None),
        (4, None),
        (5, None),
        (6, {"a": 2}),
    ]
    problems = [row.problem for row in found]
    assert "not JSON at character 2 ('broken')" in problems[1]
    assert "is a list, not an object" in problems[2]
    assert "UTF-8 (byte 8)" in problems[3]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("line", [(1, "one"), (2, "two"), (4, "three")]),
        ("paragraph", [(1, "one\ntwo"), (2, "three")]),
        ("document", [(1, "one\ntwo\n\nthree\n")]),
    ],
)
def test_text_files_are_read_by_unit(tmp_path, unit, expected):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n\nthree\n")
    found = [(row.number, row.value["text"]) for row in rows(file, text_unit=unit)]
    assert [(n, text.strip()) for n, text in found] == [(n, text.strip()) for n, text in expected]


def test_a_folder_names_its_splits_and_what_it_leaves_out(tmp_path):
    (tmp_path / "train-part1.jsonl").write_text('{"a": 1}\n{"a": 2}')
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "x.jsonl").write_text('{"a": 3}')
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".hidden.jsonl").write_text('{"a": 9}')
    found = [(row.file, row.split, row.value["a"]) for row in rows(tmp_path)]
    assert found == [
        ("train-part1.jsonl", "train", 1),
        ("train-part1.jsonl", "train", 2),
        ("val/x.jsonl", "validation", 3),
    ]
    source = Source(str(tmp_path))
    assert source.left_out() == ["README.md"]
    assert [row.value["a"] for row in rows(tmp_path, limit=1)] == [1, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"a": [1], "b": [2, 3]}', r"2 lists \(a, b\)"),
        ("a.json", "3", "holds a number"),
        ("a.csv", 'a,b\n1,2\n"x', "a quote that is never closed in line 3, field 1"),
        ("a.csv", "a,b\n1,2,3\n4,5,6\n", "3 fields in row 1 below the 2 column names"),
        ("a.csv", "a,a\n1,2\n", "'a'. twice"),
        ("a.parquet", "nothing", "cannot be read as parquet"),
        ("a.docx", "x", "document of Word: save it as plain text"),
        ("a.dat", "x", "of no kind that can be read"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        rows(tmp_path / name)
    assert name in str(error.value)


def test_a_path_that_is_not_there_names_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"Nearest names there: train\.jsonl"):
        rows(tmp_path / "trian.jsonl")
    with pytest.raises(ConfigError, match="holds no data"):
        rows((tmp_path / "empty").mkdir() or tmp_path / "empty")
    with pytest.raises(ConfigError, match="'nobody/nothing' is not a file or folder here"):
        rows("nobody/nothing")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_the_library_is_read_split_by_split(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for name in ("train", "test"):
        lines = [json.dumps({"prompt": f"{name} {i}", "completion": "x"}) for i in range(3)]
        (tmp_path / "set" / f"{name}.jsonl").write_text("\n".join(lines))
    # The library reads a folder as it reads a dataset on the hub.
    source = Source(str(tmp_path / "set"), streaming=streaming, limit=2)
    found = [(row.file, row.number, row.split, row.value["prompt"]) for row in source._hub_rows()]
    assert found == [
        ("train", 1, "train", "train 0"),
        ("train", 2, "train", "train 1"),
        ("test", 1, "test", "test 0"),
        ("test", 2, "test", "test 1"),
    ]
    one = Source(str(tmp_path / "set"), "validation", streaming=streaming, limit=1)
    assert [(row.split, row.file) for row in one._hub_rows()] == [("validation", "train")]


def test_the_splits_of_a_dataset_are_taken_by_their_names():
    source = Source("hub")
    assert source._hub_names(["train", "dev"]) == {"train": "train", "dev": "validation"}
    assert source._hub_names(["train"]) == {"train": None}
    with pytest.raises(ConfigError, match="splits train_sft, test_sft, and none is called train"):
        source._hub_names(["train_sft", "test_sft"])
    named = Source("hub", hub_splits={"train": "a"}, limit=2)
    assert named._hub_names(["a", "b"]) == {"a": None}
    with pytest.raises(ConfigError, match="hub_splits names a"):
        named._hub_names(["b"])


def test_marks_inside_of_joined_files_of_lines_are_not_text(tmp_path):
    line = b'{"text": "a"}\n'
    for mark in (b"\xef\xbb\xbf", b"\x1e"):
        (tmp_path / "a.jsonl").write_bytes(2 * (mark + line))
        source = Source(str(tmp_path))
        assert [row.value for row in source.rows()] == [{"text": "a"}] * 2


def test_a_link_to_nothing_is_refused_and_not_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "away.jsonl")
    source = Source(str(tmp_path))
    with pytest.raises(ConfigError, match=r"'b.jsonl' is a link to '.*away.jsonl', which is not"):
        list(source.rows())
    # Before a row is read, prepared data is looked up by a digest of the files.
    with pytest.raises(ConfigError, match=r"'b.jsonl' is a link to '.*away.jsonl', which is not"):
        digest_of_files(source.content())
    with pytest.raises(ConfigError, match=r"'b.jsonl' is a link to '.*away.jsonl', which is not"):
        list(Source(str(tmp_path / "b.jsonl")).rows())
