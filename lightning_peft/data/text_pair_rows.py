"""Base classes of text-pair data, for embeddings and rerankers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lightning_peft.data.row_encoder import TokenizedRows
from lightning_peft.data.tokenized import TokenizedData
from lightning_peft.errors import ConfigError
from lightning_peft.sentence_folder import SentenceFolder, read_sentence_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextPairRows(TokenizedRows):
    """Encodes texts that are compared, and keeps the range of their scores."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, truncate: bool) -> None:
        super().__init__(tokenizer, max_length, truncate)
        self.scores: tuple[float, float] | None = None
        self._score_of: dict[int, float] = {}

    def count_score(self, pair: int, score: float | None) -> int:
        """Notes the score of a pair; returns 1 if an earlier row has another one for it."""
        if score is None:
            return 0
        low, high = self.scores or (score, score)
        self.scores = (min(low, score), max(high, score))
        return int(self._score_of.setdefault(pair, score) != score)

    def summary(self) -> dict[str, Any]:
        return {"scores": self.scores}


class TextPairData(TokenizedData):
    """Pairs of texts, or texts with others that do and do not belong to them."""

    accepts = ("scored_pair", "anchor_positive")

    def __init__(
        self,
        data: str,
        tokenizer: str,
        over_long: Literal["error", "truncate"] = "error",
        **options: Any,
    ) -> None:
        self._folder: SentenceFolder | None = None
        super().__init__(data, tokenizer, over_long=over_long, **options)

    @property
    def sentence_folder(self) -> SentenceFolder:
        """What the files of the tokenizer's model say, where it is one for sentences."""
        if self._folder is None:
            hparams = self.hparams
            self._folder = read_sentence_folder(hparams["tokenizer"], hparams["tokenizer_revision"])
        return self._folder

    @property
    def max_length(self) -> int:
        """Longest text in tokens: as asked for, or that of the model's files."""
        longest = super().max_length
        given = self.sentence_folder.max_length
        return longest if self.hparams["max_length"] or not given else min(longest, given)

    @property
    def scored(self) -> bool:
        """Whether rows are pairs with a score."""
        return bool(self.read().summary["shape"] == "scored_pair")

    @property
    def score_range(self) -> tuple[float, float] | None:
        """The least and the greatest score; ``None`` where there are none."""
        found = self.read().summary["scores"]
        return found and tuple(found)

    @property
    def record(self) -> dict[str, Any]:
        """What was prepared, for the record of a run, with the longest text that it allowed."""
        return {**super().record, "max_length": self.max_length}

    def lacking(self) -> str | None:
        """Returns why nothing can be learnt from the rows, as a sentence; ``None`` if it can."""
        return None

    def setup(self, stage: str) -> None:
        """Opens the prepared rows, and checks that there is something to learn."""
        super().setup(stage)
        scores = self.score_range
        if scores is not None and scores[0] == scores[1]:
            raise ConfigError(
                f"Every score in {self.hparams['data']!r} is {scores[0]:g}: nothing shows which "
                "texts belong together. Add rows with other scores, or say which column holds "
                'them, such as columns={"score": "my_column"}.'
            )
        problem = self.lacking()
        if problem is not None:
            raise ConfigError(problem)
