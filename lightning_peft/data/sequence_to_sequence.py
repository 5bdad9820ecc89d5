"""Data for encoder-decoder models: source and target texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from datasets import Features, Value
from datasets import Sequence as ListOf

from lightning_peft.data.batching import pad_inputs, pad_to_longest
from lightning_peft.data.encoding import IGNORED
from lightning_peft.data.row_encoder import RowEncoder, SpecialTokens, end_token_id
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import Layout
from lightning_peft.data.tokenized import TokenizedData
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import ConfigError, similar_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PairRows(RowEncoder):
    """Tokens of a source, and of its target with the end-of-sequence token."""

    features = Features(
        {
            "input_ids": ListOf(Value("int32")),
            "labels": ListOf(Value("int32")),
            "source": Value("string"),
            "target": Value("string"),
            "length": Value("int32"),
            "end_added": Value("bool"),
            "full_length": Value("int32"),
            "tokens_cut": Value("int32"),
        }
    )
    parallelizable = resumable = True
    counts = (
        *("tokens", "trained_tokens", "ends_trained", "ends_added"),
        *("truncated", "tokens_cut", "unknown_tokens"),
    )

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        max_target_length: int,
        truncate: bool = False,
        prefix: str = "",
        languages: tuple[str, str] | None = None,
        keep_unknown: bool = False,
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.end: int = end_token_id(tokenizer)
        self.limits = {"source": max_length, "target": max_target_length}
        self.truncate, self.prefix = truncate, prefix
        self.languages, self.keep_unknown = languages, keep_unknown
        self._special_tokens = SpecialTokens(tokenizer)

    def encode(self, sample: Sample) -> list[dict[str, Any]]:
        source, target = self._texts(sample)
        self._special_tokens.check(source, "source")
        self._special_tokens.check(target, "target")
        ids, source_cut = self._source(f"{self.prefix}{source}")
        labels, target_cut, added = self._target(target)
        return [
            {
                "input_ids": ids,
                "labels": labels,
                "source": source,
                "target": target,
                "length": len(ids),
                "end_added": added,
                "full_length": len(ids) + source_cut,
                "tokens_cut": source_cut + target_cut,
            }
        ]

    def count(self, row: dict[str, Any]) -> dict[str, int]:
        both = [*row["input_ids"], *row["labels"]]
        unknown = both.count(self.tokenizer.unk_token_id)
        return super().count({**row, "tokens": len(both), "unknown_tokens": unknown})

    def _texts(self, sample: Sample) -> tuple[str, str]:
        if sample.translation is not None:
            assert self.languages is not None
            texts = [sample.translation.get(name) for name in self.languages]
            for name, text in zip(self.languages, texts, strict=True):
                if not isinstance(text, str) or not text.strip():
                    raise EncodingProblem("missing", f"has no text in {name!r} as translation")
            return str(texts[0]), str(texts[1])
        roles = [message["role"] for message in sample.messages]
        if roles != ["user", "assistant"]:
            raise EncodingProblem(
                "roles",
                f"has the turns {', '.join(roles)}: an encoder reads one text, and the decoder "
                "writes one",
            )
        for place, message in enumerate(sample.messages, start=1):
            extra = [key for key in message if key not in ("role", "content")]
            if extra:
                raise EncodingProblem(
                    "key", f"has {', '.join(extra)} in turn {place}, and no template writes them"
                )
        return sample.messages[0]["content"], sample.messages[1]["content"]

    def _source(self, text: str) -> tuple[list[int], int]:
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        cut = self._over("source", len(ids))
        if cut:
            # The tokenizer keeps the special tokens that it puts around a text.
            limit = self.limits["source"]
            ids = self.tokenizer(text, truncation=True, max_length=limit)["input_ids"]
        return ids, cut

    def _target(self, text: str) -> tuple[list[int], int, bool]:
        ids: list[int] = list(self.tokenizer(text_target=text, verbose=False)["input_ids"])
        # Some put the language after the end, and one token may be begin and end.
        added = self.end not in ids[1:]
        ids = [*ids, self.end] if added else ids
        unknown = self.tokenizer.unk_token_id
        if unknown in ids and not self.keep_unknown:
            raise EncodingProblem("unknown", self._unknown(text, ids.count(unknown)))
        cut = self._over("target", len(ids))
        # A target that is cut does not end there, so it gets no end token.
        return ids[: len(ids) - cut], cut, added and not cut

    def _unknown(self, text: str, count: int) -> str:
        unknown = self.tokenizer.unk_token_id
        characters = [
            c
            for c in dict.fromkeys(text)
            if not c.isspace()
            and unknown in self.tokenizer(text_target=c, add_special_tokens=False)["input_ids"]
        ]
        shown = ", ".join(map(repr, characters[:5])) or "none of them alone"
        return f"has {count:,} unknown tokens in its target (characters: {shown})"

    def _over(self, side: str, length: int) -> int:
        limit = self.limits[side]
        if length > limit and not self.truncate:
            argument = "max_length" if side == "source" else "max_target_length"
            raise EncodingProblem(
                "long", f"has {length:,} tokens as {side} of {limit:,} allowed ({argument})"
            )
        return max(0, length - limit)


class Seq2SeqData(TokenizedData):
    """Pairs of texts to train an encoder-decoder model on: summaries, translations, rewriting.

    Every row is checked before training. Labels are the target's tokens with the end-of-sequence
    token; the decoder's input is made of them by the model.

    Args:
        data: File (JSONL, JSON, CSV, TSV, Parquet), folder of such, or dataset on the hub.
        tokenizer: Name on the hub, or folder.
        shape: ``"auto"``, or one of ``"source_target"``, ``"translation"``,
            ``"prompt_completion"``.
        prefix: What stands before each source, such as ``"summarize: "`` for T5.
        max_target_length: Longest target in tokens, with its end; by default as ``max_length``,
            which is for the source with its prefix.
        source_language: Which of the texts of a row ``{"translation": {"en": ..., "fr": ...}}`` is
            read. Tokenizers for many languages are set to them.
        target_language: Which of them is written.
        language_codes: The tokenizer's own codes, where the rows have others, such as
            ``{"en": "eng_Latn"}``.
        unknown: Targets with characters that the tokenizer does not know are an error, or are
            kept.
        **options: Keyword arguments of
            :class:`TokenizedData <lightning_peft.data.tokenized.TokenizedData>` and
            :class:`RowDataModule <lightning_peft.data.row_data_module.RowDataModule>`.

    Raises:
        ConfigError: If arguments contradict each other, or the data cannot be used.
    """

    accepts = ("source_target", "translation", "prompt_completion")
    batch_columns = ("input_ids", "labels", "source", "target")

    def __init__(
        self,
        data: str,
        tokenizer: str,
        shape: Literal["auto", "source_target", "translation", "prompt_completion"] = "auto",
        prefix: str = "",
        max_target_length: int | None = None,
        source_language: str | None = None,
        target_language: str | None = None,
        language_codes: dict[str, str] | None = None,
        unknown: Literal["error", "keep"] = "error",
        **options: Any,
    ) -> None:
        super().__init__(data, tokenizer, **options)

    def _argument_problems(self) -> list[str]:
        problems = super()._argument_problems()
        hparams = self.hparams
        if hparams["max_target_length"] is not None and hparams["max_target_length"] < 1:
            problems.append(f"max_target_length={hparams['max_target_length']} is less than 1")
        names = ("source_language", "target_language")
        if len({hparams[name] is None for name in names}) > 1:
            details = ", ".join(f"{name}={hparams[name]!r}" for name in names)
            problems.append(f"one language alone is given ({details}); give both, or none")
        return problems

    @property
    def languages(self) -> tuple[str, str] | None:
        """The languages of source and target, where they are given."""
        pair = (self.hparams["source_language"], self.hparams["target_language"])
        return None if None in pair else pair

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, set to the languages where it is for many."""
        if self._tokenizer is None:
            tokenizer: Any = super().tokenizer
            if hasattr(tokenizer, "src_lang"):
                source, target = self._codes(tokenizer)
                tokenizer.src_lang, tokenizer.tgt_lang = source, target
        return super().tokenizer

    def _codes(self, tokenizer: Any) -> list[str]:
        name = self.hparams["tokenizer"]
        # The next look at the tokenizer must not find it as if it were ready.
        self._tokenizer = None
        if self.languages is None:
            raise ConfigError(
                f"The tokenizer {name!r} is for many languages and writes their codes into the "
                "rows. Say which with source_language= and target_language=."
            )
        codes = self.hparams["language_codes"] or {}
        requested = [codes.get(language, language) for language in self.languages]
        known = [token for token in tokenizer.all_special_tokens if not token.startswith("<")]
        unknown = [code for code in requested if code not in known]
        if unknown:
            hints = "".join(f"\n  - {code!r}{similar_names(code, known)}" for code in unknown)
            raise ConfigError(
                f"The tokenizer {name!r} has no such language codes: {hints}\nGive the rows' own "
                'names with the tokenizer\'s codes: language_codes={"en": "eng_Latn"}.'
            )
        self._tokenizer = tokenizer
        return requested

    @property
    def generation(self) -> dict[str, Any]:
        """Arguments of ``generate`` for this data: the token of the target's language."""
        tokenizer: Any = self.tokenizer
        if getattr(tokenizer, "tgt_lang", None) is None:
            return {}
        return {"forced_bos_token_id": tokenizer.convert_tokens_to_ids(tokenizer.tgt_lang)}

    @property
    def max_target_length(self) -> int:
        """Longest target in tokens."""
        requested: int | None = self.hparams["max_target_length"]
        return self.max_length if requested is None else requested

    def encoder_for(self, layout: Layout) -> RowEncoder:
        hparams = self.hparams
        if layout.shape.name == "translation" and self.languages is None:
            raise ConfigError(
                "The rows hold texts in several languages. Say which is read and which is written, "
                'such as source_language="en" and target_language="fr".'
            )
        return PairRows(
            self.tokenizer,
            self.max_length,
            self.max_target_length,
            hparams["over_long"] == "truncate",
            hparams["prefix"],
            self.languages,
            hparams["unknown"] == "keep",
        )

    def encoding(self) -> dict[str, Any]:
        names = ("prefix", "source_language", "target_language", "language_codes", "unknown")
        requested = {name: self.hparams[name] for name in names}
        return {**super().encoding(), **requested, "max_target_length": self.max_target_length}

    def collator(self) -> Callable[[list[Any]], Any]:
        return partial(pad_pairs, pad_token_id=self.pad_token_id)


def pad_pairs(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Returns a batch of pairs, int64, ``labels`` padded with -100, and the texts as lists."""
    return {
        **pad_inputs(rows, pad_token_id),
        "labels": pad_to_longest([row["labels"] for row in rows], IGNORED),
        "source": [row["source"] for row in rows],
        "target": [row["target"] for row in rows],
    }
