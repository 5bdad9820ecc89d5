"""Base class of tokenized data: tokenizer, maximum length and batches by length."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import Sampler
from transformers import AutoTokenizer

from lightning_peft import engine
from lightning_peft.data.batching import LengthGroupedSampler
from lightning_peft.data.row_data_module import RowDataModule
from lightning_peft.errors import ConfigError, LightningPeftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MAX_LENGTH = 2048


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a model on the hub or in a folder."""
    found: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, "tokenizer", name, revision)
    return found


def load_pretrained(
    loader: Any, what: str, name: str, revision: str | None, argument: str = "", instead: str = ""
) -> Any:
    """Loads a tokenizer or processor of transformers from the hub or a folder.

    For messages, ``what`` is its name, ``argument`` the argument that has it, by default the same,
    and ``instead`` what else a user can do, as the end of a sentence.
    """
    try:
        # By default, transformers prompts the user whether to run code of the repository.
        known = engine.find_gguf(name, revision)
        if known is not None:
            known.check_tokenizer()
        place = name if known is None else str(known.folder)
        at_place = revision if place == name else None
        return loader.from_pretrained(place, revision=at_place, trust_remote_code=False)
    except LightningPeftError:
        # Of a GGUF file, and says what is wrong with it.
        raise
    except (OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ConfigError(
            f"{argument or what}={name!r} is not a folder with a {what}, and the hub did not give "
            f"it{at} ({str(error).strip().partition(chr(10))[0]}). Check the name"
            f"{', the revision' if revision else ''} and the network (HF_HUB_OFFLINE must not be "
            f"set){instead}."
        ) from error


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash of all that decides how ``tokenizer`` tokenizes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = [
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer("a b")["input_ids"],
        version("transformers"),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class TokenizedData(RowDataModule):
    """Rows that a tokenizer encodes.

    Args:
        data: As of :class:`RowDataModule`.
        tokenizer: Name on the hub, or folder.
        max_length: Longest row in tokens; by default the model's by its tokenizer, and
            2048 at most.
        over_long: Rows longer than that are an error, or are cut at the end (``"truncate"``).
        length_grouping: Put rows of like length in a batch, against padding.
        shuffle_seed: Seed of the order of length groups.
        tokenizer_revision: Branch, tag or commit of the tokenizer on the hub; where the model has
            a ``revision``, usually the same.
        **options: Keyword arguments of :class:`RowDataModule`.

    Raises:
        ConfigError: If arguments contradict each other, or the data cannot be used.
    """

    def __init__(
        self,
        data: str,
        tokenizer: str,
        max_length: int | None = None,
        over_long: Literal["error", "truncate"] = "error",
        length_grouping: bool = False,
        shuffle_seed: int = 0,
        tokenizer_revision: str | None = None,
        **options: Any,
    ) -> None:
        self._tokenizer: PreTrainedTokenizerBase | None = None
        super().__init__(data, **options)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            hparams = self.hparams
            self._tokenizer = load_tokenizer(hparams["tokenizer"], hparams["tokenizer_revision"])
        return self._tokenizer

    @property
    def tokenizer_name(self) -> str:
        """The name or folder of the tokenizer, for messages."""
        return str(self.hparams["tokenizer"])

    @property
    def max_length(self) -> int:
        """Longest row in tokens."""
        limit = int(self.tokenizer.model_max_length)
        requested: int | None = self.hparams["max_length"]
        if requested is not None and requested > limit:
            raise ConfigError(
                f"max_length={requested:,} is more than the {limit:,} tokens that the tokenizer "
                f"{self.tokenizer_name!r} says its model takes. Lower it, or set "
                "model_max_length in the tokenizer's files if they are wrong."
            )
        return min(limit, DEFAULT_MAX_LENGTH) if requested is None else requested

    @property
    def pad_token_id(self) -> int:
        """The token that fills up short rows, which is neither attended to nor trained."""
        tokenizer: Any = self.tokenizer
        pad_token_id = tokenizer.pad_token_id
        return int(tokenizer.eos_token_id if pad_token_id is None else pad_token_id)

    def encoding(self) -> dict[str, Any]:
        # That of a processor is named by another argument.
        revision = self.hparams.get("tokenizer_revision")
        return {
            "tokenizer": digest_of_tokenizer(self.tokenizer),
            # Only where there is one: what was prepared without it stays prepared.
            **({"tokenizer_revision": revision} if revision else {}),
            "max_length": self.max_length,
            "over_long": self.hparams["over_long"],
        }

    def sampler(self, split: str) -> Sampler[int] | None:
        """Returns the training rows in groups of like length, if asked for."""
        if split != "train" or not self.hparams["length_grouping"]:
            return None
        trainer = self.trainer
        processes, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
        lengths = self.read().lengths(split)
        seed = self.hparams["shuffle_seed"]
        return LengthGroupedSampler(lengths, self.batch_size, seed, processes, rank)
