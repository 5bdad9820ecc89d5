"""Base class of all data modules: reading, validation, tokenization and splits."""

from __future__ import annotations

import logging
import shutil
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch.utils.data import DataLoader, Sampler

from lightning_peft.data.encoding import TextSpan
from lightning_peft.data.file_format import Row
from lightning_peft.data.preparation import (
    DEFAULT_SPLIT_FRACTIONS,
    PreparationSettings,
    prepare,
)
from lightning_peft.data.prepared_parts import REJECTED, Prepared
from lightning_peft.data.prompts import read_prompts
from lightning_peft.data.reading import Source, TextUnit, named_apart
from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.row_keys import describe_unused
from lightning_peft.data.shapes import Layout
from lightning_peft.data.validation import describe
from lightning_peft.data.validation_rows import automatic_count, spread
from lightning_peft.errors import ConfigError
from lightning_peft.plugin.namespace import LateBoundMeta
from lightning_peft.processes import lead_own_group, usable_cores

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule as _Base
else:
    _Base = object

log = logging.getLogger(__name__)


def automatic_workers(processes: int, most: int = 4) -> int:
    """Returns how many workers each of the processes of a machine starts on its CPU cores."""
    return max(0, min(most, usable_cores() // max(1, processes) - 1))


class RowDataModule(_Base, metaclass=LateBoundMeta):
    """Rows of examples, every one of which is checked before training.

    Rows with problems are an error that lists all of them, unless ``skip_bad_rows`` is given. What
    they are encoded to is kept on disk and shared between runs.

    Args:
        data: File (JSONL, JSON, CSV, TSV, Excel, Parquet, Arrow, text), folder of such, or
            dataset on the hub.
        validation_data: The validation rows, if they are not in ``data``.
        test_data: The test rows, if they are not in ``data``.
        validation_share: Share of the rows to validate with, drawn by content; 0.05 where the data
            does not say itself which rows are for what.
        test_share: Share of the rows to test with, drawn by content.
        split_seed: Another seed draws other rows for validation and test.
        columns: Our name of a field to the column that holds it, such as
            ``{"prompt": "question"}``.
        ignored_keys: Keys of rows, turns and their parts that are left out on purpose: they are
            neither refused nor named.
        duplicates: Exact duplicates are an error, or are kept.
        skip_bad_rows: File that rows with problems are written to, with the reasons; training then
            goes on without them.
        validation_rows: Most rows that a fit validates with, spread evenly over all of them;
            ``"auto"`` is a fifteenth of the rows that it trains on, each as often as it comes, and
            200 at least, and as many in a resumed run; ``None`` is all.
        batch_size: Rows per batch and device.
        num_workers: Processes that load batches. ``None`` is none where rows are tokens already
            or the CPU trains; for rows that are decoded, such as images and recordings, on a GPU it
            is one for each CPU core that a process of the run can have, but one, and 4 at most.
        hub_config: Configuration of a dataset on the hub.
        hub_splits: Our splits to the hub's, such as ``{"train": "train_sft"}``.
        hub_revision: Branch, tag or commit of the dataset on the hub.
        streaming: Read a dataset on the hub without storing a copy.
        limit: Most rows that are read of each file or split.
        text_unit: What is one row in a text file: ``"line"``, ``"paragraph"`` or ``"document"``.
        encoding: Encoding of text files, such as ``"cp1252"``; by default it is detected.
        delimiter: What parts the columns of a table, such as ``";"`` or ``"tab"``; by default it is
            detected.
        sheet: Name of the sheet of an Excel workbook, or its number from 1; by default the only
            one with rows.
        cache_dir: Folder for what is prepared; by default one in the user's cache.

    Raises:
        ConfigError: If arguments contradict each other, or the data cannot be used.
    """

    lightning_base = "core.datamodule.LightningDataModule"
    # Names of the shapes that can be trained on.
    accepts: ClassVar[tuple[str, ...]]
    # A fixed shape is taken also where the rows fit another one.
    default_shape: ClassVar[str] = "auto"
    # Reads the rows; a subclass finds files that they name.
    source_class: ClassVar[type[Source]] = Source
    # Whether rows are decoded when a batch is made, which takes time.
    decodes: ClassVar[bool] = False
    # Columns of a prepared row that reach the batch.
    batch_columns: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        data: str,
        validation_data: str | None = None,
        test_data: str | None = None,
        validation_share: float | None = None,
        test_share: float | None = None,
        split_seed: int = 0,
        columns: dict[str, str] | None = None,
        ignored_keys: list[str] | None = None,
        duplicates: Literal["error", "keep"] = "error",
        skip_bad_rows: str | None = None,
        validation_rows: int | Literal["auto"] | None = "auto",
        batch_size: int = 8,
        num_workers: int | None = None,
        hub_config: str | None = None,
        hub_splits: dict[str, str] | None = None,
        hub_revision: str | None = None,
        streaming: bool = False,
        limit: int | None = None,
        text_unit: TextUnit = "line",
        encoding: str | None = None,
        delimiter: str | None = None,
        sheet: str | int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        # Lightning refuses to log where a module has an argument of the same name.
        self.save_hyperparameters(logger=False)
        self.batch_size = batch_size
        self.prepared: Prepared | None = None
        # The validation rows of a fit: taken and of how many; and of the run that is resumed.
        self.validated: tuple[int, int] | None = None
        self._validated_before: tuple[int, int] | None = None
        # For numbers that are compared with those of the fit.
        self.validates_as_in_fit = False
        # Of the keys that are not used: several loaders set the same data up.
        self._reported = False
        problems = self._argument_problems()
        if problems:
            name = type(self).__name__
            raise ConfigError(f"{name} cannot be made: {'; '.join(problems)}.")

    def _argument_problems(self) -> list[str]:
        """Returns the problems of the arguments alone; subclasses add to them."""
        hparams = self.hparams
        problems = []
        shares = {name: hparams[f"{name}_share"] for name in ("validation", "test")}
        if any(share is not None and not 0 <= share < 1 for share in shares.values()):
            problems.append(f"shares are between 0 and 1, not {shares}")
        elif sum(share or 0 for share in shares.values()) >= 1:
            problems.append(f"the shares {shares} leave nothing to train on")
        for name in ("validation", "test"):
            if hparams[f"{name}_data"] is not None and hparams[f"{name}_share"] is not None:
                problems.append(f"{name}_data and {name}_share are both given; drop one")
        for name in ("batch_size", "max_length", "limit", "validation_rows"):
            if isinstance(hparams.get(name), int) and hparams[name] < 1:
                problems.append(f"{name}={hparams[name]} is less than 1")
        return problems

    @abstractmethod
    def encoder_for(self, layout: Layout) -> RowEncoder:
        """Returns the encoder for rows of this layout."""

    @abstractmethod
    def encoding(self) -> dict[str, Any]:
        """Returns all that decides how rows are encoded, ready for JSON: the key of the cache."""

    @abstractmethod
    def collator(self) -> Callable[[list[Any]], Any]:
        """Returns the picklable collate function for rows of ``batch_columns``."""

    def sampler(self, split: str) -> Sampler[int] | None:
        """Returns the order of the rows of ``split``, where it is a special one."""
        return None

    def render_row(self, row: dict[str, Any]) -> list[TextSpan]:
        """Returns a prepared row as it is shown to a person: trained or not."""
        return [TextSpan(False, f"{name}: {row[name]}", []) for name in self.batch_columns]

    def prepare_data(self) -> None:
        """Reads, checks and encodes all rows, in one process, unless that was done before."""
        self.read()

    def read(self) -> Prepared:
        """Returns the prepared rows, with the problems of those that are not among them."""
        if self.prepared is None:
            folder = self.hparams["cache_dir"]
            self.prepared = prepare(
                self._sources(), self._settings(), self.encoder_for, folder and Path(folder)
            )
        return self.prepared

    def source_rows(self) -> Iterator[Row]:
        """Yields every row as it is stored, whether it can be used or not."""
        for source in self._sources():
            yield from source.rows()

    def setup(self, stage: str) -> None:
        """Opens the prepared rows; refuses what is wrong with them, unless it is to be skipped."""
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
        if self.trainer is None or self.trainer.is_global_zero:
            self._report(prepared)

    def _report(self, prepared: Prepared) -> None:
        summary = prepared.summary
        if prepared.problems:
            target = Path(self.hparams["skip_bad_rows"])
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(prepared.folder / REJECTED, target)
            log.warning(
                f"{summary['rejected']:,} of {summary['rows']:,} rows are left out; they and the "
                f"reasons are in {str(target)!r}"
            )
        unused = summary["keys_unused"]
        if unused and not self._reported:
            self._reported = True
            log.warning(
                f"Keys of {self.hparams['data']!r} that are not used: {describe_unused(unused)}. "
                "Nothing that is learnt depends on them; ignored_keys= takes them off this list."
            )

    @property
    def record(self) -> dict[str, Any]:
        """What was prepared, for the record of a run: counts, splits and settings."""
        prepared = self.read()
        kinds = Counter(problem.kind for problem in prepared.problems)
        names = (
            *("data", "tokenizer", "tokenizer_revision"),
            *("processor", "processor_config", "processor_revision"),
        )
        return {
            **prepared.summary,
            **{name: self.hparams[name] for name in names if self.hparams.get(name)},
            "key": prepared.folder.name,
            "problems": dict(kinds),
        }

    @property
    def prompts(self) -> dict[str, Any] | None:
        """What a chat begins with: rows, so not for the record that goes with adapters."""
        return read_prompts(self.read().folder)

    def state_dict(self) -> dict[str, Any]:
        """Returns the key of the prepared data, and what the fit validates with."""
        return {"key": self.read().folder.name, "validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the number of validation rows; warns if the data is not that of the checkpoint."""
        self._validated_before = state_dict.get("validated")
        if state_dict["key"] != self.read().folder.name:
            trainer = getattr(self, "trainer", None)
            fits = trainer is None or trainer.state.fn == "fit"
            log.warning(
                f"The checkpoint was trained on other data than {self.hparams['data']!r} is now: "
                "rows, or settings that decide how they are split and encoded, have changed. "
                + (
                    "The run goes on with other batches. To resume it as it was, give it what it "
                    "was begun with."
                    if fits
                    else "The rows of this evaluation may be among those that it was trained on. "
                    "For those that were held out, give it what it was trained with."
                )
            )

    def train_dataloader(self) -> Any:
        """Returns the training rows, in random order."""
        return self.loader("train")

    def val_dataloader(self) -> Any:
        """Returns the validation rows; an empty list where there are none."""
        return self.loader("validation", self._for_validation)

    def test_dataloader(self) -> Any:
        """Returns the test rows; an empty list where there are none."""
        return self.loader("test")

    def predict_dataloader(self) -> Any:
        """Returns the test rows, or the validation rows where there are none."""
        return self.loader("test") or self.loader("validation")

    def rows(self, split: str) -> Any:
        """Returns the prepared rows of a split with rows, as a map-style dataset."""
        return self.read().splits[split].select_columns(list(self.batch_columns))

    def loader(self, split: str, choose: Callable[[Any], Any] | None = None) -> Any:
        """Returns the rows of ``split``, or those chosen, in batches; an empty list for none."""
        self.setup(split)
        if split not in self.read().splits:
            return []
        sampler = self.sampler(split)
        rows = self.rows(split)
        if choose is not None and sampler is None:
            rows = choose(rows)
        return DataLoader(
            rows,
            batch_size=self.batch_size,
            shuffle=split == "train" and sampler is None,
            sampler=sampler,
            num_workers=self.workers,
            collate_fn=self.collator(),
            worker_init_fn=lead_own_group,
        )

    @property
    def workers(self) -> int:
        """Processes that load batches; the batches are the same with any number."""
        wanted: int | None = self.hparams["num_workers"]
        trainer = self.trainer
        if wanted is not None or not self.decodes or trainer is None:
            return wanted or 0
        if trainer.strategy.root_device.type == "cpu":
            return 0
        return automatic_workers(trainer.world_size // max(1, trainer.num_nodes))

    def _for_validation(self, rows: Any) -> Any:
        """Returns the rows that a fit validates with; all for whatever comes after it."""
        trainer = self.trainer
        if trainer is not None and trainer.state.fn == "fit":
            self.validated = self._validation_count(trainer, len(rows)), len(rows)
        elif not self.validates_as_in_fit:
            return rows
        return rows if self.validated is None else spread(rows, self.validated[0])

    def _validation_count(self, trainer: Any, known: int) -> int:
        wanted = self.hparams["validation_rows"]
        if wanted != "auto":
            return known if wanted is None else min(known, wanted)
        before = self._validated_before if trainer.ckpt_path else None
        if before is not None and before[1] == known:
            # Else a longer run would compare losses of different rows.
            return before[0]
        count = automatic_count(trainer, known, len(self.rows("train")), self.batch_size)
        if count < known and self.validated is None and trainer.is_global_zero:
            log.info(
                f"Validation takes {count:,} of {known:,} rows, spread evenly, since the run "
                "trains on few; validation_rows=None takes all."
            )
        return count

    def _sources(self) -> list[Source]:
        hparams = self.hparams
        separate = [(split, hparams[f"{split}_data"]) for split in ("validation", "test")]
        named = [(split, data) for split, data in separate if data is not None]
        # Without validation rows of its own, the data is shared out.
        first = [("train" if hparams["validation_data"] else None, hparams["data"])]
        of_hub = ("hub_config", "hub_splits", "hub_revision", "streaming")
        of_files = ("limit", "text_unit", "encoding", "delimiter", "sheet", "columns")
        options = {name: hparams[name] for name in (*of_hub, *of_files)}
        sources = [*first, *named]
        return named_apart([self.source_class(data, split, **options) for split, data in sources])

    def _settings(self) -> PreparationSettings:
        hparams = self.hparams
        shares = {name: hparams[f"{name}_share"] for name in ("validation", "test")}
        requested = {name: share for name, share in shares.items() if share is not None}
        if requested and hparams["validation_data"] is None:
            requested = {**DEFAULT_SPLIT_FRACTIONS, **requested}
        return PreparationSettings(
            accepts=self.accepts,
            shape=hparams.get("shape", self.default_shape),
            columns=hparams["columns"],
            duplicates=hparams["duplicates"],
            shares=requested or None,
            split_seed=hparams["split_seed"],
            encoding=self.encoding(),
            ignored_keys=tuple(sorted(hparams["ignored_keys"] or ())),
        )
