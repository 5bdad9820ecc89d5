"""The demo's text: read in the same way every time, clean, and split without leaks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.demo_base import corpus
from tools.demo_base.corpus import INSTRUCTIONS_PATH, build_documents, write_instructions
from tools.demo_base.questions import (
    MAX_ANSWER_WORDS,
    VALIDATION_PAIRS,
    build_pairs,
    is_good_sentence,
    is_held_out,
    sentences,
    split_pairs,
    summary,
)
from tools.demo_base.stdlib import Entry, clean_markup, read_entries, stdlib_root

LIBRARY = {
    "textwrap.py": '''
"""Text wrapping and filling for the tests."""

__all__ = ["dedent", "Wrapper"]

class Wrapper:
    """Object for wrapping and filling text.

    More about it.
    """

    def __init__(self, width=70, *, tabs=True):
        self.width = width

    @property
    def lines(self):
        """The lines wrapped so far in this object."""

    def fill(self, text):
        """Reformat the single paragraph in ``text`` and return it."""

    def _private(self):
        """Nobody should read this sentence here."""

try:
    import c
except ImportError:
    def dedent(text, tabs=False):
        """Remove common leading whitespace from every line in :func:`text`."""

def hidden(text):
    """Return the text that is not listed as public."""

def copy(text):
    """Reformat the single paragraph in ``text`` and return it."""
''',
    "pkg/__init__.py": '"""A package with parts."""\nfrom .part import Thing\n',
    "pkg/part.py": 'class Thing:\n    """A thing with a home in its package."""\n',
    "pkg/_junk.py": 'def junk():\n    """Return the junk of a private module."""\n',
    "test/test_it.py": 'def test():\n    """Return what only the tests of Python read."""\n',
    "cgi.py": 'def parse():\n    """Parse what has left the library."""\n',
    "broken.py": "def (:\n",
    "licensed.py": "# Permission  is\n# hereby granted, free of charge\n"
    'def f(a):\n    """Return what has a licence of its own."""\n',
}


@pytest.fixture
def library(tmp_path):
    for name, text in LIBRARY.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def entries():
    return read_entries()


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in INSTRUCTIONS_PATH.read_text("utf-8").splitlines()]


def test_entries_of_a_small_library(library):
    found = {entry.name: entry for entry in read_entries(library)}
    assert list(found) == [
        "licensed.f",
        "pkg",
        "pkg.Thing",
        "textwrap",
        "textwrap.Wrapper",
        "textwrap.Wrapper.lines",
        "textwrap.Wrapper.fill",
        "textwrap.dedent",
        "textwrap.hidden",
    ]
    assert found["textwrap.Wrapper"].signature == "(width=70, *, tabs=True)"
    assert found["textwrap.Wrapper"].parameters is None
    assert found["textwrap.Wrapper.lines"].kind == "property"
    assert found["textwrap.dedent"].parameters == (("text", None), ("tabs", "False"))
    assert found["textwrap.dedent"].doc.endswith("every line in `text`.")
    private = {name for name, entry in found.items() if not entry.public}
    assert private == {"licensed.f", "textwrap.hidden"}


DIGEST = """
import hashlib
from tools.demo_base.corpus import build_documents
from tools.demo_base.questions import build_pairs
from tools.demo_base.stdlib import read_entries

def digest(entries):
    text = repr((entries, build_documents(entries), build_pairs(entries)))
    return hashlib.sha256(text.encode()).hexdigest()
"""


@pytest.mark.long
def test_extraction_is_the_same_every_time(entries):
    assert len(entries) > 3000
    here = {}
    exec(DIGEST, here)
    # Sets have another order there.
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    done = subprocess.run(
        [sys.executable, "-c", DIGEST + "print(digest(read_entries()))"],
        env={"PYTHONHASHSEED": other, "PATH": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == here["digest"](entries)


def test_nothing_of_the_library_is_imported(library):
    (library / "textwrap.py").write_text(
        '"""Text wrapping and filling for the tests."""\nraise SystemExit("imported")\n'
    )
    assert "textwrap" in [entry.name for entry in read_entries(library)]


def test_an_interpreter_without_sources_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=r"no textwrap\.py.*regular Python installation"):
        stdlib_root()


def test_held_out_documents_are_in_no_training_document(entries):
    train, held_out = build_documents(entries)
    names = [entry.name for entry in entries if is_held_out(entry.name)]
    assert len(names) == len(held_out) > 50
    assert not set(held_out) & set(train)
    text = "\n".join(train)
    for entry in entries:
        if is_held_out(entry.name):
            assert f"`{entry.name}`: " not in text
            assert f"{entry.name}{entry.signature}\n\n{entry.doc}" not in text


def test_questions_are_asked_about_text_that_was_read(entries):
    pairs = build_pairs(entries)
    assert not [pair for pair in pairs if is_held_out(pair.subject)]
    assert len({pair.prompt for pair in pairs}) == len(pairs)
    train, validation = split_pairs(pairs)
    assert not {pair.subject for pair in train} & {pair.subject for pair in validation}


def test_too_few_pairs_to_split(entries):
    with pytest.raises(ValueError, match=r"Cannot keep 200 of 5 .*Ask for fewer"):
        split_pairs(build_pairs(entries)[:5])


@pytest.fixture
def _read_once(entries, monkeypatch):
    """Spares the commands below from reading the library again."""
    monkeypatch.setattr(corpus, "read_entries", lambda root=None: entries)


@pytest.mark.usefixtures("_read_once")
def test_written_instructions_can_be_read_back(tmp_path):
    path = tmp_path / "pairs.jsonl"
    train, validation = write_instructions(path)
    splits = [json.loads(line)["split"] for line in path.read_text("utf-8").splitlines()]
    assert splits == ["train"] * train + ["validation"] * validation


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Use ``x`` and :class:`~a.B`.", "Use `x` and `a.B`."),
        ("One.  \n\n\n\nTwo.", "One.\n\nTwo."),
    ],
)
def test_markup_is_cleaned(text, expected):
    assert clean_markup(text) == expected


def test_sentences_keep_abbreviations_whole():
    text = "Take a value, e.g. Decimal.\nReturn it (see J. Doe). Then stop."
    assert sentences(text) == [
        "Take a value, e.g. Decimal.",
        "Return it (see J. Doe).",
        "Then stop.",
    ]


@pytest.mark.parametrize(
    "bad",
    [
        "Too short.",
        "no capital letter at the start.",
        "No full stop at the end",
        "Open the file (or not.",
        "See >>> for an example here.",
        "Return f(x) = {y: z} | [1] + 2 ** 3.",
        "This is a hack for now.",
    ],
)
def test_bad_sentences_are_refused(bad):
    assert not is_good_sentence(bad)


def test_a_summary_is_the_first_sentence_or_two():
    doc = "Return the value. Raise an error where there is none. Third one.\n\nAnother paragraph."
    entry = Entry("m", "f", "function", "()", (), doc)
    assert summary(entry) is None, "three words are too few"
    entry = Entry("m", "f", "function", "()", (), doc.replace("the value", "the stored value"))
    assert summary(entry) == "Return the stored value. Raise an error where there is none."


def test_shipped_questions_are_unique_and_split_without_leaks(rows):
    assert all(row.keys() == {"prompt", "response", "split"} for row in rows)
    prompts = [row["prompt"] for row in rows]
    assert len(set(prompts)) == len(prompts)
    train = [row for row in rows if row["split"] == "train"]
    validation = [row for row in rows if row["split"] == "validation"]
    assert len(train) + len(validation) == len(rows)
    assert 1500 <= len(train) <= 3000
    assert VALIDATION_PAIRS <= len(validation) <= VALIDATION_PAIRS + 3
    assert not {row["response"] for row in train} & {row["response"] for row in validation}
    assert INSTRUCTIONS_PATH.stat().st_size < 500_000


def test_shipped_answers_are_short_and_plain(rows):
    for row in rows:
        assert row["prompt"].isascii()
        assert row["response"].isascii()
        assert row["prompt"].endswith("?")
        assert row["response"].endswith((".", '."', ".'", ".)"))
        assert "\n" not in row["prompt"] + row["response"]
        assert len(row["response"].split()) <= MAX_ANSWER_WORDS + 10


@pytest.mark.usefixtures("_read_once")
def test_command_line_writes_and_counts(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    corpus.main(["--write-instructions", str(path)])
    assert str(path) in capsys.readouterr().out
    assert path.stat().st_size > 100_000
    corpus.main([])
    assert "documented names" in capsys.readouterr().out
