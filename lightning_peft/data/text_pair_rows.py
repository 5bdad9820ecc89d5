"""Data of texts that are compared: what pairs for embeddings and for rerankers have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal

from lightning_peft.data.row_encoder import RowEncoder, SpecialTokens
from lightning_peft.data.samples import Sample
from lightning_peft.data.tokenized import TokenizedData
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import ConfigError
from lightning_peft.sentence_folder import SentenceFolder, read_sentence_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextPairRows(RowEncoder):
    """Encodes texts that are compared, and keeps the range of their scores."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, truncate: bool) -> None:
        self.tokenizer: Any = tokenizer
        self.max_length, self.truncate = max_length, truncate
        self.special_tokens = SpecialTokens(tokenizer)
        self.scores: tuple[float, float] | None = None
        self._score_of: dict[int, float] = {}

    def check_texts(self, sample: Sample) -> None:
        """Refuses texts with special tokens in them."""
        for text in (sample.text, sample.text_pair, *sample.negatives):
            self.special_tokens.check(text or "", "text")

    def tokens(self, *texts: str) -> tuple[Any, int]:
        """Returns the tokenizer's output for one text or two, and how many tokens were cut.

        Raises:
            EncodingProblem: If they make no token, or too many.
        """
        full = self.tokenizer(*texts, verbose=False)
        length = len(full["input_ids"])
        if length <= self.tokenizer.num_special_tokens_to_add(pair=len(texts) == 2):
            raise EncodingProblem("missing", "has a text of which the tokenizer makes no token")
        if length <= self.max_length:
            return full, 0
        if not self.truncate:
            problem = f"has {length:,} tokens, and {self.max_length:,} are allowed"
            raise EncodingProblem("long", problem)
        cut = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        return cut, length - len(cut["input_ids"])

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

    @abstractmethod
    def lacking(self) -> str | None:
        """Returns why nothing can be learnt from the rows, as a sentence; ``None`` if it can."""

    def setup(self, stage: str) -> None:
        """Opens the prepared rows, and checks that there is something to learn."""
        super().setup(stage)
        scores = self.score_range
        if scores is not None and scores[0] == scores[1]:
            raise ConfigError(
                f"Every score in {self.hparams['data']!r} is {scores[0]:g}: nothing says which "
                "texts belong together. Add rows with other scores, or say which column holds "
                'them, such as columns={"score": "my_column"}.'
            )
        problem = self.lacking()
        if problem is not None:
            raise ConfigError(problem)
