"""Decoding and resampling of audio files."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import wave
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lightning_peft.data.validation import EncodingProblem

Samples = np.ndarray[Any, np.dtype[np.float32]]

_KINDS = {b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3": "MP3", b"\xff\xfb": "MP3", b"RIFF": "WAV"}
# A clip to listen to: its longest time, and about how many samples each second has.
CLIP_SECONDS, _CLIP_RATE = 10, 8_000


@dataclass(frozen=True)
class Recording:
    """A recording: the path of its file, or its bytes (then ``path`` is a name only)."""

    path: str | None = None
    content: bytes | None = None

    @cached_property
    def found(self) -> bytes:
        """The bytes; an :class:`EncodingProblem` if they cannot be read."""
        if self.content is not None:
            return self.content
        try:
            return Path(str(self.path)).read_bytes()
        except FileNotFoundError as error:
            raise EncodingProblem("audio", f"names no file: {self.path}") from error
        except OSError as error:
            reason = error.strerror or error
            raise EncodingProblem("audio", f"names {self.path}, and: {reason}") from error

    def digest(self) -> str:
        """Returns a hash of the sound itself, so that a copy under another name is known."""
        try:
            return hashlib.sha256(self.found).hexdigest()
        except EncodingProblem:
            return f"no file: {self.path}"

    def samples(self, rate: int) -> Samples:
        """Returns one channel at ``rate`` samples per second, from -1 to 1."""
        sound, its_rate = decode(self.found)
        return sound if its_rate == rate else resample(sound, its_rate, rate)


def decode(content: bytes) -> tuple[Samples, int]:
    """Returns a file's samples as one channel, and its rate; refuses what is not sound, or silent.

    PCM WAV is read by the standard library, anything else by ``soundfile`` where it is installed.
    """
    if not content:
        raise EncodingProblem("audio", "has an empty file as audio")
    try:
        sound, rate = _wav(content)
    except (wave.Error, EOFError):
        sound, rate = _by_soundfile(content)
    if not len(sound):
        raise EncodingProblem("audio", "has audio of 0 seconds")
    if not np.isfinite(sound).all():
        raise EncodingProblem("audio", "has audio with values that are not numbers")
    if (sound == sound[0]).all():
        raise EncodingProblem("audio", "has audio in which all samples are the same: silence")
    return sound, rate


def _wav(content: bytes) -> tuple[Samples, int]:
    with wave.open(io.BytesIO(content)) as file:
        width, channels, frames = file.getsampwidth(), file.getnchannels(), file.getnframes()
        data = file.readframes(frames)
        rate = file.getframerate()
    # The standard library silently returns less if something is missing.
    if len(data) != frames * width * channels or rate <= 0:
        there = len(data) // (width * channels)
        raise EncodingProblem("audio", f"has a WAV file that breaks off at {there:,} of {frames:,}")
    if width == 1:
        values = (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    elif width == 3:
        # Three bytes above a fourth that is zero.
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        values = (wide.view("<i4")[:, 0] / 2**31).astype(np.float32)
    else:
        values = (np.frombuffer(data, f"<i{width}") / 2 ** (8 * width - 1)).astype(np.float32)
    return values.reshape(-1, channels).mean(1, dtype=np.float32), rate


def _by_soundfile(content: bytes) -> tuple[Samples, int]:
    kind = next((name for mark, name in _KINDS.items() if content.startswith(mark)), None)
    if find_spec("soundfile") is None:
        what = "audio of no known kind" if kind is None else f"a {kind} file"
        raise EncodingProblem(
            "audio",
            f"has {what}; without `soundfile` only WAV with integer samples is read "
            "(pip install soundfile)",
        )
    soundfile: Any = import_module("soundfile")
    try:
        sound, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise EncodingProblem("audio", f"has audio that cannot be read: {error}") from error
    return sound.mean(1, dtype=np.float32), int(rate)


def clip(content: bytes) -> str:
    """Returns the first 10 seconds of a recording as a ``data:`` URL: 16-bit WAV, about 8 kHz."""
    sound, rate = decode(content)
    step = max(1, rate // _CLIP_RATE)
    sound = sound[: CLIP_SECONDS * rate]
    # The mean of neighbours: enough to know by ear what it is.
    sound = sound[: max(1, len(sound) // step) * step]
    small = sound.reshape(-1, step).mean(1) if len(sound) >= step else sound
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(rate // step)
        written.writeframes((32_767 * np.clip(small, -1, 1)).astype("<i2").tobytes())
    return "data:audio/wav;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def can_resample() -> bool:
    """Returns whether recordings at another rate than the model's can be used."""
    return find_spec("scipy") is not None


def resample(sound: Samples, rate: int, target_rate: int) -> Samples:
    """Returns one channel at another rate, by ``scipy.signal.resample_poly``."""
    signal: Any = import_module("scipy.signal")
    common = math.gcd(rate, target_rate)
    found: Samples = signal.resample_poly(sound, target_rate // common, rate // common)
    return found.astype(np.float32)
