"""Images as files hold them: opened and decoded for real, and made RGB."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# What becomes of images that are not RGB. Transparency counts as a mode of its own.
CONVERSIONS = {
    "frames": "only the first of several frames is used",
    "transparent": "transparent parts become white",
    "16 bit": "the 16 bits of a pixel become 8",
    "CMYK": "inks become red, green and blue, without a colour profile",
}


class ImageProblem(Exception):
    """Content that is not an image, or whose colours are not known."""


def require_pillow() -> None:
    """Raises a :class:`ConfigError` if Pillow is not installed."""
    if find_spec("PIL") is None:
        raise ConfigError("Images are read by Pillow, which is not installed: pip install pillow")


def decode_image(content: bytes) -> Image:
    """Returns the image in the bytes of a file, with every pixel read.

    Raises:
        ImageProblem: If it is not an image, is damaged, or so large that it may be an attack.
    """
    pillow: Any = import_module("PIL.Image")
    try:
        image: Image = pillow.open(BytesIO(content))
        # open() reads the header alone, and verify() passes a JPEG that ends too soon.
        image.load()
    except import_module("PIL").UnidentifiedImageError:
        raise ImageProblem("is not an image that Pillow reads") from None
    # Decoders of broken files raise almost anything.
    except Exception as error:
        raise ImageProblem(f"cannot be read as an image: {error}") from error
    return image


def conversion_of(image: Image) -> str | None:
    """Returns the lossy step when ``image`` becomes RGB; ``None`` where it is RGB.

    A key of :data:`CONVERSIONS`, or the mode of an image that loses nothing.
    """
    if image.mode in ("I", "F"):
        raise ImageProblem(
            f"has pixels of mode {image.mode!r}, and nothing says which values are black and white"
        )
    if getattr(image, "n_frames", 1) > 1:
        return "frames"
    if image.mode.startswith("I;16"):
        return "16 bit"
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        return "transparent"
    return None if image.mode == "RGB" else image.mode


def as_rgb(image: Image) -> Image:
    """Returns ``image`` upright and as RGB, with white where it is transparent."""
    pillow: Any = import_module("PIL.Image")
    upright: Image = import_module("PIL.ImageOps").exif_transpose(image)
    if upright.mode.startswith("I;16"):
        # 257 takes 65535 to 255.
        upright = pillow.fromarray((np.asarray(upright).astype(np.uint32) // 257).astype(np.uint8))
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        upright = pillow.alpha_composite(pillow.new("RGBA", rgba.size, "white"), rgba)
    return upright.convert("RGB")
