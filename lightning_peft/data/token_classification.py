"""Data for token classification."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
from datasets import Features, Value
from datasets import Sequence as ListOf

from lightning_peft.data.batching import pad_inputs
from lightning_peft.data.encoding import IGNORED, TextSpan
from lightning_peft.data.labels import LabelledData, LabelledRows
from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import Layout
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import ConfigError

# Of a token that belongs to no word.
NO_WORD = -1


class TagRows(LabelledRows):
    """Tokens of a sentence, the word of each, and the tags of the words."""

    features = Features(
        {
            "input_ids": ListOf(Value("int32")),
            "token_type_ids": ListOf(Value("int8")),
            "word_of": ListOf(Value("int32")),
            "words": ListOf(Value("string")),
            "tags": ListOf(Value("string")),
            "length": Value("int32"),
            "tokens_cut": Value("int32"),
            "words_cut": Value("int32"),
        }
    )
    counts = ("tokens", "words", "truncated", "tokens_cut", "words_cut")

    def encode(self, sample: Sample) -> list[dict[str, Any]]:
        words = sample.tokens
        tags = [self.names.find(tag, "tag") for tag in sample.tags]
        self.check_texts(*words)
        found = self.tokenizer(" ".join(words), return_offsets_mapping=True, verbose=False)
        word_of = words_of_tokens(words, found["offset_mapping"], found.sequence_ids(0))
        absent = sorted(set(range(len(words))) - set(word_of))
        if absent:
            raise EncodingProblem(
                "tags",
                f"has the word {words[absent[0]]!r} as number {absent[0]}, of which the tokenizer "
                "makes no token",
            )
        ids, length = found["input_ids"], len(found["input_ids"])
        positions = range(length)
        if length > self.max_length:
            positions = self._positions_kept(word_of)
        places = [word_of[place] for place in positions]
        # A word that is cut within is kept: its first token is there.
        count = max(places) + 1
        types = found.get("token_type_ids", [])
        return [
            {
                "input_ids": [ids[place] for place in positions],
                "token_type_ids": [types[place] for place in positions] if types else [],
                "word_of": places,
                "words": words[:count],
                "tags": tags[:count],
                "length": len(positions),
                "tokens_cut": length - len(positions),
                "words_cut": len(words) - count,
            }
        ]

    def _positions_kept(self, word_of: Sequence[int]) -> Any:
        """Returns the places of the tokens that fit, with the special ones at the end."""
        length = len(word_of)
        end = max(place for place in range(length) if word_of[place] != NO_WORD) + 1
        room = self.max_length - (length - end)
        if not self.truncate or set(word_of[: max(0, room)]) <= {NO_WORD}:
            raise self.too_long(length)
        return [*range(room), *range(end, length)]

    def count(self, row: dict[str, Any]) -> dict[str, int]:
        self.names.add(row["tags"])
        return super().count({**row, "words": len(row["words"])})


def words_of_tokens(
    words: Sequence[str],
    offsets: Sequence[tuple[int, int]],
    sequence_ids: Sequence[int | None],
) -> list[int]:
    """Returns the number of the word of each token, or -1; refuses a token of two words.

    Words are joined by spaces and tokenized as running text, as in pretraining: tokenizers that are
    given words one by one write them as if each began a text.
    """
    text = " ".join(words)
    starts = [0, *accumulate(len(word) + 1 for word in words)][:-1]
    found = []
    for (begin, end), sequence in zip(offsets, sequence_ids, strict=True):
        piece = text[begin:end]
        if sequence is None or not piece.strip():
            found.append(NO_WORD)
            continue
        begin += len(piece) - len(piece.lstrip())
        end -= len(piece) - len(piece.rstrip())
        first, last = (bisect_right(starts, place) - 1 for place in (begin, end - 1))
        if first != last:
            raise EncodingProblem(
                "tags",
                f"has the words {words[first]!r} and {words[last]!r} in one token {piece!r}",
            )
        found.append(first)
    return found


class TokenClassificationData(LabelledData):
    """Sentences whose words have tags, to train a tagger on.

    Rows have ``tokens``, a list of words, and ``tags`` (or ``ner_tags``, ``labels``), a list of as
    many names or numbers. The tag of a word is on its first token; the others have none, unless
    asked for. Every row is checked before training, and a tag without a training row is named in a
    warning.

    Args:
        data: File (JSONL, JSON, Parquet), folder of such, or dataset on the hub.
        tokenizer: Name on the hub, or folder; it has to be a fast one.
        labels: The names of all tags in the order of their numbers, so that a name that is none
            of them is an error; by default the names in the rows, sorted. Rows may then hold the
            numbers, or other names for these, as columns of the datasets library have them.
        over_long: Rows longer than ``max_length`` are an error, or are cut at the end
            (``"truncate"``); the words that this costs are counted.
        label_all_subwords: Also train the other tokens of a word: on ``I-X`` where the word has
            the tag ``B-X`` and there is such a tag, else on the tag of the word.
        **options: Keyword arguments of
            :class:`TokenizedData <lightning_peft.data.tokenized.TokenizedData>` and
            :class:`RowDataModule <lightning_peft.data.row_data_module.RowDataModule>`.

    Raises:
        ConfigError: If arguments contradict each other, or the data cannot be used.
    """

    accepts = ("tokens_tags",)
    default_shape = "tokens_tags"
    batch_columns = ("input_ids", "token_type_ids", "word_of", "words", "tags")
    label_field = "tags"
    row_encoder = TagRows

    def __init__(
        self,
        data: str,
        tokenizer: str,
        labels: list[str] | None = None,
        over_long: Literal["error", "truncate"] = "error",
        label_all_subwords: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(data, tokenizer, labels, over_long, **options)

    def render_row(self, row: dict[str, Any]) -> list[TextSpan]:
        pairs = zip(row["words"], row["tags"], strict=False)
        return [TextSpan(True, " ".join(f"{word}/{tag}" for word, tag in pairs), [])]

    def encoder_for(self, layout: Layout) -> RowEncoder:
        hparams = self.hparams
        if not self.tokenizer.is_fast:
            raise ConfigError(
                f"The tokenizer {hparams['tokenizer']!r} is a slow one "
                f"({type(self.tokenizer).__name__}), which does not say which word a token belongs "
                "to. Use a model that has a fast tokenizer (a file tokenizer.json)."
            )
        return super().encoder_for(layout)

    def label_counts(self, split: str) -> dict[str, int]:
        column = self.read().splits[split].data.column("tags")
        counts: Counter[str] = Counter()
        for chunk in column.chunks:
            for pair in chunk.flatten().value_counts().to_pylist():
                counts[pair["values"]] += pair["counts"]
        return dict(counts)

    def collator(self) -> Callable[[list[Any]], Any]:
        return partial(
            collate_tags,
            pad_token_id=self.pad_token_id,
            numbers={name: number for number, name in enumerate(self.labels)},
            all_subwords=self.hparams["label_all_subwords"],
        )


def collate_tags(
    rows: Sequence[dict[str, Any]], pad_token_id: int, numbers: dict[str, int], all_subwords: bool
) -> dict[str, Any]:
    """Returns a batch of sentences; ``numbers`` is that of each tag.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels`` (-100 where there is none), ``word_starts``
        (1 on the first token of each word) and, if the tokenizer has them, ``token_type_ids``,
        each ``(batch, length)``, int64; and ``words``, the words of each row.
    """
    batch: dict[str, Any] = dict(pad_inputs(rows, pad_token_id))
    batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
    batch["word_starts"] = torch.zeros_like(batch["input_ids"])
    for number, row in enumerate(rows):
        before = NO_WORD
        for place, word in enumerate(row["word_of"]):
            # Tokens of blanks between words belong to none.
            if word == NO_WORD:
                continue
            tag = row["tags"][word]
            if word != before:
                batch["word_starts"][number, place] = 1
                batch["labels"][number, place] = numbers[tag]
            elif all_subwords:
                inside = f"I-{tag[2:]}" if tag.startswith("B-") else tag
                batch["labels"][number, place] = numbers.get(inside, numbers[tag])
            before = word
    batch["words"] = [row["words"] for row in rows]
    return batch
