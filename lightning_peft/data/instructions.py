"""Instruction data: rows with a prompt and a response, of which only the response is trained."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lightning_peft.data.batching import pad
from lightning_peft.data.encoding import IGNORED
from lightning_peft.data.row_keys import (
    KeyCount,
    check_column,
    describe_unused,
    unread_columns,
    unused_keys,
)
from lightning_peft.errors import ConfigError, itemize
from lightning_peft.plugin.namespace import LateBoundMeta

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule as _Base
    from transformers import PreTrainedTokenizerBase
else:
    _Base = object

log = logging.getLogger(__name__)

TEMPLATE = "### Question:\n{prompt}\n\n### Answer:\n"

Row = dict[str, str]
Example = dict[str, list[int]]


def read_rows(path: Path) -> list[Row]:
    """Reads JSON lines with ``prompt``, ``response`` and, optionally, ``split``.

    Raises:
        ConfigError: If rows are not JSON objects, lack a field, or have a key that would change
            what is trained; every bad row is numbered.
    """
    rows: list[Row] = []
    problems = []
    unused = KeyCount()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            problems.append(f"row {number} is not JSON: {error}")
            continue
        absent = [
            name
            for name in ("prompt", "response")
            if not isinstance(row, dict) or not str(row.get(name) or "").strip()
        ]
        if absent:
            problems.append(f"row {number} has no {' and no '.join(absent)}")
            continue
        rows.append(row)
        for name, value in unread_columns(row, ("prompt", "response", "split")).items():
            # Neither turns nor a template are read here.
            found = check_column(name, value, True, True, False)
            problems += [f"row {number} {text}" for _, text in found or []]
            unused.add([name] if found == [] else [], path.name, number)
    if problems:
        raise ConfigError(f"{path.name!r} cannot be used for training:" + itemize(problems))
    keys = unused_keys({"keys_unused": unused.summary()})
    if keys:
        log.warning(f"Keys of {path.name!r} that are not used: {describe_unused(keys)}.")
    return rows


def encode(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int) -> Example:
    """Returns ``input_ids`` and ``labels`` of one row; the prompt's labels are ignored.

    The response ends with the end-of-sequence token, which is trained too. Rows longer than
    ``max_length`` tokens are cut at the end.
    """
    prompt = tokenizer(TEMPLATE.format(prompt=row["prompt"]))["input_ids"]
    if prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]
    response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    ids = [*prompt, *response, end][:max_length]
    labels = [*[IGNORED] * len(prompt), *response, end][:max_length]
    return {"input_ids": ids, "labels": labels}


class InstructionData(_Base, metaclass=LateBoundMeta):
    """Prompts and responses for :class:`lightning_peft.tasks.causal_lm.CausalLM`.

    Args:
        path: JSON lines with ``prompt``, ``response`` and ``split`` (``train``, ``validation``).
        tokenizer: Name on the hub, or folder.
        batch_size: Rows per batch.
        max_length: Longest example in tokens.
    """

    lightning_base = "core.datamodule.LightningDataModule"

    def __init__(
        self, path: str, tokenizer: str, batch_size: int = 16, max_length: int = 256
    ) -> None:
        super().__init__()
        self.path = Path(path)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        self.batch_size = batch_size
        self.max_length = max_length
        self.splits: dict[str, list[Example]] = {}

    def setup(self, stage: str) -> None:
        """Reads and tokenizes the rows, once.

        Raises:
            ConfigError: If the prompt of a row fills ``max_length``, so that nothing is trained.
        """
        if self.splits:
            return
        empty = []
        for number, row in enumerate(read_rows(self.path), start=1):
            example = encode(self.tokenizer, row, self.max_length)
            self.splits.setdefault(row.get("split", "train"), []).append(example)
            if all(label == IGNORED for label in example["labels"]):
                empty.append(f"example {number}: {row['prompt'][:60]!r}")
        if empty:
            raise ConfigError(
                f"Prompts in {self.path.name!r} fill max_length={self.max_length} tokens, so that "
                "no token of the response is left to train:"
                + itemize(empty)
                + "\nRaise max_length or shorten them."
            )

    def loader(self, split: str, *, shuffle: bool = False, limit: int | None = None) -> Any:
        """Returns a DataLoader over one split, or its first ``limit`` rows."""
        self.setup("fit")
        tokenizer = self.tokenizer
        pad_token_id = (
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
        return DataLoader(
            self.splits[split][:limit],  # type: ignore[arg-type]
            batch_size=self.batch_size,
            shuffle=shuffle,
            collate_fn=lambda examples: pad(examples, pad_token_id),
        )

    def train_dataloader(self) -> Any:
        """Returns the shuffled training rows."""
        return self.loader("train", shuffle=True)

    def val_dataloader(self) -> Any:
        """Returns the held-out rows."""
        return self.loader("validation")
