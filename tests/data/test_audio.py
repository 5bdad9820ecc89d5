"""Recordings: samples, rates, and files that are none."""

import io
import wave

import numpy as np
import pytest

from lightning_peft.data import audio
from lightning_peft.data.audio import Recording, decode, resample
from lightning_peft.data.validation import EncodingProblem


def wav(values, rate=16_000, width=2, channels=1):
    """Returns a WAV file of integers."""
    raw = np.asarray(values, np.int64)
    if width == 1:
        data = (raw + 128).astype(np.uint8).tobytes()
    else:
        data = b"".join(int(value).to_bytes(width, "little", signed=True) for value in raw.ravel())
    with wave.open(file := io.BytesIO(), "wb") as sound:
        sound.setparams((channels, width, rate, 0, "NONE", ""))
        sound.writeframes(data)
    return file.getvalue()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_width_of_integers_is_read(width):
    half = 2 ** (8 * width - 2)
    sound, rate = decode(wav([0, half, -half, -2 * half], 8_000, width))
    assert rate == 8_000
    assert sound.dtype == np.float32
    assert sound.tolist() == [0, 0.5, -0.5, -1]


def test_channels_are_averaged():
    sound, _ = decode(wav([[0, 16384], [-16384, -16384]], channels=2))
    assert sound.tolist() == [0.25, -0.5]


WHOLE = wav(range(100))
BAD = [
    (b"", "an empty file"),
    (wav([]), "0 seconds"),
    (wav([0] * 50), "silence"),
    (WHOLE[:-20], "breaks off at 90 of 100"),
    (b"fLaC" + bytes(50), "a FLAC file; without `soundfile` only WAV"),
    (b"hello, I am no recording", "audio of no known kind"),
    # Samples that are floating-point numbers, which the standard library does not read.
    (WHOLE[:20] + b"\x03\x00" + WHOLE[22:], "a WAV file; without `soundfile`"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_content_that_is_not_sound_is_refused(content, message, monkeypatch):
    monkeypatch.setattr(audio, "find_spec", lambda name: None)
    with pytest.raises(EncodingProblem, match=message) as error:
        decode(content)
    assert error.value.kind == "audio"


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(EncodingProblem, match="names no file: .*gone.wav"):
        Recording(str(tmp_path / "gone.wav")).samples(16_000)
    with pytest.raises(EncodingProblem, match="irectory"):
        Recording(str(tmp_path)).samples(16_000)


def test_a_copy_says_the_same(tmp_path):
    (tmp_path / "a.wav").write_bytes(WHOLE)
    (tmp_path / "b.wav").write_bytes(WHOLE)
    first, second = (Recording(str(tmp_path / name)).digest() for name in ("a.wav", "b.wav"))
    assert first == second == Recording("c.wav", WHOLE).digest()
    assert first != Recording(None, wav(range(1, 101))).digest()


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_another_rate_is_the_same_sound(rate):
    pytest.importorskip("scipy")
    # A tone of 440 Hz, away from the edges of the recording, where it is faded in.
    there = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)
    found = Recording(None, wav(np.round(there * 32767), rate)).samples(16_000)
    wanted = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert len(found) == 16_000
    assert found.dtype == np.float32
    assert np.abs(found - wanted)[500:-500].max() < 2e-3


def test_what_the_lower_rate_cannot_hold_is_filtered_out_and_not_folded_back():
    pytest.importorskip("scipy")
    times = np.arange(48_000) / 48_000
    high = np.sin(2 * np.pi * 12_000 * times).astype(np.float32)
    assert np.abs(resample(high, 48_000, 16_000))[500:-500].max() < 1e-2
    # Every third sample alone would be a loud tone of 4 kHz.
    assert np.abs(high[::3]).max() > 0.5


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "WAV"])
def test_other_kinds_are_read_where_soundfile_is(kind):
    soundfile = pytest.importorskip("soundfile")
    values = (np.sin(np.arange(8_000) / 20) / 2).astype(np.float32)
    stereo = np.stack([values, np.zeros_like(values)], 1)
    subtype = "FLOAT" if kind == "WAV" else None
    soundfile.write(file := io.BytesIO(), stereo, 16_000, format=kind, subtype=subtype)
    sound, rate = decode(file.getvalue())
    assert rate == 16_000
    assert np.abs(sound - values / 2).max() < (0.05 if kind == "OGG" else 1e-4)
    with pytest.raises(EncodingProblem, match="cannot be read"):
        decode(file.getvalue()[:30])
