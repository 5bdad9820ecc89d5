"""An answer while it is generated: its text in pieces, and what ends it early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, TextStreamer

# Tokens of a character in the worst case, those of bytes.
_TOKENS_OF_CHARACTER = 4


class AnswerStreamer(TextStreamer):
    """Hands finished pieces of text to a function, up to the first stop text.

    Attributes:
        text: The answer so far.
    """

    def __init__(
        self, tokenizer: Any, write: Callable[[str], None], stop: Sequence[str] = ()
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.text = write, ""
        self._stop, self._written, self._ended = stop, 0, False
        # The beginning of a stop text may be the end of what there is.
        self._held = max(map(len, stop), default=1) - 1

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Takes one piece."""
        if self._ended:
            return
        self.text += text
        places = [place for one in self._stop if (place := self.text.find(one)) >= 0]
        self._ended = stream_end or bool(places)
        self.text = self.text[: min(places, default=None)]
        known = len(self.text) - (0 if self._ended else self._held)
        if known > self._written:
            self.write(self.text[self._written : known])
            self._written = known


class StopRequested(StoppingCriteria):
    """Ends a generation when a function says so."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self.stop = stop

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Says for each row, ``(rows,)``, whether it ends."""
        return torch.full((input_ids.shape[0],), self.stop(), device=input_ids.device)


class StopTexts(StoppingCriteria):
    """Ends the generation of one answer at a text, which may be that of a special token.

    Attributes:
        found: Whether one was generated.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.stop, self.prompt_length = tokenizer, stop, prompt_length
        self.found = False
        self._tokens = _TOKENS_OF_CHARACTER * (max(map(len, stop), default=0) + 1)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Says for the row, ``(1,)``, whether it ends."""
        new = input_ids[0, self.prompt_length :][-self._tokens :].tolist()
        text = self.tokenizer.decode(new, skip_special_tokens=False) if self.stop else ""
        self.found = any(one in text for one in self.stop)
        return torch.full((1,), self.found, device=input_ids.device)
