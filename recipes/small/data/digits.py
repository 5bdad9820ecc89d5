"""Writes digits.parquet again: scanned digits, as scikit-learn ships them.

    python digits.py    (needs scikit-learn, Pillow and pyarrow)

The images are the test part of "Optical Recognition of Handwritten Digits" by E. Alpaydin and
C. Kaynak (UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49), under the
Creative Commons Attribution 4.0 licence: 1,797 digits by 13 people, scanned and reduced to 8 x 8
pixels of 17 greys. What was changed: greys from 0 to 16 became 0 to 240, in PNG files.
"""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

GREY = 15
FILE = Path(__file__).with_suffix(".parquet")


def main() -> None:
    """Writes the file next to this one."""
    digits = load_digits()
    rows = []
    for pixels, label in zip(digits.images, digits.target, strict=True):
        content = io.BytesIO()
        Image.fromarray((pixels * GREY).astype("uint8")).save(content, "PNG", optimize=True)
        image = {"bytes": content.getvalue(), "path": None}
        rows.append({"image": image, "label": str(label)})
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.Table.from_pylist(rows, pa.schema({"image": image, "label": pa.string()}))
    pq.write_table(table, FILE, compression="zstd", compression_level=19)
    print(f"{FILE.name}: {len(rows):,} images, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
