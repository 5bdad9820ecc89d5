"""Data for sentence embeddings: matching texts, or pairs with a similarity score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from datasets import Features, Value
from datasets import Sequence as ListOf
from torch import Tensor

from lightning_peft.data.batching import pad_inputs
from lightning_peft.data.encoding import IGNORED, TextSpan, token_spans
from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import Layout
from lightning_peft.data.text_pair_rows import TextPairData, TextPairRows


class EmbeddingRows(TextPairRows):
    """Tokens of each text of a row: the anchor, its positive and negatives, or two texts."""

    features = Features(
        {
            "texts": ListOf(ListOf(Value("int32"))),
            "digests": ListOf(Value("int64")),
            "score": Value("float64"),
            "length": Value("int32"),
            "full_length": Value("int32"),
            "tokens_cut": Value("int32"),
        }
    )
    counts = ("tokens", "truncated", "tokens_cut", "negatives", "repeated_texts", "contradictions")

    def __init__(self, prompts: tuple[str, str], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.prompts = prompts
        self._seen: set[int] = set()

    def encode(self, sample: Sample) -> list[dict[str, Any]]:
        self.check_texts(sample.text, sample.text_pair, *sample.negatives)
        assert sample.text is not None
        assert sample.text_pair is not None
        first, others = self.prompts
        texts = [(first, sample.text), (others, sample.text_pair)]
        texts += [(others, text) for text in sample.negatives]
        found = [(text, *self.tokens(prompt + text)) for prompt, text in texts]
        return [
            {
                "texts": [tokens["input_ids"] for _, tokens, _ in found],
                # What was cut to the same tokens is the same text.
                "digests": [
                    digest(json.dumps(tokens["input_ids"]) if cut else text.strip())
                    for text, tokens, cut in found
                ],
                "score": sample.score,
                "length": max(len(tokens["input_ids"]) for _, tokens, _ in found),
                "full_length": max(len(tokens["input_ids"]) + cut for _, tokens, cut in found),
                "tokens_cut": sum(cut for _, _, cut in found),
            }
        ]

    def count(self, row: dict[str, Any]) -> dict[str, int]:
        digests = row["digests"]
        repeated = sum(one in self._seen for one in digests)
        self._seen.update(digests)
        pair = hash(tuple(digests))
        return super().count(
            {
                **row,
                "tokens": sum(map(len, row["texts"])),
                "negatives": len(digests) - 2,
                "repeated_texts": repeated,
                "contradictions": self.count_score(pair, row["score"]),
            }
        )


def digest(text: str) -> int:
    """Returns a number of 64 bits, signed, that is the same for the same text only."""
    found = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(found, "big", signed=True)


class EmbeddingData(TextPairData):
    """Texts to train sentence embeddings on.

    Rows have an ``anchor`` and a ``positive`` that belongs to it, and may name texts that do not:
    ``negative``, ``negatives`` (a list), or ``negative_1`` to ``negative_10``. Or they have
    ``text_a``, ``text_b`` and a ``score``, a number that is greater for texts of like meaning.
    Every row is checked before training.

    A batch holds ``input_ids`` and ``attention_mask``, ``(texts, length)``, of all anchors, then
    all positives, then all negatives of the rows (or of all first, then all second texts); ``rows``
    and ``digests``, each ``(texts,)``: the row in the batch that a text is from, and a number that
    equal texts share; all int64. Pairs with scores have ``scores``, ``(rows,)``, float32.

    Args:
        data: File (JSONL, JSON, CSV, TSV, Parquet), folder of such, or dataset on the hub.
        tokenizer: Name on the hub, or folder.
        query_prompt: Text put before every anchor, such as ``"query: "``; by default what
            ``config_sentence_transformers.json`` next to the tokenizer names ``query``, if it is
            there. ``""`` is none. With scores, it is put before ``text_a``, and by default both
            texts get the file's default prompt.
        passage_prompt: The same for positives and negatives (``document`` or ``passage`` in the
            file), or ``text_b``.
        over_long: Texts longer than ``max_length`` are an error, or are cut (``"truncate"``).
            ``max_length`` is by default that of ``sentence_bert_config.json``, if it is there.
        **options: Keyword arguments of
            :class:`TokenizedData <lightning_peft.data.tokenized.TokenizedData>` and
            :class:`RowDataModule <lightning_peft.data.row_data_module.RowDataModule>`.

    Raises:
        ConfigError: If arguments contradict each other, or the data cannot be used.
    """

    batch_columns = ("texts", "digests", "score")

    def __init__(
        self,
        data: str,
        tokenizer: str,
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        over_long: Literal["error", "truncate"] = "error",
        **options: Any,
    ) -> None:
        super().__init__(data, tokenizer, over_long, **options)

    def prompts_of(self, scored: bool) -> tuple[str, str]:
        """Returns the prompt of the first text of a row, and that of the others."""
        folder, given = self.sentence_folder, self.hparams
        roles: Any = ("text", "text") if scored else ("query", "passage")
        first, others = (
            folder.prompt_of(role) if given[name] is None else given[name]
            for role, name in zip(roles, ("query_prompt", "passage_prompt"), strict=True)
        )
        return first, others

    def encoder_for(self, layout: Layout) -> RowEncoder:
        prompts = self.prompts_of(layout.shape.name == "scored_pair")
        truncate = self.hparams["over_long"] == "truncate"
        return EmbeddingRows(prompts, self.tokenizer, self.max_length, truncate)

    def encoding(self) -> dict[str, Any]:
        prompts = [self.prompts_of(scored) for scored in (False, True)]
        return {**super().encoding(), "prompts": prompts}

    @property
    def record(self) -> dict[str, Any]:
        """What was prepared, for the record of a run, with the prompts."""
        prompts = dict(zip(("query", "document"), self.prompts_of(self.scored), strict=True))
        for ours, theirs in (("query_prompt", "query"), ("passage_prompt", "document")):
            # Two texts with a score are neither, unless the user says so.
            if self.scored and self.hparams[ours] is None:
                del prompts[theirs]
        return {**super().record, "prompts": prompts}

    def lacking(self) -> str | None:
        """Returns why nothing can be learnt: an anchor that is compared with its positive alone."""
        counts = self.read().summary["splits"]["train"]
        if self.scored or self.batch_size > 1 or counts["negatives"]:
            return None
        return (
            "batch_size=1 leaves each anchor alone with its positive: the negatives are the other "
            "rows of a batch. Raise batch_size, or name negatives in the rows."
        )

    def render_row(self, row: dict[str, Any]) -> list[TextSpan]:
        names = ["text_a", "text_b"] if row["score"] is not None else ["anchor", "positive"]
        spans = []
        for place, ids in enumerate(row["texts"]):
            name = names[place] if place < 2 else "negative"
            text = token_spans(self.tokenizer, ids, [IGNORED] * len(ids))
            spans += [TextSpan(False, f"[{name}]\n", []), *text, TextSpan(False, "\n", [])]
        if row["score"] is not None:
            spans.append(TextSpan(True, f"{row['score']:g}", []))
        return spans

    def collator(self) -> Callable[[list[Any]], Any]:
        return partial(collate_rows, pad_token_id=self.pad_token_id)


def collate_rows(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Returns a batch of :class:`EmbeddingData`: anchors, then positives, then negatives."""
    places = [(number, place) for place in (0, 1) for number in range(len(rows))]
    places += [(n, place) for n, row in enumerate(rows) for place in range(2, len(row["texts"]))]
    texts = [{"input_ids": rows[number]["texts"][place]} for number, place in places]
    batch = {
        **pad_inputs(texts, pad_token_id),
        "rows": torch.tensor([number for number, _ in places]),
        "digests": torch.tensor([rows[number]["digests"][place] for number, place in places]),
    }
    if rows[0]["score"] is not None:
        batch["scores"] = torch.tensor([row["score"] for row in rows], dtype=torch.float32)
    return batch
