"""How a prepared row is shown to a person: what of it is trained, and what is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lightning_peft.data.encoding import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextSpan:
    """A piece of a row, trained or not; ``tokens`` are in the tokenizer's own spelling, if any."""

    trained: bool
    text: str
    tokens: list[str]


def token_spans(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]
) -> list[TextSpan]:
    """Returns a row of tokens in runs of those with a label and those without."""
    reads: Any = tokenizer
    spans = []
    pairs = zip(ids, labels, strict=True)
    for trained, group in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        tokens = [token for token, _ in group]
        text = reads.decode(tokens, clean_up_tokenization_spaces=False)
        spans.append(TextSpan(trained, text, reads.convert_ids_to_tokens(tokens)))
    return spans
