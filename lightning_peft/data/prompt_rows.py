"""Data for training on rewards: prompts, and the columns used by reward functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from datasets import Features, Value
from datasets import Sequence as ListOf

from lightning_peft.data.batching import pad_left
from lightning_peft.data.encoding import Encoder, TextSpan
from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import Layout
from lightning_peft.data.supervised import ConversationData, ConversationRows
from lightning_peft.data.templates import find_template
from lightning_peft.data.validation import EncodingProblem


class PromptRows(ConversationRows):
    """Tokens of a prompt, up to where the answer begins, and the row's further columns."""

    features = Features(
        {
            "input_ids": ListOf(Value("int32")),
            "length": Value("int32"),
            "prompt": Value("string"),
            "columns": Value("string"),
        }
    )
    counts = ("tokens",)

    def encode(self, sample: Sample) -> list[dict[str, Any]]:
        """Returns the row that ``sample`` becomes."""
        ids = self.encoder.prompt(sample.with_system(self.system_prompt))
        kept = sample.columns or {}
        try:
            text = json.dumps(kept, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise EncodingProblem("column", f"has a column that is not JSON: {error}") from error
        return [
            {
                "input_ids": ids,
                "length": len(ids),
                "prompt": json.dumps(sample.prompt, ensure_ascii=False),
                "columns": text,
            }
        ]


class PromptData(ConversationData):
    """Prompts for training on rewards, each with the columns that reward functions read.

    Rows hold ``prompt``, as text or turns, perhaps ``system`` and ``tools``, and any further
    columns, such as ``expected``. Every row is checked before training. Rows with problems are an
    error that lists all of them, unless ``skip_bad_rows`` is given.

    A batch holds ``input_ids`` and ``attention_mask``, each ``(rows, length)``, int64, padded on
    the left, and ``rows``: for each its ``prompt``, its ``columns``, and its number, ``row``.

    Args:
        data: File (JSONL, JSON, CSV, TSV, Parquet), folder of such, or dataset on the hub.
        tokenizer: Name on the hub, or folder.
        chat_template: ``"chatml"``, ``"plain"``, ``"raw"`` or Jinja source; by default the
            tokenizer's own.
        system_prompt: System turn of prompts that have none.
        chat_template_kwargs: Values for variables of the chat template, such as
            ``{"enable_thinking": False}``; a row's own come first.
        **options: Keyword arguments of
            :class:`TokenizedData <lightning_peft.data.tokenized.TokenizedData>` and
            :class:`RowDataModule <lightning_peft.data.row_data_module.RowDataModule>`;
            ``max_length`` is that of prompts, and ``batch_size`` counts them.

    Raises:
        ConfigError: If arguments contradict each other, or the data cannot be used.
    """

    accepts = ("prompt",)
    # Also where further columns make the rows look like pairs.
    default_shape = "prompt"
    batch_columns = ("input_ids", "prompt", "columns", "row")
    encoding_arguments = ("chat_template", "system_prompt", "chat_template_kwargs")

    def __init__(
        self,
        data: str,
        tokenizer: str,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(data, tokenizer, **options)

    def _argument_problems(self) -> list[str]:
        problems = super()._argument_problems()
        if self.hparams["over_long"] != "error":
            problems.append(
                f"over_long={self.hparams['over_long']!r} would cut the end of a prompt, where "
                "its question is; leave it out, or raise max_length"
            )
        return problems

    def encoder_for(self, layout: Layout) -> RowEncoder:
        hparams = self.hparams
        template = find_template(self.tokenizer, hparams["chat_template"])
        variables = hparams["chat_template_kwargs"]
        encoder = Encoder(
            self.tokenizer, template, self.max_length, "completion", "error", variables=variables
        )
        return PromptRows(encoder, hparams["system_prompt"])

    def render_row(self, row: dict[str, Any]) -> list[TextSpan]:
        text = str(self.tokenizer.decode(row["input_ids"]))
        return [TextSpan(False, text, []), TextSpan(False, f"\n{row['columns']}", [])]

    def judged_rows(self) -> Iterator[dict[str, Any]]:
        """Yields ``row`` and ``columns`` of every row, of all splits."""
        for split in self.read().splits.values():
            both = (split.data.column(name).to_pylist() for name in ("row", "columns"))
            for number, columns in zip(*both, strict=True):
                yield {"row": number, "columns": json.loads(columns)}

    def collator(self) -> Callable[[list[Any]], Any]:
        return partial(collate, pad_token_id=self.pad_token_id)


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Returns a batch of prompts, padded on the left, as of :class:`PromptData`."""
    return {
        **pad_left([row["input_ids"] for row in rows], pad_token_id),
        "rows": [
            {name: json.loads(row[name]) for name in ("prompt", "columns")} | {"row": row["row"]}
            for row in rows
        ],
    }
