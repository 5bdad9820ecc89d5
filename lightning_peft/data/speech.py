"""Data for speech recognition: audio and transcripts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Features, Value
from datasets import Sequence as ListOf
from transformers import AutoFeatureExtractor
from transformers.models.auto.feature_extraction_auto import feature_extractor_class_from_name
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from lightning_peft.data.audio import Recording, can_resample, clip, decode
from lightning_peft.data.batching import pad_to_longest
from lightning_peft.data.encoding import IGNORED, TextSpan, token_spans
from lightning_peft.data.media_source import AudioSource
from lightning_peft.data.reading import digest_of_rows
from lightning_peft.data.row_data_module import RowDataModule
from lightning_peft.data.row_encoder import RowEncoder, SpecialTokens, end_token_id
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import Layout
from lightning_peft.data.tokenized import digest_of_tokenizer, load_pretrained, load_tokenizer
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import ConfigError, similar_names

# Whisper's decoder has so many places; others have more.
MAX_TRANSCRIPT_TOKENS = 448
# Where the feature extractor has no limit of its own.
DEFAULT_MAX_SECONDS = 30.0


_CHANGED = "Recordings must stay as they are while a run goes on; start it again."


class SpeechData(RowDataModule):
    """Recordings and their transcripts to train a speech recognizer on.

    Every row is checked before training, and every recording is read once for that. What the model
    hears is computed when a batch is loaded, by the feature extractor.

    Args:
        data: File (JSONL, JSON, CSV, TSV, Parquet) with paths relative to it, a folder with such a
            file (``metadata.csv``), or dataset on the hub.
        processor: Name on the hub, or folder, of the model whose feature extractor and tokenizer
            are used.
        feature_extractor: Settings of a feature extractor, with its ``feature_extractor_type``,
            where ``processor`` has a tokenizer alone.
        language: What is spoken, for Whisper in many languages: ``"en"`` or ``"english"``.
        task: ``"transcribe"``, or ``"translate"`` for transcripts in English, for Whisper.
        max_seconds: Longest recording; by default what the model hears at once: 30 for Whisper.
        max_length: Longest transcript in tokens; 448, which is Whisper's, by default.
        processor_revision: Branch, tag or commit of the processor on the hub.
        **options: Keyword arguments of
            :class:`RowDataModule <lightning_peft.data.row_data_module.RowDataModule>`.

    Raises:
        ConfigError: If arguments contradict each other, or the data cannot be used.
    """

    decodes = True
    accepts = ("speech",)
    # Next to a recording, a column of text would be detected as plain text.
    default_shape = "speech"
    batch_columns = ("path", "content", "seconds", "labels", "target")
    source_class = AudioSource

    def __init__(
        self,
        data: str,
        processor: str,
        feature_extractor: dict[str, Any] | None = None,
        language: str | None = None,
        task: Literal["transcribe", "translate"] | None = None,
        max_seconds: float | None = None,
        max_length: int | None = None,
        processor_revision: str | None = None,
        **options: Any,
    ) -> None:
        self._extractor: Any = None
        self._tokenizer: Any = None
        super().__init__(data, **options)

    def _argument_problems(self) -> list[str]:
        problems = super()._argument_problems()
        if self.hparams["max_seconds"] is not None and self.hparams["max_seconds"] <= 0:
            problems.append(f"max_seconds={self.hparams['max_seconds']} is not above 0")
        return problems

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, set to language and task where it has tokens for them."""
        if self._tokenizer is None:
            name, revision = self.hparams["processor"], self.hparams["processor_revision"]
            tokenizer: Any = load_tokenizer(name, revision)
            requested = self.generation
            if hasattr(tokenizer, "set_prefix_tokens"):
                _set_language(tokenizer, requested)
            elif requested:
                raise ConfigError(
                    f"{requested} is given, and the tokenizer {self.hparams['processor']!r} has no "
                    "tokens for languages and tasks. Leave them out."
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    @property
    def generation(self) -> dict[str, Any]:
        """Arguments of ``generate`` with which it begins as the labels do."""
        language, task = self.hparams["language"], self.hparams["task"]
        if language is None:
            return {} if task is None else {"task": task}
        return {"language": language, "task": task or "transcribe"}

    @property
    def extractor(self) -> Any:
        """The feature extractor, loaded on first use."""
        if self._extractor is None:
            hparams = self.hparams
            options, name = hparams["feature_extractor"], hparams["processor"]
            if options is not None:
                self._extractor = _build_extractor(options)
            else:
                revision, instead = hparams["processor_revision"], ", or give feature_extractor="
                kind = (AutoFeatureExtractor, "feature extractor", name, revision)
                self._extractor = load_pretrained(*kind, "processor", instead)
        return self._extractor

    @property
    def max_length(self) -> int:
        """Longest transcript in tokens."""
        limit, requested = int(self.tokenizer.model_max_length), self.hparams["max_length"]
        return min(limit, MAX_TRANSCRIPT_TOKENS if requested is None else requested)

    @property
    def max_seconds(self) -> float:
        """Longest recording; refuses more than the model hears at once."""
        extractor, requested = self.extractor, self.hparams["max_seconds"]
        heard = getattr(extractor, "n_samples", None)
        limit = DEFAULT_MAX_SECONDS if heard is None else heard / extractor.sampling_rate
        if requested is not None and heard is not None and requested > limit:
            raise ConfigError(
                f"max_seconds={requested:g} is more than the {limit:g} seconds that the model "
                "hears at once: it would be trained on a transcript of what it never heard. Lower "
                "it."
            )
        return limit if requested is None else float(requested)

    def encoder_for(self, layout: Layout) -> RowEncoder:
        rate = int(self.extractor.sampling_rate)
        return SpeechRows(self.tokenizer, self.max_length, rate, self.max_seconds)

    def encoding(self) -> dict[str, Any]:
        """Returns all that decides labels and problems, the recordings' files among it."""
        files = [f for source in self._sources() for f in source.named_files()]
        stamps = [(str(f), stat.st_size, stat.st_mtime_ns) for f in files for stat in [f.stat()]]
        revision = self.hparams["processor_revision"]
        return {
            "tokenizer": digest_of_tokenizer(self.tokenizer),
            **({"processor_revision": revision} if revision else {}),
            "max_length": self.max_length,
            **self.generation,
            "max_seconds": self.max_seconds,
            "rate": int(self.extractor.sampling_rate),
            "recordings": digest_of_rows(stamps),
        }

    def collator(self) -> Callable[[list[Any]], Any]:
        return SpeechBatch(self.extractor)

    def render_row(self, row: dict[str, Any]) -> list[TextSpan]:
        """Returns a prepared row as it is shown: recording and transcript."""
        name = f" {Path(row['path']).name}" if row["path"] else ""
        shown = f"[recording{name}: {row['seconds']:.1f} seconds]\n"
        sound = clip(Recording(row["path"], row["content"]).found)
        labels = row["labels"]
        return [
            TextSpan(False, shown, [], audio=sound),
            *token_spans(self.tokenizer, labels, labels),
        ]


class SpeechBatch:
    """Collates rows: reads their recordings, and computes the features that the model hears."""

    def __init__(self, extractor: Any) -> None:
        self.extractor = extractor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns a batch of the rows that :class:`SpeechData` prepares.

        Returns:
            The features of the sounds (Whisper: ``input_features``, float32,
            ``(batch, mel bins, frames)``), ``labels``, int64, ``(batch, length)``, with -100 where
            there is no label; and the lists ``source``, names of recordings, and ``target``.
        """
        rate = int(self.extractor.sampling_rate)
        # Whisper fills up to what it hears at once; others are filled up to the longest.
        padding = {} if hasattr(self.extractor, "n_samples") else {"padding": True}
        features = self.extractor(
            [self._sound(row, rate) for row in rows],
            sampling_rate=rate,
            return_tensors="pt",
            **padding,
        )
        return {
            **features,
            "labels": pad_to_longest([row["labels"] for row in rows], IGNORED),
            "source": [row["path"] or "" for row in rows],
            "target": [row["target"] for row in rows],
        }

    def _sound(self, row: dict[str, Any], rate: int) -> Any:
        try:
            sound = Recording(row["path"], row["content"]).samples(rate)
        except EncodingProblem as error:
            raise ConfigError(f"A row that was prepared {error} now. {_CHANGED}") from error
        if not np.isclose(len(sound) / rate, row["seconds"], atol=2 / rate):
            raise ConfigError(
                f"{row['path']!r} has {len(sound) / rate:.2f} seconds, and had "
                f"{row['seconds']:.2f} when it was prepared. {_CHANGED}"
            )
        return sound


def _set_language(tokenizer: Any, requested: dict[str, Any]) -> None:
    language, task = requested.get("language"), requested.get("task")
    code = TO_LANGUAGE_CODE.get(str(language).lower(), str(language).lower())
    tokens = [f"<|{token}|>" for token in (language and code, task) if token is not None]
    try:
        tokenizer.set_prefix_tokens(language=language, task=task, predict_timestamps=False)
        there = tokenizer.convert_ids_to_tokens(tokenizer.prefix_tokens)
    except (ValueError, TypeError):
        there = []
    # The tokenizer counts places in a list, and takes whatever token is there.
    lacking = [token for token in tokens if token not in there]
    if lacking:
        known = [token[2:-2] for token in tokenizer.all_special_tokens if token.startswith("<|")]
        raise ConfigError(
            f"{requested} cannot be used: the tokenizer {tokenizer.name_or_path!r} has no token "
            f"{' and '.join(lacking)}{similar_names(str(language), [*known, *TO_LANGUAGE_CODE])}. "
            "Name what the model was trained on."
        )


def _build_extractor(settings: dict[str, Any]) -> Any:
    options = dict(settings)
    name = options.pop("feature_extractor_type", None)
    kind = feature_extractor_class_from_name(name) if isinstance(name, str) else None
    if kind is None:
        raise ConfigError(
            f"feature_extractor={settings!r} has no feature_extractor_type that transformers "
            "knows, such as 'WhisperFeatureExtractor'."
        )
    known = set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}
    unknown = sorted(set(options) - known)
    if unknown:
        hints = "; ".join(f"{word!r}{similar_names(word, known)}" for word in unknown)
        raise ConfigError(f"feature_extractor: {name} has no setting {hints}. Correct the name.")
    return kind(**options)


class SpeechRows(RowEncoder):
    """Tokens of a transcript, and its recording, whose sound is read again for each batch."""

    features = Features(
        {
            "path": Value("string"),
            "content": Value("binary"),
            "labels": ListOf(Value("int32")),
            "target": Value("string"),
            "seconds": Value("float64"),
            "length": Value("int32"),
            "end_added": Value("bool"),
        }
    )
    counts = ("seconds", "trained_tokens", "ends_trained", "ends_added", "unknown_tokens")

    def __init__(self, tokenizer: Any, max_length: int, rate: int, max_seconds: float) -> None:
        self.tokenizer = tokenizer
        self.end: int = end_token_id(tokenizer)
        self.max_length, self.rate, self.max_seconds = max_length, rate, max_seconds
        self._special_tokens = SpecialTokens(tokenizer)

    def encode(self, sample: Sample) -> list[dict[str, Any]]:
        assert sample.audio is not None
        assert sample.text is not None
        seconds = self._seconds(sample.audio)
        labels, added = self._labels(sample.text)
        return [
            {
                "path": sample.audio.path,
                "content": sample.audio.content,
                "labels": labels,
                "target": sample.text,
                "seconds": seconds,
                # In hundredths of a second, which are the frames of Whisper.
                "length": max(1, round(100 * seconds)),
                "end_added": added,
            }
        ]

    def count(self, row: dict[str, Any]) -> dict[str, Any]:
        unknown = self.tokenizer.unk_token_id
        # Whisper's is its end token.
        unknown_tokens = row["labels"].count(unknown) if unknown != self.end else 0
        counts = super().count({**row, "unknown_tokens": unknown_tokens})
        return {**counts, "seconds": row["seconds"]}

    def _seconds(self, audio: Recording) -> float:
        sound, rate = decode(audio.found)
        seconds = len(sound) / rate
        if seconds > self.max_seconds:
            raise EncodingProblem(
                "audio_long", f"has {seconds:.1f} seconds of audio of {self.max_seconds:g} allowed"
            )
        if rate != self.rate and not can_resample():
            raise EncodingProblem(
                "audio",
                f"has audio at {rate:,} Hz for a model that hears {self.rate:,} Hz, and resampling "
                "takes `scipy` (pip install scipy)",
            )
        return seconds

    def _labels(self, text: str) -> tuple[list[int], bool]:
        self._special_tokens.check(text, "transcript")
        ids: list[int] = list(self.tokenizer(text, verbose=False)["input_ids"])
        # The model puts its start token before the labels itself.
        start = list(getattr(self.tokenizer, "prefix_tokens", [])[:1])
        ids = ids[1:] if start and ids[:1] == start else ids
        added = ids[-1:] != [self.end]
        ids = [*ids, self.end] if added else ids
        if len(ids) > self.max_length:
            raise EncodingProblem(
                "long", f"has {len(ids):,} tokens as transcript of {self.max_length:,} allowed"
            )
        return ids, added
