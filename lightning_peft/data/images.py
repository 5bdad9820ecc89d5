"""Data for image classification."""

from __future__ import annotations

import base64
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from datasets import Features, Value
from torch import Tensor
from transformers import AutoImageProcessor

from lightning_peft.data.encoding import TextSpan
from lightning_peft.data.labels import LabelNames, label_problems
from lightning_peft.data.media_source import ImageSource
from lightning_peft.data.row_data_module import RowDataModule
from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import Layout
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers.image_processing_utils import BaseImageProcessor


log = logging.getLogger(__name__)


# What becomes of images that are not RGB. Transparency counts as a mode of its own.
CONVERSIONS = {
    "frames": "only the first of several frames is used",
    "transparent": "transparent parts become white",
    "16 bit": "the 16 bits of a pixel become 8",
    "CMYK": "inks become red, green and blue, without a colour profile",
}


# Pixels of the longer side of a small copy.
THUMBNAIL = 160


class ImageRows(RowEncoder):
    """The bytes of an image, which was decoded once as a check, and its class."""

    features = Features(
        {"image": Value("binary"), "label": Value("string"), "conversion": Value("string")}
    )
    counts = ("converted",)
    writer_batch_size: ClassVar[int | None] = 32

    def __init__(self, labels: LabelNames) -> None:
        self.labels = labels
        self.conversions: Counter[str] = Counter()
        self.label_of: dict[bytes, str] = {}

    def encode(self, sample: Sample) -> list[dict[str, Any]]:
        content = sample.image
        assert content is not None
        assert sample.label is not None
        conversion = conversion_of(decode_image(content))
        label = self.labels.find(sample.label)
        before = self.label_of.setdefault(sample.digest(), label)
        if before != label:
            raise EncodingProblem(
                "two_labels", f"has the label {label!r}, and another row with this image {before!r}"
            )
        return [{"image": content, "label": label, "conversion": conversion}]

    def count(self, row: dict[str, Any]) -> dict[str, int]:
        self.labels.add([row["label"]])
        if row["conversion"] is not None:
            self.conversions[row["conversion"]] += 1
        return {"converted": int(row["conversion"] is not None)}

    def summary(self) -> dict[str, Any]:
        return {"labels": self.labels.names(), "conversions": dict(self.conversions)}


class ImageBatch:
    """Collates rows: decodes and processes their images; ``labels`` is in model order."""

    def __init__(self, processor: BaseImageProcessor, labels: Sequence[str]) -> None:
        self.processor = processor
        self.places = {label: place for place, label in enumerate(labels)}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns a batch of the ``image`` and ``label`` of rows.

        Returns:
            ``pixel_values``, ``(batch, 3, height, width)``, float32, and ``labels``, ``(batch,)``,
            int64.
        """
        images = [as_rgb(decode_image(row["image"])) for row in rows]
        pixels: Tensor = self.processor(images, return_tensors="pt")["pixel_values"]
        labels = torch.tensor([self.places[row["label"]] for row in rows])
        return {"pixel_values": pixels, "labels": labels}


class ImageData(RowDataModule):
    """Images to fine-tune a classifier on.

    Every image is opened and decoded before training. Rows with problems are an error that lists
    all of them, unless ``skip_bad_rows`` is given. The cache holds a copy of every image.

    Args:
        data: Folder with a folder of images for each class (also below ``train``, ``validation``
            and ``test``); file, or folder of files (JSONL, JSON, CSV, TSV, Parquet), with columns
            ``image`` and ``label``, where an image is a path seen from the file, or its bytes; or
            dataset on the hub.
        processor: Name on the hub, or folder, of an image processor; or its settings, with their
            ``image_processor_type``.
        labels: Names of all classes, in the order of the model's outputs; by default those that
            occur, sorted, with numbers by their value.
        processor_revision: Branch, tag or commit of the processor on the hub.
        **options: Keyword arguments of
            :class:`RowDataModule <lightning_peft.data.row_data_module.RowDataModule>`.

    Raises:
        ConfigError: If arguments contradict each other, the data cannot be used, or Pillow is not
            installed.
    """

    decodes = True
    accepts = ("image_label",)
    default_shape = "image_label"
    batch_columns = ("image", "label")
    source_class = ImageSource

    def __init__(
        self,
        data: str,
        processor: str | dict[str, Any],
        labels: list[str] | None = None,
        processor_revision: str | None = None,
        **options: Any,
    ) -> None:
        require_pillow()
        self._processor: BaseImageProcessor | None = None
        super().__init__(data, **options)

    def _argument_problems(self) -> list[str]:
        problems = super()._argument_problems()
        problems += label_problems(self.hparams["labels"])
        processor = self.hparams["processor"]
        if isinstance(processor, dict) and "image_processor_type" not in processor:
            problems.append(
                f"processor={processor!r} has no image_processor_type, such as 'ViTImageProcessor'"
            )
        return problems

    @property
    def image_processor(self) -> BaseImageProcessor:
        """The processor, loaded on first use."""
        if self._processor is None:
            requested, revision = self.hparams["processor"], self.hparams["processor_revision"]
            try:
                self._processor = load_image_processor(requested, revision)
            except (OSError, ValueError, TypeError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise ConfigError(
                    f"processor={requested!r} is not a folder with an image processor, a name that "
                    f"the hub has one for, or the settings of one ({reason}). Check the name, the "
                    "settings, and the network (HF_HUB_OFFLINE must not be set)."
                ) from error
        return self._processor

    @property
    def labels(self) -> list[str]:
        """The names of all classes, in the order of the model's outputs."""
        found: list[str] = self.read().summary["labels"]
        return found

    def encoder_for(self, layout: Layout) -> RowEncoder:
        return ImageRows(LabelNames(self.hparams["labels"]))

    def encoding(self) -> dict[str, Any]:
        """Returns the labels: all else is done to the images when they are loaded."""
        return {"labels": self.hparams["labels"]}

    def collator(self) -> Callable[[list[Any]], Any]:
        return ImageBatch(self.image_processor, self.labels)

    def render_row(self, row: dict[str, Any]) -> list[TextSpan]:
        image = decode_image(row["image"])
        size = f"image of {image.width} x {image.height}, {len(row['image']):,} bytes\n"
        return [
            TextSpan(False, size, [], thumbnail(as_rgb(image))),
            TextSpan(True, row["label"], []),
        ]

    def prepare_data(self) -> None:
        """Reads and checks all images, in one process, and logs conversions to RGB."""
        log_conversions(self.read().summary["conversions"])

    def setup(self, stage: str) -> None:
        """Opens the prepared rows, and checks that there are classes to learn."""
        super().setup(stage)
        train = self.read().splits["train"]
        if len(self.labels) < 2:
            raise ConfigError(
                f"All images have the label {self.labels[0]!r}: there is nothing to tell apart. "
                "Add another class."
            )
        untaught = sorted(set(self.labels) - set(train.unique("label")))
        if untaught:
            raise ConfigError(
                f"No training row has the label {', '.join(untaught)}, so the model would be "
                "tested on what it was never shown. Add training rows, take the class out of "
                "labels=, or share the rows out by another split_seed."
            )


def load_image_processor(
    requested: str | dict[str, Any], revision: str | None = None
) -> BaseImageProcessor:
    """Returns the image processor of a name or folder, or of settings with their type."""
    if isinstance(requested, str):
        found: BaseImageProcessor = AutoImageProcessor.from_pretrained(
            requested, revision=revision, trust_remote_code=False
        )
        return found
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(
            json.dumps(requested), encoding="utf-8"
        )
        return load_image_processor(folder)


def log_conversions(counts: dict[str, int]) -> None:
    """Logs how many images become RGB, as a warning where that loses something."""
    for kind, count in counts.items():
        details = CONVERSIONS.get(kind)
        level = logging.INFO if details is None else logging.WARNING
        log.log(
            level, f"{count:,} images ({kind}) become RGB" + (f": {details}" if details else "")
        )


def thumbnail(image: Image) -> str:
    """Returns a small copy of an image as a ``data:`` URL, at most 160 pixels wide and high."""
    small, content = image.copy(), BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def require_pillow() -> None:
    """Raises a :class:`ConfigError` if Pillow is not installed."""
    if find_spec("PIL") is None:
        raise ConfigError("Images are read by Pillow, which is not installed: pip install pillow")


def decode_image(content: bytes) -> Image:
    """Returns the image in a file's bytes; refuses what is damaged, or as large as an attack."""
    pillow: Any = import_module("PIL.Image")
    try:
        image: Image = pillow.open(BytesIO(content))
        # open() reads the header alone, and verify() passes a JPEG that ends too soon.
        image.load()
    except import_module("PIL").UnidentifiedImageError:
        raise EncodingProblem("image", "is not an image that Pillow reads") from None
    # Decoders of broken files raise almost anything.
    except Exception as error:
        raise EncodingProblem("image", f"cannot be read as an image: {error}") from error
    return image


def conversion_of(image: Image) -> str | None:
    """Returns the loss of a conversion to RGB, a key of :data:`CONVERSIONS` or the mode, if any."""
    if image.mode in ("I", "F"):
        raise EncodingProblem(
            "image",
            f"has pixels of mode {image.mode!r}, and nothing shows which are black and white",
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
