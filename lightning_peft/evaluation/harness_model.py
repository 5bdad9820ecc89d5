"""Adapter of a loaded model to the harness interface."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lm_eval.models.huggingface import HFLM

# What is done, and how much of it of how much.
Progress = Callable[[str, int, int], None]


class HarnessModel(HFLM):
    """Transformers model that reports its progress."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | str) -> None:
        """Takes a model in eval mode, on its device; ``batch_size`` may be ``"auto"``."""
        with _as_it_is(model):
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._progress: Progress = lambda what, done, total: None
        self._what, self._done, self._total = "", 0, 0
        self.set_cache_hook(self)

    def report_to(self, progress: Progress, what: str) -> None:
        """Calls ``progress`` from now on, with ``what`` before the kind of requests."""
        self._progress, self._what = progress, what

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Is called by the harness for each answered request, as that of a cache."""
        self._done += 1
        self._progress(f"{self._what}: {attr}", self._done, self._total)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        """Returns for each request the log-likelihood of its text, and whether it is greedy."""
        self._done, self._total = 0, len(requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        """Returns for each request the log-likelihood of its whole text."""
        self._done, self._total = 0, len(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        """Returns for each request the generated text."""
        self._done, self._total = 0, len(requests)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)


@contextmanager
def _as_it_is(model: Any) -> Iterator[None]:
    """The harness ties weights once more, which would undo a head in ``modules_to_save``.

    It also warns that a model was given instead of a name, which is meant.
    """
    log = logging.getLogger("lm_eval.models.huggingface")
    before = log.level
    log.setLevel(logging.ERROR)
    model.tie_weights = lambda *args, **options: None
    try:
        yield
    finally:
        del model.tie_weights
        log.setLevel(before)
