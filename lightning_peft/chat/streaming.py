"""Streaming of generated text, and early stopping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, TextStreamer

# Tokens of a character in the worst case, those of bytes.
_TOKENS_OF_CHARACTER = 4


class StopRequested(StoppingCriteria):
    """Ends a generation when a function says so."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self.stop = stop

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Returns for each row, ``(rows,)``, whether it ends."""
        return torch.full((input_ids.shape[0],), self.stop(), device=input_ids.device)


class StopTexts(StoppingCriteria):
    """Ends the generation of one answer at a text, which may have special tokens in it."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.stop, self.prompt_length = tokenizer, stop, prompt_length
        self.found, self.longest = False, max(map(len, stop), default=0)
        # Characters of the answer, without special tokens, from the text on that was found.
        self.tail = 0
        self._tokens = _TOKENS_OF_CHARACTER * (self.longest + 1)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Returns for the row, ``(1,)``, whether it ends."""
        if self.stop and not self.found:
            self._search(input_ids[0, self.prompt_length :][-self._tokens :].tolist())
        return torch.full((1,), self.found, device=input_ids.device)

    def _search(self, new: list[int]) -> None:
        text = self.tokenizer.decode(new, skip_special_tokens=False)
        places = [place for one in self.stop if (place := text.find(one)) >= 0]
        if not places:
            return
        before, whole = text[: min(places)], len(new)
        while not before.startswith(self.tokenizer.decode(new[:whole], skip_special_tokens=False)):
            whole -= 1
        # The text may begin within a token.
        known = self.tokenizer.decode(new[:whole], skip_special_tokens=False)
        part = 0 if new[whole] in self.tokenizer.all_special_ids else len(before) - len(known)
        plain, kept = (
            len(self.tokenizer.decode(tokens, skip_special_tokens=True))
            for tokens in (new, new[:whole])
        )
        self.found, self.tail = True, plain - kept - part


class AnswerStreamer(TextStreamer):
    """Hands finished pieces of text to a function, up to a stop text."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None], stop: StopTexts) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.text = write, ""
        self._stop, self._written = stop, 0
        self._last: Any = None
        self._ending = False
        # What was written may not be the beginning of a stop text.
        self._held = max(stop.longest - 1, 0)

    def put(self, value: Any) -> None:
        """Takes the prompt or a token, which is written when the next one comes."""
        if not self._stop.stop:
            super().put(value)
            return
        if self._last is not None:
            super().put(self._last)
        self._last = value

    def end(self) -> None:
        """Writes what is left, up to the stop text."""
        # Nothing of the last token is written before the cut.
        self._ending = True
        if self._last is not None:
            super().put(self._last)
        super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Takes one piece."""
        self.text += text
        if stream_end and self._stop.found:
            self.text = self.text[: len(self.text) - self._stop.tail]
        elif self._ending and self._stop.found:
            return
        known = len(self.text) - (0 if stream_end else self._held)
        if known > self._written:
            self.write(self.text[self._written : known])
            self._written = known
