"""Writes shapes.parquet again: drawings of coloured shapes, each with a question and its answer.

    python shapes.py    (needs Pillow and pyarrow)

Drawn for this package, with the same random numbers each time: a circle, square or triangle in one
of four colours, somewhere on white paper, 24 x 24 pixels. The answer names colour and shape.
"""

from __future__ import annotations

import io
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

SIZE, ROWS = 24, 480
COLOURS = {"red": "#d62828", "green": "#2a9d3f", "blue": "#2455d6", "yellow": "#f2c21b"}
SHAPES = ("circle", "square", "triangle")
QUESTION = "What is in this picture?"
FILE = Path(__file__).with_suffix(".parquet")


def drawn(shape: str, colour: str, left: int, top: int, width: int) -> bytes:
    """Returns a PNG file of one shape."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    pen, right, bottom = ImageDraw.Draw(image), left + width, top + width
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), fill=colour)
    else:
        pen.polygon([(left, bottom), (right, bottom), (left + width // 2, top)], fill=colour)
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return content.getvalue()


def rows() -> list[dict[str, object]]:
    """Returns the rows, no two of them with the same picture."""
    numbers = random.Random(0)
    seen: set[bytes] = set()
    found: list[dict[str, object]] = []
    while len(found) < ROWS:
        shape, name = numbers.choice(SHAPES), numbers.choice(list(COLOURS))
        width = numbers.randint(9, 18)
        left, top = (numbers.randint(1, SIZE - 2 - width) for _ in range(2))
        content = drawn(shape, COLOURS[name], left, top, width)
        if content not in seen:
            seen.add(content)
            image = {"bytes": content, "path": None}
            answer = f"A {name} {shape}."
            found.append({"image": image, "prompt": QUESTION, "completion": answer})
    return found


def main() -> None:
    """Writes the file next to this one."""
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    texts = {"prompt": pa.string(), "completion": pa.string()}
    table = pa.Table.from_pylist(rows(), pa.schema({"image": image, **texts}))
    pq.write_table(table, FILE, compression="zstd", compression_level=19)
    print(f"{FILE.name}: {table.num_rows:,} images, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
