"""Recordings and transcripts: what is read, checked, tokenized, and computed for a batch."""

import base64
import json
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Audio, Features, Value
from models import whisper_tokenizer
from pyarrow import parquet
from transformers import WhisperFeatureExtractor

from lightning_peft.data import audio
from lightning_peft.data.speech import SpeechData
from lightning_peft.demo.run import BASE
from lightning_peft.errors import ConfigError

from .conftest import refusal
from .test_audio import wav

HEARD = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 16, "chunk_length": 1}


@pytest.fixture
def make(build):
    heard = {"processor": str(BASE), "feature_extractor": HEARD}
    return partial(build, SpeechData, **heard, validation_share=0, batch_size=2)


def tone(hertz, seconds=0.5, rate=16_000):
    return wav(np.round(9_000 * np.sin(2 * np.pi * hertz * np.arange(seconds * rate) / rate)), rate)


@pytest.fixture
def folder(tmp_path):
    """A folder with a table of two recordings in another folder."""
    (tmp_path / "set" / "clips").mkdir(parents=True)
    for hertz in (300, 500):
        (tmp_path / "set" / "clips" / f"{hertz}.wav").write_bytes(tone(hertz))
    rows = "file_name,transcription\nclips/300.wav,low\nclips/500.wav,high tone\n"
    (tmp_path / "set" / "metadata.csv").write_text(rows)
    return tmp_path / "set"


def test_a_folder_with_a_table_is_read(folder, make, tokenizer, caplog):
    data = make(folder)
    rows = data.read().splits["train"]
    assert rows["path"] == [str(folder / "clips" / name) for name in ("300.wav", "500.wav")]
    assert rows["target"] == ["low", "high tone"]
    assert rows["labels"][1] == [*tokenizer("high tone")["input_ids"], tokenizer.eos_token_id]
    assert rows["seconds"] == [0.5, 0.5]
    counts = data.record["splits"]["train"]
    assert counts["seconds"] == 1
    assert counts["ends_trained"] == counts["ends_added"] == 2
    assert "Not read as data" not in caplog.text


def test_a_path_in_an_object_is_relative_to_its_list_too(folder, make):
    (folder / "metadata.csv").unlink()
    row = {"audio": {"path": "clips/300.wav", "bytes": None}, "transcript": "low"}
    (folder / "rows.jsonl").write_text(json.dumps(row))
    data = make(folder / "rows.jsonl")
    assert data.read().splits["train"]["path"] == [str(folder / "clips" / "300.wav")]
    assert [file.name for file in data._sources()[0].named_files()] == ["300.wav"]


def test_a_batch_is_what_the_feature_extractor_makes(folder, make):
    (batch,) = make(folder).loader("train")
    order = [batch["target"].index(text) for text in ("low", "high tone")]
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    sounds = [audio.decode(tone(hertz))[0] for hertz in (300, 500)]
    expected = extractor(sounds, sampling_rate=16_000, return_tensors="pt")["input_features"]
    torch.testing.assert_close(batch["input_features"][order], expected)
    assert batch["input_features"].shape == (2, 16, 100)
    assert batch["labels"][order[0]].tolist()[-1] == -100
    assert batch["source"][order[0]].endswith("clips/300.wav")


def test_recordings_inside_a_table_need_no_decoder(make, tmp_path):
    schema = Features({"audio": Audio(), "sentence": Value("string")}).arrow_schema
    rows = [{"audio": {"bytes": tone(h), "path": f"{h}.wav"}, "sentence": f"{h}"} for h in (9, 99)]
    parquet.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "rows.parquet")
    data = make(tmp_path / "rows.parquet")
    assert data.read().splits["train"]["content"] == [tone(9), tone(99)]
    (batch,) = data.loader("train")
    assert batch["input_features"].isfinite().all()
    assert sorted(batch["source"]) == ["9.wav", "99.wav"]


def test_every_unusable_row_is_reported(tmp_path, make, write, monkeypatch):
    monkeypatch.setattr("lightning_peft.data.speech.can_resample", lambda: False)
    for name, content in {
        "good": tone(300), "copy": tone(300), "long": tone(300, 1.5), "empty": b"",
        "other": tone(300, rate=44_100), "broken": tone(300)[:-100],
    }.items():  # fmt: skip
        (tmp_path / f"{name}.wav").write_bytes(content)
    names = ("good", "copy", "long", "empty", "other", "broken", "gone")
    rows = [{"audio": f"{name}.wav", "text": "said"} for name in names]
    rows += [{"audio": "good.wav", "text": " "}, {"text": "said"}, {"audio": 3, "text": "x </s>"}]
    rows += [{"audio": "good.wav", "text": "x </s>"}, {"audio": "good.wav", "text": "so " * 30}]
    errors = refusal(make(write(rows), max_length=20))
    for message in (
        "row 2 is the same as row 1",
        "row 3 has 1.5 seconds of audio of 1 allowed",
        "row 4 has an empty file as audio",
        "row 5 has audio at 44,100 Hz for a model that hears 16,000 Hz",
        "row 6 has a WAV file that breaks off at 7,950 of 8,000",
        "row 7 names no file: ",
        "row 8 has an empty transcript (column 'text')",
        "row 9 has no audio",
        "row 10 has 3, neither a path nor a file, as audio",
        "row 11 has the special token '</s>' inside its transcript",
        "row 12 has 3",
        "11 of 12 rows cannot be used",
    ):
        assert message in errors


def test_another_rate_is_resampled(tmp_path, make, write):
    pytest.importorskip("scipy")
    for rate in (16_000, 44_100):
        (tmp_path / f"{rate}.wav").write_bytes(tone(440, rate=rate))
    rows = write([{"audio": f"{rate}.wav", "text": f"{rate}"} for rate in (16_000, 44_100)])
    (batch,) = make(rows).loader("train")
    one, other = batch["input_features"]
    # The same but for the edges, where the tone begins and ends.
    assert (one - other)[:, 5:45].abs().max() < 0.1
    assert (one - one.roll(3, 0))[:, 5:45].abs().max() > 0.5


def test_a_changed_recording_is_prepared_again_or_refused(folder, make):
    data = make(folder)
    key = data.record["key"]
    batches = data.loader("train")
    assert make(folder).record["key"] == key
    (folder / "clips" / "300.wav").write_bytes(tone(300, 0.75))
    with pytest.raises(ConfigError, match="has 0.75 seconds, and had 0.50 when it was prepared"):
        list(batches)
    (folder / "clips" / "300.wav").unlink()
    with pytest.raises(ConfigError, match="A row that was prepared names no file"):
        list(batches)
    (folder / "clips" / "300.wav").write_bytes(tone(320, 0.6))
    again = make(folder)
    assert again.record["key"] != key
    assert again.read().splits["train"]["seconds"] == [0.6, 0.5]


def test_workers_compute_the_same(folder, make):
    alone, helped = (make(folder, num_workers=n, batch_size=1) for n in (0, 1))
    found = [
        {batch["target"][0]: batch["input_features"] for batch in data.loader("train")}
        for data in (alone, helped)
    ]
    assert all(torch.equal(found[0][text], found[1][text]) for text in ("low", "high tone"))


def test_arguments_that_do_not_fit_are_refused(folder, make):
    with pytest.raises(ConfigError, match="max_seconds=0 is not above 0"):
        make(folder, max_seconds=0)
    with pytest.raises(ConfigError, match="max_seconds=2 is more than the 1 seconds"):
        make(folder, max_seconds=2).setup("fit")
    with pytest.raises(ConfigError, match="not a folder with a feature extractor"):
        make(folder, feature_extractor=None).setup("fit")
    with pytest.raises(ConfigError, match="no setting 'chunk_lenght'; near names: chunk_length"):
        make(folder, feature_extractor={**HEARD, "chunk_lenght": 2}).setup("fit")
    with pytest.raises(ConfigError, match="no feature_extractor_type that transformers knows"):
        make(folder, feature_extractor={"feature_size": 4}).setup("fit")
    with pytest.raises(ConfigError, match="has no tokens for languages and tasks"):
        make(folder, language="en").setup("fit")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    whisper_tokenizer().save_pretrained(folder)
    return str(folder)


LABELS = [
    ({"language": "german", "task": "translate"}, "<|de|><|translate|><|notimestamps|>"),
    ({"language": "en"}, "<|en|><|transcribe|><|notimestamps|>"),
    ({}, "<|notimestamps|>"),
]


@pytest.mark.parametrize(("asked", "before"), LABELS)
def test_labels_begin_with_language_and_task(asked, before, folder, make, whisper):
    data = make(folder, processor=whisper, **asked)
    labels = data.read().splits["train"]["labels"]
    # The model puts its start token before them.
    assert data.tokenizer.decode(labels[0]) == f"{before}low<|endoftext|>"
    assert set(data.generation) == ({"language", "task"} if asked else set())
    assert json.dumps(data.record["settings"])


@pytest.mark.parametrize("language", ["french", "klingon", "ru"])
def test_languages_that_the_tokenizer_lacks_are_refused(language, folder, make, whisper):
    with pytest.raises(ConfigError, match=r"has no token <\|"):
        make(folder, processor=whisper, language=language).setup("fit")


def test_a_row_is_shown_with_the_beginning_of_its_sound(tmp_path, make):
    (tmp_path / "long.wav").write_bytes(tone(300, seconds=12))
    (tmp_path / "rows.csv").write_text("file_name,transcription\nlong.wav,low\n")
    data = make(tmp_path / "rows.csv", feature_extractor={**HEARD, "chunk_length": 15})
    recording, transcript = data.render_row(data.read().splits["train"][0])
    assert recording.text == "[recording long.wav: 12.0 seconds]\n"
    assert (recording.trained, transcript.trained) == (False, True)
    assert transcript.text == "<s>low</s>"
    start = "data:audio/wav;base64,"
    assert str(recording.audio).startswith(start)
    sound, rate = audio.decode(base64.b64decode(str(recording.audio).removeprefix(start)))
    assert (rate, len(sound)) == (8_000, 80_000)
    assert audio.clip(tone(300, rate=16_000, seconds=0.00007)).startswith(start)
