"""End-of-answer tokens."""

from __future__ import annotations

from typing import Any


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Returns the ids of the tokens that end an answer, the tokenizer's last; empty if none does.

    A base may end turns with another token than texts, and lists both in its generation config.
    """
    listed = model.generation_config.eos_token_id
    ends = listed if isinstance(listed, list) else [listed]
    return list(dict.fromkeys(end for end in [*ends, tokenizer.eos_token_id] if end is not None))
