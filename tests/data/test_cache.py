"""Prepared data on disk: shared, keyed by content, whole or absent."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lightning_peft.demo.run import BASE
from lightning_peft.engine import cache_entries as cache
from lightning_peft.errors import ConfigError

from .conftest import pairs


def entries(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_an_entry_is_made_once_and_shared(make, write, tmp_path):
    path = write(pairs(40))
    first = make(path).read()
    stamp = (first.folder / "train.arrow").stat().st_mtime_ns
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    again = Path(path).rename(copy / "rows.jsonl")
    # Neither the place nor what only concerns the order decides what the tokens are.
    second = make(str(again), batch_size=7, packing=True, num_workers=2).read()
    assert second.folder == first.folder
    assert (second.folder / "train.arrow").stat().st_mtime_ns == stamp
    assert entries(tmp_path) == [first.folder.name]


def test_everything_that_decides_the_tokens_is_in_the_key(make, write, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_tokens(["one more than"])
    tokenizer.save_pretrained(tmp_path / "more")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "template")
    path = write(pairs(40))
    made = [
        make(path),
        make(path, chat_template="chatml"),
        make(path, system_prompt="Be brief."),
        make(path, max_length=200),
        make(path, split_seed=1),
        make(path, validation_share=0.5),
        make(path, loss_on="completion"),
        make(path, limit=20),
        make(path, tokenizer=str(tmp_path / "more")),
        make(path, tokenizer=str(tmp_path / "template"), chat_template=None),
        make(write(pairs(41), "b.jsonl")),
    ]
    keys = {data.read().folder.name for data in made}
    assert len(keys) == len(made)
    assert entries(tmp_path) == sorted(keys)


def build(content):
    def write(folder):
        (folder / "a.bin").write_text(content)
        return {"rows": 1}

    return write


def test_an_interrupted_write_leaves_no_entry(tmp_path):
    def fail(folder):
        (folder / "a.bin").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.entry(tmp_path, "key", fail, "data", "cache_dir")
    assert list(tmp_path.iterdir()) == []
    # A process that was killed leaves its working folder, which nobody reads.
    (tmp_path / ".key-dead").mkdir()
    final = cache.entry(tmp_path, "key", build("whole"), "data", "cache_dir")
    assert (final / "a.bin").read_text() == "whole"


def test_the_slower_of_two_writers_takes_what_is_there(tmp_path):
    def slow(folder):
        cache.entry(tmp_path, "key", build("fast"), "data", "cache_dir")
        return build("slow")(folder)

    final = cache.entry(tmp_path, "key", slow, "data", "cache_dir")
    assert (final / "a.bin").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("harm", ["cut", "remove", "summary"])
def test_a_damaged_entry_is_rebuilt_with_a_warning(tmp_path, caplog, harm):
    final = cache.entry(tmp_path, "key", build("first"), "data", "cache_dir")
    if harm == "summary":
        (final / cache.SUMMARY).write_text("{")
    elif harm == "cut":
        (final / "a.bin").write_text("fir")
    else:
        (final / "a.bin").unlink()
    assert cache.damage_of(final) is not None
    cache.entry(tmp_path, "key", build("second"), "data", "cache_dir")
    assert (final / "a.bin").read_text() == "second"
    assert cache.damage_of(final) is None
    assert "is damaged" in caplog.text


def test_a_folder_that_cannot_be_written_to_is_named(make, write, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match="cache_dir="):
        make(write(pairs(40))).read()


def test_processes_at_the_same_time_get_the_same(write, tmp_path, program):
    path = write(pairs(40))
    # Forked when everything is imported, so that neither has finished when the other begins.
    code = (
        "import os; from lightning_peft.data.supervised import SupervisedData\n"
        "import torch, transformers\n"
        "child = os.fork()\n"
        f"data = SupervisedData({path!r}, {str(BASE)!r}, chat_template='plain',"
        f" cache_dir={str(tmp_path / 'cache')!r})\n"
        "data.prepare_data(); data.setup('fit'); print(len(data.read().splits['train']))\n"
        "if child: assert os.waitpid(child, 0)[1] == 0\n"
    )
    counts = program.succeed(tmp_path, code=code).split()
    assert len(counts) == 2
    assert len(set(counts)) == 1
    (name,) = entries(tmp_path)
    summary = json.loads((tmp_path / "cache" / name / cache.SUMMARY).read_text())
    assert summary["splits"]["train"]["rows"] == int(counts[0])
