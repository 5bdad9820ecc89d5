"""Small made-up data sets: `loader(kind, seed)` draws the same rows each time."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

ROWS, BATCH = 64, 8


def loader(kind: str, seed: int = 0) -> DataLoader[Any]:
    """Returns the rows of one kind; validation takes another seed than training."""
    draw = torch.Generator().manual_seed(seed)
    rows = [_ROW[kind](draw) for _ in range(ROWS)]
    return DataLoader(rows, batch_size=BATCH)  # type: ignore[arg-type]


def _molecule(draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Atoms `(6, 8)`, and a text of tokens `(5,)` that their sum decides."""
    atoms = torch.randn(6, 8, generator=draw) * 2 + 1
    first = int(atoms.sum() > 48)
    return atoms, torch.tensor([1, 4 + first, 6 + first, 8 + first, 2])


def _protein(draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Amino acids `(10,)` in pairs of equals, some of them hidden as 3; labels where they are."""
    acids = torch.randint(4, 12, (5,), generator=draw).repeat_interleave(2)
    hidden = torch.zeros(10, dtype=torch.bool)
    hidden[torch.randint(0, 10, (2,), generator=draw)] = True
    return acids.masked_fill(hidden, 3), acids.masked_fill(~hidden, -100)


def _cell(draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Genes `(6, 16)` and one of two types of cell."""
    genes, kind = torch.randn(6, 16, generator=draw), torch.randint(0, 2, (), generator=draw)
    genes[:, 0] += kind
    return genes, kind


def _image(draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Four bands `(4, 8, 8)`, and which of the first two is bright."""
    bands, bright = torch.randn(4, 8, 8, generator=draw), torch.randint(0, 2, (), generator=draw)
    bands[bright] += 0.5
    return bands, bright


def _pair(draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A query `(4,)` and the document `(6,)` that has its words."""
    query = torch.randint(1, 40, (4,), generator=draw)
    return query, torch.cat([query.flip(0), torch.randint(1, 40, (2,), generator=draw)])


def _speech(draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A spectrum `(16, 64)` and a transcript `(5,)` of the band that is loud in it."""
    band = int(torch.randint(0, 4, (1,), generator=draw))
    spectrum = torch.randn(16, 64, generator=draw)
    spectrum[4 * band : 4 * band + 4] += 2
    return spectrum, torch.tensor([1, 5 + band, 10 + band, 15 + band, 2])


_ROW = {
    "multimodal": _molecule,
    "protein": _protein,
    "encoder": _cell,
    "remote_sensing": _image,
    "retrieval": _pair,
    "speech": _speech,
}
