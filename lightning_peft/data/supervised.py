"""Data for supervised fine-tuning of causal language models, as a LightningDataModule."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lightning_peft.data import packing as packed
from lightning_peft.data.batching import LengthGroupedSampler, pad
from lightning_peft.data.encoding import LossOn, OverLong
from lightning_peft.data.preparation import DEFAULT_SHARES, REJECTED, Prepared, Settings, prepare
from lightning_peft.data.reading import Source, TextUnit
from lightning_peft.data.validation import describe
from lightning_peft.errors import ConfigError
from lightning_peft.plugin.namespace import PerNamespace

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule as _Base
    from transformers import PreTrainedTokenizerBase
else:
    _Base = object

log = logging.getLogger(__name__)

LONGEST_DEFAULT = 2048


class SupervisedData(_Base, metaclass=PerNamespace):
    """Examples to fine-tune a causal language model on.

    Every row is checked before training. Rows with problems are an error that lists all of them,
    unless ``skip_bad_rows`` is given. Tokens are kept on disk and shared between runs.

    Args:
        data: File (JSONL, JSON, CSV, TSV, Parquet, text), folder of such, or dataset on the hub.
        tokenizer: Name on the hub, or folder.
        validation_data: The validation rows, if they are not in ``data``.
        test_data: The test rows, if they are not in ``data``.
        validation_share: Share of the rows to validate with, drawn by content; 0.05 where the data
            does not say itself which rows are for what.
        test_share: Share of the rows to test with, drawn by content.
        split_seed: Another seed draws other rows for validation and test.
        shape: ``"auto"``, or one of ``"messages"``, ``"alpaca"``, ``"prompt_completion"``,
            ``"text"``.
        columns: Our name of a field to the column that holds it, such as
            ``{"prompt": "question"}``.
        chat_template: ``"chatml"``, ``"plain"``, ``"raw"`` or Jinja source; by default the
            tokenizer's own.
        system_prompt: System turn of conversations that have none.
        loss_on: ``"assistant"`` trains every assistant turn, ``"completion"`` the last one only.
        max_length: Longest row in tokens; by default what the tokenizer says its model takes, and
            2048 at most.
        over_long: Rows longer than that are an error, or are cut at the end (``"truncate"``), or,
            for plain text, split.
        duplicates: Exact duplicates are an error, or are kept.
        skip_bad_rows: File that rows with problems are written to, with the reasons; training then
            goes on without them.
        batch_size: Rows per batch and device.
        packing: Put several examples in a row of ``max_length`` tokens, kept apart exactly.
        length_grouping: Put rows of like length in a batch, against padding.
        shuffle_seed: Seed of the order of length groups.
        num_workers: Processes that load batches.
        hub_config: Configuration of a dataset on the hub.
        hub_splits: Our splits to the hub's, such as ``{"train": "train_sft"}``.
        hub_revision: Branch, tag or commit of the dataset on the hub.
        streaming: Read a dataset on the hub without storing a copy.
        limit: Most rows that are read of each file or split.
        text_unit: What is one row in a text file: ``"line"``, ``"paragraph"`` or ``"document"``.
        cache_dir: Folder for the tokens; by default one in the user's cache.

    Raises:
        ConfigError: If arguments contradict each other, or the data cannot be used.
    """

    lightning_base = "core.datamodule.LightningDataModule"

    def __init__(
        self,
        data: str,
        tokenizer: str,
        validation_data: str | None = None,
        test_data: str | None = None,
        validation_share: float | None = None,
        test_share: float | None = None,
        split_seed: int = 0,
        shape: Literal["auto", "messages", "alpaca", "prompt_completion", "text"] = "auto",
        columns: dict[str, str] | None = None,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        loss_on: LossOn = "assistant",
        max_length: int | None = None,
        over_long: OverLong = "error",
        duplicates: Literal["error", "keep"] = "error",
        skip_bad_rows: str | None = None,
        batch_size: int = 8,
        packing: bool = False,
        length_grouping: bool = False,
        shuffle_seed: int = 0,
        num_workers: int = 0,
        hub_config: str | None = None,
        hub_splits: dict[str, str] | None = None,
        hub_revision: str | None = None,
        streaming: bool = False,
        limit: int | None = None,
        text_unit: TextUnit = "line",
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        # Lightning refuses to log where a module has an argument of the same name.
        self.save_hyperparameters(logger=False)
        self.batch_size = batch_size
        self.prepared: Prepared | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._checked: object = None
        self._check_arguments()

    def _check_arguments(self) -> None:
        given = self.hparams
        problems = []
        shares = {name: given[f"{name}_share"] for name in ("validation", "test")}
        if any(share is not None and not 0 <= share < 1 for share in shares.values()):
            problems.append(f"shares are between 0 and 1, not {shares}")
        elif sum(share or 0 for share in shares.values()) >= 1:
            problems.append(f"the shares {shares} leave nothing to train on")
        for name in ("validation", "test"):
            if given[f"{name}_data"] is not None and given[f"{name}_share"] is not None:
                problems.append(f"{name}_data and {name}_share are both given; drop one")
        for name in ("batch_size", "max_length", "limit"):
            if given[name] is not None and given[name] < 1:
                problems.append(f"{name}={given[name]} is less than 1")
        if given["packing"] and given["length_grouping"]:
            problems.append("packing leaves no padding for length_grouping to save; drop one")
        if problems:
            raise ConfigError(f"SupervisedData cannot be made: {'; '.join(problems)}.")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use.

        Raises:
            ConfigError: If it cannot be had.
        """
        if self._tokenizer is None:
            name = self.hparams["tokenizer"]
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(name)
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"tokenizer={name!r} is no folder with a tokenizer, and the hub did not give "
                    f"it ({str(error).strip().partition(chr(10))[0]}). Check the name and the "
                    "network (HF_HUB_OFFLINE must not be set)."
                ) from error
        return self._tokenizer

    @property
    def max_length(self) -> int:
        """Longest row in tokens."""
        limit = int(self.tokenizer.model_max_length)
        asked: int | None = self.hparams["max_length"]
        if asked is not None and asked > limit:
            raise ConfigError(
                f"max_length={asked:,} is more than the {limit:,} tokens that the tokenizer "
                f"{self.hparams['tokenizer']!r} says its model takes. Lower it, or set "
                "model_max_length in the tokenizer's files if they are wrong."
            )
        return min(limit, LONGEST_DEFAULT) if asked is None else asked

    def prepare_data(self) -> None:
        """Reads, checks and tokenizes all rows, in one process, unless that was done before."""
        self.read()

    def read(self) -> Prepared:
        """Returns the prepared rows, with the problems of those that are not among them."""
        if self.prepared is None:
            folder = self.hparams["cache_dir"]
            self.prepared = prepare(
                self._sources(), self.tokenizer, self._settings(), folder and Path(folder)
            )
        return self.prepared

    def setup(self, stage: str) -> None:
        """Opens the prepared rows.

        Raises:
            ConfigError: With all that is wrong with the rows, unless they are to be skipped.
        """
        prepared = self.read()
        if prepared.problems and self.hparams["skip_bad_rows"] is None:
            raise ConfigError(
                f"{self.hparams['data']!r} cannot be used for training. "
                + describe(prepared.problems, prepared.summary["rows"])
                + '\nTo train without these rows: skip_bad_rows="rejected.jsonl" writes them there.'
            )
        if "train" not in prepared.splits:
            raise ConfigError(
                f"No row of {self.hparams['data']!r} is left to train on: of "
                f"{prepared.summary['rows']:,} rows {prepared.summary['rejected']:,} have problems."
            )
        split_by = prepared.summary["split_by"]
        shares = split_by.get("shares", {})
        empty = [name for name, share in shares.items() if share and name not in prepared.splits]
        if empty:
            raise ConfigError(
                f"None of {prepared.summary['rows']:,} rows falls into {' and '.join(empty)} with "
                f"the shares {shares} and split_seed={split_by['seed']}. Raise the share, change "
                "the seed, or set the share to 0."
            )
        if prepared.problems and (self.trainer is None or self.trainer.is_global_zero):
            self._write_rejected(prepared)

    def _write_rejected(self, prepared: Prepared) -> None:
        target = Path(self.hparams["skip_bad_rows"])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(prepared.folder / REJECTED, target)
        summary = prepared.summary
        log.warning(
            f"{summary['rejected']:,} of {summary['rows']:,} rows are left out; they and the "
            f"reasons are in {str(target)!r}"
        )

    @property
    def record(self) -> dict[str, Any]:
        """What was prepared, for the record of a run: counts, splits, template, settings."""
        prepared = self.read()
        kinds = Counter(problem.kind for problem in prepared.problems)
        return {
            **prepared.summary,
            "data": self.hparams["data"],
            "tokenizer": self.hparams["tokenizer"],
            "key": prepared.folder.name,
            "problems": dict(kinds),
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint holds of the data: the key of what was trained on."""
        return {"key": self.read().folder.name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Says so if a run is resumed on other data than it was begun on."""
        if state_dict["key"] != self.read().folder.name:
            log.warning(
                f"The checkpoint was trained on other data than {self.hparams['data']!r} is now: "
                "rows, tokenizer or settings that decide the tokens have changed, so the run goes "
                "on with other batches. To resume it as it was, give it what it was begun with."
            )

    def train_dataloader(self) -> Any:
        """Returns the training rows, in random order."""
        return self._loader("train")

    def val_dataloader(self) -> Any:
        """Returns the validation rows; an empty list where there are none."""
        return self._loader("validation")

    def test_dataloader(self) -> Any:
        """Returns the test rows; an empty list where there are none."""
        return self._loader("test")

    def _loader(self, split: str) -> Any:
        self.setup(split)
        prepared = self.read()
        if split not in prepared.splits:
            return []
        rows: Any = prepared.splits[split].select_columns(["input_ids", "labels"])
        lengths = prepared.lengths(split)
        filler: Any = self.tokenizer.pad_token_id
        filler = self.tokenizer.eos_token_id if filler is None else filler
        collate: Any = pad
        sampler = None
        if self.hparams["packing"]:
            rows, collate = packed.PackedRows(rows, lengths, self.max_length), packed.collate
        elif self.hparams["length_grouping"] and split == "train":
            sampler = self._sampler(lengths)
        return DataLoader(
            rows,
            batch_size=self.batch_size,
            shuffle=split == "train" and sampler is None,
            sampler=sampler,
            num_workers=self.hparams["num_workers"],
            collate_fn=partial(collate, filler=filler),
        )

    def _sampler(self, lengths: list[int]) -> LengthGroupedSampler:
        trainer = self.trainer
        processes, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
        return LengthGroupedSampler(
            lengths, self.batch_size, self.hparams["shuffle_seed"], processes, rank
        )

    def on_after_batch_transfer(
        self, batch: dict[str, Tensor], dataloader_idx: int
    ) -> dict[str, Tensor]:
        """Fits the mask of packed rows to the model, which is tried on the first of them.

        Raises:
            UnsupportedError: If the model would not keep the examples of a row apart.
        """
        if not self.hparams["packing"] or self.trainer is None:
            return batch
        model = packed.language_model(self.trainer.lightning_module)
        if self._checked is not model:
            packed.check_model(model, self.max_length)
            self._checked = model
        return packed.to_model(batch, model)

    def _sources(self) -> list[Source]:
        given = self.hparams
        apart = [(split, given[f"{split}_data"]) for split in ("validation", "test")]
        named = [(split, data) for split, data in apart if data is not None]
        # Without validation rows of its own, the data is shared out.
        first = [("train" if given["validation_data"] else None, given["data"])]
        names = ("hub_config", "hub_splits", "hub_revision", "streaming", "limit", "text_unit")
        options = {name: given[name] for name in names}
        return [Source(data, split, **options) for split, data in [*first, *named]]

    def _settings(self) -> Settings:
        given = self.hparams
        shares = {name: given[f"{name}_share"] for name in ("validation", "test")}
        asked = {name: share for name, share in shares.items() if share is not None}
        if asked and given["validation_data"] is None:
            asked = {**DEFAULT_SHARES, **asked}
        names = (
            "shape",
            "columns",
            "chat_template",
            "system_prompt",
            "loss_on",
            "over_long",
            "duplicates",
            "split_seed",
        )
        options = {name: given[name] for name in names}
        return Settings(**options, max_length=self.max_length, shares=asked or None)
