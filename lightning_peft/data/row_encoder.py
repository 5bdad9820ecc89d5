"""What each kind of data does with a row: the one part of preparation that differs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_peft.data.samples import Sample

if TYPE_CHECKING:
    # Processes that encode import this module, and need not wait for that one.
    from datasets import Features


class RowEncoder(ABC):
    """Makes what is stored and trained on of what a row says; one serves one pass over the data.

    Attributes:
        features: Columns of a prepared row. A column ``length`` (int32) is needed for grouping and
            packing by length, and for the histogram of ``preview``.
        counts: Names of the numbers that :meth:`count` returns.
        writer_batch_size: Prepared rows in memory before they are written: few, where each holds a
            file. ``None`` is the default of ``datasets``.
        parallelizable: Whether rows may be encoded in several processes, with copies of this
            object: only where ``encode`` does not change it.
        variables: Names that the chat template reads next to the turns; ``None`` without one.
    """

    features: ClassVar[Features]
    counts: ClassVar[tuple[str, ...]] = ()
    writer_batch_size: ClassVar[int | None] = None
    parallelizable: ClassVar[bool] = False
    variables: frozenset[str] | None = None

    @abstractmethod
    def encode(self, sample: Sample) -> list[dict[str, Any]]:
        """Returns the prepared rows that ``sample`` becomes: usually one.

        Raises:
            EncodingProblem: If it cannot be trained on as it is.
        """

    def unused(self, sample: Sample) -> Sequence[str]:
        """Returns the keys in turns of ``sample`` that change nothing of what is encoded.

        Raises:
            EncodingProblem: If one of them would change what is learnt.
        """
        return ()

    def count(self, row: dict[str, Any]) -> dict[str, int]:
        """Returns what a prepared row adds to the counts of its split."""
        return {}

    def summary(self) -> dict[str, Any]:
        """Returns what is known after the pass, such as the names of all labels; ready for JSON."""
        return {}
