"""An encoder that other processes can import at once."""

from __future__ import annotations

from typing import Any

from lightning_peft.data.row_encoder import RowEncoder


class Doubled(RowEncoder):
    """Takes numbers for samples."""

    parallelizable = True

    def encode(self, sample: Any) -> list[dict[str, Any]]:
        """Returns twice the number."""
        return [{"number": 2 * sample}]
