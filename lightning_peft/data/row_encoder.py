"""Base class of row encoders, the task-specific part of data preparation."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_peft.data.samples import Sample
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    # Processes that encode import this module, and need not wait for that one.
    from datasets import Features
    from transformers import PreTrainedTokenizerBase

# The label of a token that is not trained.
IGNORED = -100


class RowEncoder(ABC):
    """Encodes the content of rows as stored and trained; one serves one pass over the data.

    Attributes:
        features: Columns of a prepared row. A column ``length`` (int32) is needed for grouping and
            packing by length, and for the histogram of ``preview``. A column ``full_length`` is
            what ``length`` would be without a cut, where that is not its sum with ``tokens_cut``.
        counts: Names of the numbers that :meth:`count` returns.
        writer_batch_size: Prepared rows in memory before they are written: few, where each holds a
            file. ``None`` is the default of ``datasets``.
        parallelizable: Whether rows may be encoded in several processes, with copies of this
            object: only where ``encode`` does not change it.
        resumable: Whether an interrupted preparation continues behind the rows that were written:
            only where ``encode`` and ``count`` depend on nothing but their row.
        end: Id of the end-of-sequence token; ``None`` where labels have none.
        variables: Names that the chat template reads next to the turns; ``None`` without one.
    """

    features: ClassVar[Features]
    counts: ClassVar[tuple[str, ...]] = ()
    writer_batch_size: ClassVar[int | None] = None
    parallelizable: ClassVar[bool] = False
    resumable: ClassVar[bool] = False
    end: int | None = None
    variables: frozenset[str] | None = None

    @abstractmethod
    def encode(self, sample: Sample) -> list[dict[str, Any]]:
        """Returns the prepared rows of ``sample``, usually one, or raises ``EncodingProblem``."""

    def unused(self, sample: Sample) -> Sequence[str]:
        """Returns the keys in turns of ``sample`` that change nothing of what is encoded."""
        return ()

    def count(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the counts of a prepared row, by default from its columns."""
        tokens_cut, labels = row.get("tokens_cut", 0), row.get("labels", ())
        known = {
            "tokens": row.get("length"),
            "truncated": tokens_cut > 0,
            "tokens_cut": tokens_cut,
            "trained_tokens": sum(label != IGNORED for label in labels),
            "ends_trained": self.end in labels,
            "ends_added": row.get("end_added"),
            **row,
        }
        return {name: int(known[name]) for name in self.counts if name in known}

    def summary(self) -> dict[str, Any]:
        """Returns facts of the whole pass, such as the names of all labels; ready for JSON."""
        return {}


class SpecialTokens:
    """A tokenizer's special tokens: a model would read a row with one as several, or as ended."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, more: Sequence[str] = ()) -> None:
        known = {*tokenizer.all_special_tokens, *more}
        tokens = sorted(filter(None, known), key=lambda token: (-len(token), token))
        self._pattern = re.compile("|".join(map(re.escape, tokens))) if tokens else None

    def check(self, text: str, name: str) -> None:
        """Refuses a text with a special token; ``name`` is what the row calls it."""
        found = self._pattern.search(text) if self._pattern is not None else None
        if found:
            problem = f"has the special token {found[0]!r} inside its {name}"
            raise EncodingProblem("control", problem)


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id of the end-of-sequence token, or refuses a tokenizer without one."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"The tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so a model "
            "cannot learn to stop. Set tokenizer.eos_token to the token that ends an answer, and "
            "save it."
        )
    return int(tokenizer.eos_token_id)


class TokenizedRows(RowEncoder):
    """Encodes texts by a tokenizer alone, and cuts longer ones or refuses them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, truncate: bool) -> None:
        self.tokenizer: Any = tokenizer
        self.max_length, self.truncate = max_length, truncate
        self.special_tokens = SpecialTokens(tokenizer)

    def check_texts(self, *texts: str | None) -> None:
        """Refuses texts with special tokens in them."""
        for text in texts:
            self.special_tokens.check(text or "", "text")

    def tokens(self, *texts: str) -> tuple[Any, int]:
        """Returns the tokenizer's output for one text or two, and how many tokens were cut."""
        full = self.tokenizer(*texts, verbose=False)
        length = len(full["input_ids"])
        if length <= self.tokenizer.num_special_tokens_to_add(pair=len(texts) == 2):
            raise EncodingProblem("missing", "has a text of which the tokenizer makes no token")
        if length <= self.max_length:
            return full, 0
        if not self.truncate:
            raise self.too_long(length)
        # Of a pair, the longer text is cut first.
        cut = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        return cut, length - len(cut["input_ids"])

    def too_long(self, length: int) -> EncodingProblem:
        """Returns the problem of a row of ``length`` tokens."""
        return EncodingProblem(
            "long", f"has {length:,} tokens, and {self.max_length:,} are allowed"
        )
