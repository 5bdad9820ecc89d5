"""``lightning-peft cache`` lists and clears what both caches keep."""

import json
import os
import subprocess
import sys

import pytest

from lightning_peft.cli import main
from lightning_peft.engine import cache_entries

LABEL, SETTINGS = "nf4, double quantization", {"bnb_4bit_quant_type": "nf4"}


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """A cache with two quantized bases, prepared data, and what a killed process left behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bases, data = (tmp_path / "lightning-peft" / kind for kind in ("bases", "data"))
    for folder, name in ((bases, "aa11"), (bases, "ab22"), (data, "cc33")):

        def build(working):
            (working / "content").write_bytes(b"x" * 1000)
            about = {"model": "some/model", "label": LABEL, "settings": SETTINGS}
            return {**about, "device": "cpu"}

        folder.mkdir(parents=True, exist_ok=True)
        cache_entries.make(folder / name, build)
    (bases / ".dd44-killed").mkdir()
    (bases / ".dd44-killed" / "half").write_bytes(b"x" * 500)
    (tmp_path / "lightning-peft" / "hashes").mkdir()
    return tmp_path / "lightning-peft"


def names(root):
    return {path.name for kind in ("bases", "data") for path in (root / kind).iterdir()}


def test_the_list_says_what_is_there(capsys):
    assert main(["cache", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {"aa11", "ab22", "cc33", ".dd44-killed"}
    base = rows["aa11"]
    assert (base["kind"], base["model"], base["whole"]) == ("quantized base", "some/model", True)
    assert (base["label"], base["settings"]) == (LABEL, SETTINGS)
    assert 1000 < base["bytes"] < 2000
    assert 0 <= base["unused_seconds"] <= base["age_seconds"] < 60
    assert rows["cc33"]["kind"] == "prepared data"
    assert rows[".dd44-killed"]["whole"] is False
    assert main(["cache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert any(
        line.startswith("aa11\tquantized base\tsome/model\tnf4, double quantization, cpu\t")
        for line in lines
    )
    assert any("left behind" in line for line in lines)


def test_a_use_is_noted(root, capsys):
    entry = root / "bases" / "aa11"

    os.utime(entry / cache_entries.SUMMARY, (1e9, 1e9))
    made = entry.stat().st_mtime_ns
    assert cache_entries.find(entry, "quantized base") is not None
    assert (entry / cache_entries.SUMMARY).stat().st_mtime > 1e9
    assert entry.stat().st_mtime_ns == made


def test_clearing_takes_what_is_named(root, capsys):
    assert main(["cache", "clear", "aa"]) == 0
    assert names(root) == {"ab22", "cc33", ".dd44-killed"}
    assert "1 removed" in capsys.readouterr().out
    assert main(["cache", "clear", "--all", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["removed"]) == {"ab22", "cc33", ".dd44-killed"}
    assert result["bytes"] > 2500
    assert names(root) == set()
    assert main(["cache"]) == 0
    assert "Nothing is kept" in capsys.readouterr().out
    assert main(["cache", "clear", "--all"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Name one entry"),
        (["aa11", "--all"], "Name one entry"),
        (["zz"], "is not an entry"),
        (["a"], "several names"),
        ([""], "is not an entry"),
        (["../data/cc33"], "is not an entry"),
    ],
)
def test_what_cannot_be_meant_clears_nothing(root, refused, words, message):
    before = names(root)
    assert message in refused("cache", "clear", *words)
    assert names(root) == before


def test_it_needs_no_torch():
    code = (
        "import sys; from lightning_peft.cli import main; main(['cache', '--json'])\n"
        "assert not {'torch', 'transformers', 'bitsandbytes'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 4
