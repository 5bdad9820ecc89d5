"""Data for image-text-to-text models: conversations with images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from datasets import Features, Value
from datasets import Sequence as ListOf
from torch import Tensor

from lightning_peft.data.batching import pad
from lightning_peft.data.conversation_text import LossOn, Part
from lightning_peft.data.encoding import (
    IGNORED,
    Encoded,
    Encoder,
    TextSpan,
    overlapping_tokens,
    token_spans,
)
from lightning_peft.data.image_templates import ImageRendering, image_template
from lightning_peft.data.image_tokens import ImageTokens, expanded, moved
from lightning_peft.data.image_turns import MARK
from lightning_peft.data.images import (
    as_rgb,
    conversion_of,
    decode_image,
    log_conversions,
    require_pillow,
    thumbnail,
)
from lightning_peft.data.media_source import ImageTextSource
from lightning_peft.data.processors import config_problems, digest_of_processor, load_processor
from lightning_peft.data.row_encoder import RowEncoder, SpecialTokens
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import Layout
from lightning_peft.data.supervised import ConversationData, ConversationRows
from lightning_peft.data.turns import Reasoning
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import ConfigError

Span = tuple[int, int]
# Where most tokens of a row are those of images.
DEFAULT_MAX_LENGTH = 4096


@dataclass(frozen=True)
class EncodedWithImages(Encoded):
    """A row of tokens, with the first token of each image and the one after its last."""

    images: tuple[Span, ...] = ()


class ImageTextEncoder(Encoder):
    """Encodes conversations with images, each as the tokens that the processor writes for it."""

    rendering_class = ImageRendering

    def __init__(self, images: ImageTokens, **options: Any) -> None:
        super().__init__(images.processor.tokenizer, **options)
        self.images = images
        self._special_tokens = SpecialTokens(self.tokenizer, images.special_tokens)

    def encode(self, sample: Sample) -> list[Encoded]:
        """Returns the rows that ``sample`` becomes, see :meth:`Encoder.encode`."""
        turns = self._texts.turns(sample.messages, sample.context)
        self._check_special_tokens(turns, sample.context)
        everything = self.images.written(sample.images)
        rows: list[Encoded] = []
        for part in self._texts.parts(turns, sample.context):
            read = self._texts.with_masked_reasoning(part, sample.context)
            count = sum(turn["content"].count(MARK) for turn in part.messages)
            self._check_places(read.text, count)
            written = everything
            if count < len(written):
                # Some processors cut an image into tiles only where it is alone.
                written = self.images.written(sample.images[:count])
            text, spans, gains = expanded(read.text, self.images.token, written)
            answers = {place: moved(span, gains) for place, span in read.answers.items()}
            hidden = tuple(moved(span, gains) for span in read.hidden)
            long = Part(read.messages, text, answers, hidden)
            ids, trained, masked, offsets = self._part(long, sample.context)
            row = self._row(ids, trained, masked, part.messages, sample.context)
            places = tuple(overlapping_tokens(offsets, *span) for span in spans)
            rows.append(self._fit_images(row, places))
        return rows

    def _check_places(self, text: str, count: int) -> None:
        assert self.template is not None
        found = text.count(self.images.token)
        if found != count:
            raise EncodingProblem(
                "template",
                f"has {count} images in its turns, and the chat template {self.template.name} "
                f"writes {found} places for them",
            )

    def _fit_images(self, row: Encoded, places: tuple[Span, ...]) -> EncodedWithImages:
        """Cuts a long row at its end, and never an image."""
        last = max((end for _, end in places), default=0)
        if last > self.max_length:
            tokens = ", ".join(f"{end - start:,}" for start, end in places)
            raise EncodingProblem(
                "long",
                f"has {len(row.input_ids):,} tokens of {self.max_length:,} allowed, and the end "
                f"cannot be cut off without a part of an image (tokens of its images: {tokens})",
            )
        return EncodedWithImages(**vars(self._fit_to_length(row)), images=places)


class ImageTextRows(ConversationRows):
    """Tokens of a conversation with labels on its answers, and its images."""

    features = Features(
        {
            **ConversationRows.token_features,
            "images": ListOf(Value("binary")),
            "image_starts": ListOf(Value("int32")),
            "image_ends": ListOf(Value("int32")),
            "conversions": ListOf(Value("string")),
        }
    )
    counts = (
        *ConversationRows.token_counts,
        *("images", "image_tokens", "converted", "rows_without_images"),
    )
    writer_batch_size: ClassVar[int | None] = 32
    # The processor holds more than other processes can be given.
    parallelizable = resumable = False

    def __init__(self, encoder: Encoder, system_prompt: str | None = None) -> None:
        super().__init__(encoder, system_prompt)
        self.conversions: Counter[str] = Counter()

    def encode(self, sample: Sample) -> list[dict[str, Any]]:
        """Returns the rows that a conversation becomes."""
        conversions = [conversion_of(decode_image(image)) or "" for image in sample.images]
        return [
            self.columns(
                row,
                images=list(sample.images[: len(row.images)]),
                image_starts=[first for first, _ in row.images],
                image_ends=[last for _, last in row.images],
                conversions=conversions[: len(row.images)],
            )
            for row in self.encoder.encode(sample.with_system(self.system_prompt))
            if isinstance(row, EncodedWithImages)
        ]

    def count(self, row: dict[str, Any]) -> dict[str, int]:
        """Returns the counts of a row, its images among them."""
        self.conversions.update(filter(None, row["conversions"]))
        pairs = zip(row["image_starts"], row["image_ends"], strict=True)
        more = {
            "images": len(row["images"]),
            "image_tokens": sum(last - first for first, last in pairs),
            "converted": sum(map(bool, row["conversions"])),
            "rows_without_images": not row["images"],
        }
        return super().count({**row, **more})

    def summary(self) -> dict[str, Any]:
        """Returns the template, and how many images become RGB."""
        return {**super().summary(), "conversions": dict(self.conversions)}


class ImageTextBatch:
    """Collates rows: pads their tokens on the right, and processes their images."""

    def __init__(self, images: ImageTokens, pad_token_id: int) -> None:
        self.images, self.pad_token_id = images, pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns a batch of the rows that :class:`ImageTextData` prepares.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, ``(batch, length)``, int64, with
            -100 where there is no label; ``token_type_ids`` or ``mm_token_type_ids`` of that shape
            where the model takes them; and of the images what the processor makes of them:
            ``pixel_values``, and ``image_grid_thw``, ``pixel_attention_mask``, ``image_sizes`` by
            the family. A batch without images has none of the latter.
        """
        batch = pad(rows, self.pad_token_id)
        types = self.images.token_types(batch["input_ids"])
        return {**batch, **types, **self.images.inputs([row["images"] for row in rows])}


class ImageTextData(ConversationData):
    """Conversations with images to fine-tune an image-text-to-text model on.

    Every row is checked before training, and every image is opened and processed once for that.
    Rows with problems are an error that lists all of them, unless ``skip_bad_rows`` is given. The
    cache holds a copy of every image.

    Args:
        data: File (JSONL, JSON, CSV, TSV, Parquet) with paths relative to it, folder of such, or
            dataset on the hub.
        processor: Name on the hub, or folder, of the model's processor.
        processor_config: Settings of a processor, where ``processor`` has a tokenizer alone: its
            ``processor_class``, an ``image_processor`` with its ``image_processor_type``,
            ``special_tokens`` that the tokenizer gets, and arguments of the class.
        shape: ``"auto"``, ``"image_messages"`` or ``"image_prompt"``.
        chat_template: ``"chatml"``, ``"plain"``, ``"raw"`` or Jinja source; by default the
            processor's own.
        system_prompt: System turn of conversations that have none.
        loss_on: ``"assistant"`` trains every assistant turn, ``"completion"`` the last one only.
        over_long: Rows longer than ``max_length``, the tokens of their images included, are an
            error, or are cut at the end (``"truncate"``), but never within an image.
        reasoning: As of :class:`SupervisedData <lightning_peft.data.supervised.SupervisedData>`.
        chat_template_kwargs: Values for variables of the chat template.
        processor_revision: Branch, tag or commit of the processor on the hub.
        **options: Keyword arguments of
            :class:`TokenizedData <lightning_peft.data.tokenized.TokenizedData>` and
            :class:`RowDataModule <lightning_peft.data.row_data_module.RowDataModule>`.

    Raises:
        ConfigError: If arguments contradict each other, the data cannot be used, or Pillow is not
            installed.
        UnsupportedError: If the processor does not write images as tokens.
    """

    decodes = True
    accepts = ("image_messages", "image_prompt")
    batch_columns = ("input_ids", "labels", "images", "image_starts", "image_ends")
    source_class = ImageTextSource
    encoding_arguments = (*ConversationData.encoding_arguments, "loss_on")

    def __init__(
        self,
        data: str,
        processor: str,
        processor_config: dict[str, Any] | None = None,
        shape: Literal["auto", "image_messages", "image_prompt"] = "auto",
        chat_template: str | None = None,
        system_prompt: str | None = None,
        loss_on: LossOn = "assistant",
        over_long: Literal["error", "truncate"] = "error",
        reasoning: Reasoning = "train",
        chat_template_kwargs: dict[str, Any] | None = None,
        processor_revision: str | None = None,
        **options: Any,
    ) -> None:
        require_pillow()
        self._images: ImageTokens | None = None
        super().__init__(
            data,
            tokenizer="",
            over_long=over_long,
            tokenizer_revision=processor_revision,
            **options,
        )

    def _argument_problems(self) -> list[str]:
        return [*super()._argument_problems(), *config_problems(self.hparams["processor_config"])]

    @property
    def image_tokens(self) -> ImageTokens:
        """What the processor does to images; it is loaded on first use."""
        if self._images is None:
            hparams = self.hparams
            names = ("processor", "processor_config", "processor_revision")
            self._images = ImageTokens(load_processor(*(hparams[name] for name in names)))
        return self._images

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the processor, with the chat template of the processor."""
        return self.image_tokens.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """The name or folder of the tokenizer, for messages."""
        return str(self.tokenizer.name_or_path)

    @property
    def max_length(self) -> int:
        """Longest row in tokens, those of images included."""
        if self.hparams["max_length"] is None:
            return min(int(self.tokenizer.model_max_length), DEFAULT_MAX_LENGTH)
        return super().max_length

    def encoder_for(self, layout: Layout) -> RowEncoder:
        """Returns the encoder of conversations."""
        hparams = self.hparams
        if not self.tokenizer.is_fast:
            raise ConfigError(
                f"The tokenizer {type(self.tokenizer).__name__} is slow, and does not say which "
                "characters a token has, so the places of images and answers are not known. Use "
                "one of the tokenizers library."
            )
        template = image_template(self.image_tokens, hparams["chat_template"])
        encoder = ImageTextEncoder(
            self.image_tokens,
            template=template,
            max_length=self.max_length,
            loss_on=hparams["loss_on"],
            over_long=hparams["over_long"],
            reasoning=hparams["reasoning"],
            variables=hparams["chat_template_kwargs"],
        )
        return ImageTextRows(encoder, hparams["system_prompt"])

    def encoding(self) -> dict[str, Any]:
        """Returns all that decides tokens, labels and images, ready for JSON."""
        digest = digest_of_processor(self.image_tokens.processor)
        revision = self.hparams["processor_revision"]
        found = {**super().encoding(), "processor": digest}
        return {**found, "tokenizer_revision": revision} if revision else found

    def prepare_data(self) -> None:
        """Reads and checks all rows, in one process, and logs conversions to RGB."""
        log_conversions(self.read().summary["conversions"])

    def collator(self) -> Callable[[list[Any]], Any]:
        """Returns the collate function, with the processor."""
        return ImageTextBatch(self.image_tokens, self.pad_token_id)

    def predict_dataloader(self) -> Any:
        """Returns the test rows, or the validation rows, in lists, each row with its images."""
        loader = super().predict_dataloader()
        if loader:
            loader.collate_fn = list
        return loader

    def render_row(self, row: dict[str, Any]) -> list[TextSpan]:
        """Returns a prepared row as it is shown: its text, and each image with its size."""
        found: list[TextSpan] = []
        last = 0
        for image, start, end in zip(
            row["images"], row["image_starts"], row["image_ends"], strict=True
        ):
            found += self._text_spans(row, last, start)
            upright = as_rgb(decode_image(image))
            size = f"{upright.width} x {upright.height}"
            shown = f"[image of {size} pixels, {end - start:,} tokens]"
            found.append(TextSpan(False, shown, [], thumbnail(upright)))
            last = end
        return [*found, *self._text_spans(row, last, len(row["input_ids"]))]

    def _text_spans(self, row: dict[str, Any], first: int, last: int) -> list[TextSpan]:
        places = slice(first, last)
        return token_spans(self.tokenizer, row["input_ids"][places], row["labels"][places])

    def prompt_of(self, row: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the inputs of ``generate`` for a row: all before its first trained token."""
        first = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
        seen = sum(end <= first for end in row["image_ends"])
        images = row["images"][:seen]
        ids = row["input_ids"][:first]
        if seen < len(row["images"]):
            spans = list(zip(row["image_starts"], row["image_ends"], strict=True))[:seen]
            ids = self.image_tokens.rewritten(ids, images, spans)
        batch = self.collator()([{"input_ids": ids, "labels": ids, "images": images}])
        return {name: value for name, value in batch.items() if name != "labels"}
