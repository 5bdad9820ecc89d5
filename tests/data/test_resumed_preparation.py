"""A preparation that was interrupted continues behind its finished parts, bit for bit."""

import hashlib
import multiprocessing
import os
import signal

import pytest
from filelock import FileLock
from pyarrow import ipc

from lightning_peft.data import parallel_encoding, preparation, prepared_parts
from lightning_peft.data.reading import Source
from lightning_peft.data.supervised import SupervisedRows
from lightning_peft.errors import ConfigError

from .conftest import pairs

PART = 50


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    few = dict.fromkeys(parallel_encoding.MIN_ROWS_FOR_WORKERS, 5)
    monkeypatch.setattr(parallel_encoding, "MIN_ROWS_FOR_WORKERS", few)
    monkeypatch.setattr(parallel_encoding, "CHUNK", 4)
    monkeypatch.setattr(preparation, "PART_ROWS", PART)
    monkeypatch.setattr(preparation, "usable_cores", lambda: 1)


@pytest.fixture
def file(write):
    """Good rows of all splits, and every kind of row that a part has to remember."""
    rows = pairs(180)
    rows[20] = {"prompt": "What is 20?", "completion": ""}
    rows[30] = {"messages": "none of them", "prompt": "What is 30?"}
    rows[61] = dict(rows[2])
    rows[70] = {"prompt": rows[71]["prompt"], "completion": "Another answer."}
    rows[90] = {"prompt": "Long", "completion": "word " * 400}
    rows[100] = {**rows[100], "note": "x"}
    rows[101]["completion"] = [{"role": "assistant", "content": "101", "mood": "glad"}]
    rows[150] = dict(rows[120])
    return write(rows)


def prepared(make, file, cache, **options):
    """Returns checksums and the summary of what is prepared."""
    options = {"max_length": 128, "test_share": 0.1, "cache_dir": str(cache), **options}
    found = make(file, skip_bad_rows="rejected.jsonl", **options).read()
    names = [path.name for path in sorted(found.folder.iterdir()) if path.name != "summary.json"]
    sums = {name: hashlib.sha256((found.folder / name).read_bytes()).hexdigest() for name in names}
    return sums, found.summary


@pytest.fixture
def whole(make, file, tmp_path, monkeypatch):
    """What one part of all rows holds, as it was before there were parts."""
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "PART_ROWS", 100_000)
        found = prepared(make, file, tmp_path / "whole")
    assert {"train.arrow", "validation.arrow", "test.arrow", "rejected.jsonl"} < set(found[0])
    assert found[1]["rejected"] == 5
    return found


def stop_at(monkeypatch, number, with_signal):
    """Sends this process a signal when a row is written."""
    write_row = preparation._PreparationPass._write

    def stopping(self, parsed_row, *given):
        write_row(self, parsed_row, *given)
        if parsed_row.row.number == number:
            os.kill(os.getpid(), with_signal)

    monkeypatch.setattr(preparation._PreparationPass, "_write", stopping)


@pytest.fixture
def encoded(monkeypatch):
    """The number of samples that are encoded."""
    samples, encode = [], SupervisedRows.encode

    def noting(self, sample):
        samples.append(sample)
        return encode(self, sample)

    monkeypatch.setattr(SupervisedRows, "encode", noting)
    return samples


def interrupt(number, make, file, cache):
    """Prepares, with Ctrl-C at a row."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, number, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            prepared(make, file, cache)


def parts_in(cache):
    (folder,) = cache.glob(".*-parts")
    return sorted(path for path in folder.iterdir() if path.is_dir())


def test_parts_that_are_joined_are_what_one_is(make, file, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.DEFAULT_MAX_BATCH_SIZE", 30)
    parts = prepared(make, file, tmp_path / "parts")
    (folder,) = (tmp_path / "parts").iterdir()
    with (folder / "train.arrow").open("rb") as stream, ipc.open_stream(stream) as batches:
        sizes = [batch.num_rows for batch in batches]
    assert sizes[:-1] == [30] * (len(sizes) - 1)
    assert len(sizes) >= 4
    monkeypatch.setattr(preparation, "PART_ROWS", 100_000)
    assert parts == prepared(make, file, tmp_path / "whole")


def test_a_killed_preparation_continues(make, file, whole, tmp_path, monkeypatch, encoded, caplog):
    monkeypatch.setattr(preparation, "usable_cores", lambda: 2)

    def killed():
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, 130, signal.SIGKILL)
            prepared(make, file, tmp_path / "cache")

    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start()
    child.join(timeout=300)
    assert child.exitcode == -signal.SIGKILL
    assert len(parts_in(tmp_path / "cache")) == 2
    monkeypatch.setattr(preparation, "usable_cores", lambda: 1)
    encoded.clear()
    with caplog.at_level("INFO"):
        assert prepared(make, file, tmp_path / "cache") == whole
    assert "100 rows were prepared before an interruption" in caplog.text
    assert len(encoded) == 80
    # What the killed process had not finished stays, as after every kill; its parts do not.
    assert list((tmp_path / "cache").glob(".*-parts")) == []


def test_an_interrupted_preparation_continues(make, file, whole, tmp_path, encoded):
    interrupt(60, make, file, tmp_path / "cache")
    (parts,) = (tmp_path / "cache").iterdir()
    assert [path.name for path in parts_in(tmp_path / "cache")] == ["000000"]
    encoded.clear()
    assert prepared(make, file, tmp_path / "cache") == whole
    assert len(encoded) == 130
    assert not parts.exists()


def test_a_damaged_part_is_prepared_again(make, file, whole, tmp_path, encoded, caplog):
    interrupt(160, make, file, tmp_path / "cache")
    second = parts_in(tmp_path / "cache")[1] / "train.arrow"
    second.write_bytes(second.read_bytes()[:-100])
    encoded.clear()
    assert prepared(make, file, tmp_path / "cache") == whole
    assert "train.arrow is not the" in caplog.text
    assert len(encoded) == 130


def test_parts_that_another_process_uses_are_left_to_it(
    make, file, whole, tmp_path, monkeypatch, encoded
):
    interrupt(160, make, file, tmp_path / "cache")
    parts = parts_in(tmp_path / "cache")
    monkeypatch.setattr(prepared_parts, "_LOCK_SECONDS", 0)
    encoded.clear()
    with FileLock(parts[0].parent / "lock"):
        assert prepared(make, file, tmp_path / "cache") == whole
    # All, but for two that are not samples.
    assert len(encoded) == 178
    assert parts_in(tmp_path / "cache") == parts
    # With nothing left to prepare, they are removed.
    prepared(make, file, tmp_path / "cache")
    assert list((tmp_path / "cache").glob(".*-parts")) == []


def test_no_part_is_kept_of_a_file_that_changed(make, file, tmp_path, monkeypatch, encoded):
    write_row = preparation._PreparationPass._write

    def changing(self, parsed_row, *given):
        write_row(self, parsed_row, *given)
        if parsed_row.row.number == 70:
            os.utime(file, ns=(1, 1))

    monkeypatch.setattr(preparation._PreparationPass, "_write", changing)
    with pytest.raises(ConfigError, match="changed while the rows were read"):
        prepared(make, file, tmp_path / "cache")
    # At the end of the part, not of all rows.
    assert len(encoded) <= 2 * PART
    assert list((tmp_path / "cache").iterdir()) == []


def test_parts_outlive_a_fault_of_the_network(make, file, whole, tmp_path, encoded):
    rows = Source.rows

    def broken(self):
        for row in rows(self):
            if row.number == 120:
                raise ConfigError("The hub cannot be read after row 119.")
            yield row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Source, "rows", broken)
        with pytest.raises(ConfigError, match="after row 119"):
            prepared(make, file, tmp_path / "cache")
    assert [path.name for path in parts_in(tmp_path / "cache")] == ["000000", "000001"]
    encoded.clear()
    assert prepared(make, file, tmp_path / "cache") == whole
    assert len(encoded) == 80


def test_a_part_that_another_process_kept_first_leaves_no_copy(tmp_path):
    stores = [prepared_parts.PartStore(tmp_path / "parts") for _ in range(2)]
    # Neither finds a part, so neither owns the folder yet.
    assert [store.found() for store in stores] == [[], []]
    for number, store in enumerate(stores):
        working = tmp_path / f"working-{number}"
        working.mkdir()
        (working / "train.arrow").write_bytes(b"rows")
        kept = store.keep(working, 0, {"rows": 1})
        assert kept == tmp_path / "parts" / "000000"
        assert not working.exists()
        store.close()
