"""A tokenizer or processor at a pinned revision: read there and nowhere else."""

import json

import huggingface_hub.constants
import pytest
from models import whisper_tokenizer
from transformers import AutoTokenizer, WhisperFeatureExtractor

from lightning_peft.data.speech import SpeechData
from lightning_peft.demo.run import BASE
from lightning_peft.errors import ConfigError

from .conftest import pairs

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub; ``main`` has moved on since the first commit."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def snapshot(hub, name, commit):
    """Returns the folder of a commit, which is now that of ``main``."""
    place = hub / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(commit)
    folder = place / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def tokenizers(hub):
    """``me/our``: before it moved, ``What is`` was one token."""
    config = json.loads((BASE / "config.json").read_text())
    for commit, words in ((OLD, ["What is"]), (NEW, [])):
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        tokenizer.add_tokens(words)
        folder = snapshot(hub, "me/our", commit)
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config))


def test_the_tokenizer_is_that_of_the_revision(make, write, tokenizers):
    rows = write(pairs(20))
    pinned = make(rows, tokenizer="me/our", tokenizer_revision=OLD)
    moved = make(rows, tokenizer="me/our")
    same = make(rows)
    read = {}
    for name, data in (("pinned", pinned), ("moved", moved), ("same", same)):
        data.setup("fit")
        read[name] = data.read().splits["train"]["input_ids"]
    assert "What is" in pinned.tokenizer.get_vocab()
    assert "What is" not in moved.tokenizer.get_vocab()
    assert read["moved"] == read["same"] != read["pinned"]
    assert all(len(one) < len(two) for one, two in zip(read["pinned"], read["same"], strict=True))
    assert pinned.record["tokenizer_revision"] == OLD
    assert "tokenizer_revision" not in moved.record


def test_what_is_prepared_is_kept_by_revision_too(make, write, tokenizers):
    rows = write(pairs(20))
    keys = {
        revision: make(rows, tokenizer="me/our", tokenizer_revision=revision).record["key"]
        for revision in (OLD, NEW, None)
    }
    # The last two are the same files by two names.
    assert len(set(keys.values())) == 3
    # Without one, nothing is prepared again that was prepared before there were revisions.
    assert "tokenizer_revision" not in make(rows).encoding()


def test_a_missing_revision_is_refused(make, write, tokenizers):
    with pytest.raises(ConfigError, match=r"tokenizer='me/our' .* at revision 'cccc") as refusal:
        make(write(pairs(20)), tokenizer="me/our", tokenizer_revision="c" * 40).setup("fit")
    assert "Check the name, the revision and the network" in str(refusal.value)


def test_the_processor_of_recordings_is_that_of_the_revision(hub, build, tmp_path):
    for commit, size in ((OLD, 16), (NEW, 80)):
        folder = snapshot(hub, "me/heard", commit)
        WhisperFeatureExtractor(feature_size=size).save_pretrained(folder)
        whisper_tokenizer().save_pretrained(folder)
        (folder / "config.json").write_text('{"model_type": "whisper"}')
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        tokenizer["model_max_length"] = size
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "rows.csv").write_text("audio,text\nx.wav,x\n")
    for revision, size in ((OLD, 16), (None, 80)):
        named = {"processor": "me/heard", "processor_revision": revision}
        data = build(SpeechData, tmp_path / "rows.csv", **named)
        assert data.extractor.feature_size == size
        assert data.tokenizer.model_max_length == size
        assert data.encoding().get("processor_revision") == revision
