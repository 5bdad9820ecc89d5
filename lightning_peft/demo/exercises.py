"""Training data of the demo: order e-mails, or questions for the toy base."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from lightning_peft import engine
from lightning_peft.data.supervised import SupervisedData
from lightning_peft.data.tokenized import load_tokenizer
from lightning_peft.demo.orders import SEEDS, order_splits, written_rows
from lightning_peft.demo.real_base import SMOLLM2, absence_of_smollm2, smollm2
from lightning_peft.errors import ConfigError, LightningPeftError, first_line
from lightning_peft.json_equality import equal_texts

BASE = Path(__file__).with_name("base")
INSTRUCTIONS = Path(__file__).with_name("instructions.jsonl")
TOY = "toy"
# As the shipped base reads questions.
TEMPLATE = (
    "### Question:\n{{ messages[0].content }}\n\n### Answer:\n"
    "{% if not add_generation_prompt %}{{ messages[1].content + eos_token }}{% endif %}"
)
# Of a model that has none: a turn is a paragraph.
PLAIN = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}\n\n{% endif %}{% endfor %}"
)
# In the line of a held-out row.
_HELD_OUT_ROW = '"split": "validation"'
HELD_OUT = 16
# Most tokens of an answer; an order has at most 40.
NEW_TOKENS = 48


@dataclass(frozen=True)
class Exercise:
    """A task for the demo.

    Attributes:
        source: The base.
        title: The base in the record.
        about: What is done, for a reader.
        file: The rows.
        shown: Held-out rows that are printed, by their places.
        answered: How many held-out rows are answered.
        new_tokens: Most tokens of an answer.
        steps: Optimizer steps.
        batch_size: Rows of a step.
        rates: Peak learning rate by method.
        exact: Whether an answer is right, given the expected one; ``None`` where only the loss
            tells.
        template: Chat template; ``None`` for the model's own.
    """

    source: str
    title: str
    about: str
    file: Path
    shown: Sequence[int]
    answered: Sequence[int]
    new_tokens: int
    steps: int
    batch_size: int
    rates: dict[str, float]
    exact: Callable[[str, str], bool] | None
    template: str | None

    def data(self, folder: Path) -> SupervisedData:
        """Returns the rows, encoded for the base and kept in ``folder``."""
        options: dict[str, Any] = {"max_length": 256, "over_long": "truncate", "duplicates": "keep"}
        return SupervisedData(
            str(self.file),
            self.source,
            chat_template=self.template,
            batch_size=self.batch_size,
            cache_dir=str(folder),
            **options,
        )

    def held_out(self) -> list[tuple[str, str]]:
        """Returns question and expected answer of each held-out row."""
        lines = self.file.read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row["split"] == "validation"]
        return [
            (row["prompt"], row["response"])
            if "prompt" in row
            else (row["messages"][-2]["content"], row["messages"][-1]["content"])
            for row in rows
        ]


def choose_exercise(model: str | None, folder: Path, steps: int | None) -> Exercise:
    """Returns the exercise for a model, whose rows go to ``folder``; ``"toy"`` is the shipped base.

    ``None`` is the real model where it is installed, else the toy.
    """
    if model == TOY:
        return toy_exercise(steps)
    if model is not None:
        check_source(model)
        return orders_exercise(model, Path(model).name, folder, steps)
    reason = absence_of_smollm2()
    if reason is None:
        return orders_exercise(str(smollm2()), SMOLLM2.removesuffix(".gguf"), folder, steps)
    return toy_exercise(steps, f"The real model of the demo is not installed ({reason}), ")


def toy_exercise(steps: int | None, reason: str = "") -> Exercise:
    """Returns the questions about Python's standard library, on the tiny base that read of it."""
    record = json.loads((BASE / "training_record.json").read_text(encoding="utf-8"))
    a = "a" if reason else "A"
    held_out = INSTRUCTIONS.read_text(encoding="utf-8").count(_HELD_OUT_ROW)
    shown = [(2 * i + 1) * held_out // 6 for i in range(3)]
    tokenizer = load_tokenizer(str(BASE))
    # A template writes the token that a tokenizer begins texts with only where it says so.
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return Exercise(
        source=str(BASE),
        title="shipped base",
        about=f"{reason}{a} tiny Llama ({record['parameters'] / 1e6:.1f} million parameters) that "
        "has read the documentation of Python's standard library and nothing else learns to answer "
        "questions about it. It is a toy: watch what tuning changes, do not rely on its answers.",
        file=INSTRUCTIONS,
        shown=shown,
        answered=shown,
        new_tokens=NEW_TOKENS,
        steps=steps or 240,
        batch_size=16,
        rates={"qlora": 2e-3, "lora": 2e-3, "full": 5e-4},
        exact=None,
        template=("{{ bos_token }}" if begins else "") + TEMPLATE,
    )


def orders_exercise(source: str, title: str, folder: Path, steps: int | None) -> Exercise:
    """Returns the order e-mails for a model, and writes them to a file in ``folder``."""
    steps, batch_size = steps or 24, 8
    rows = order_splits(steps * batch_size, HELD_OUT)
    tokenizer = load_tokenizer(source)
    template = None if tokenizer.chat_template else PLAIN
    if template is None and not _takes_system(tokenizer, rows["validation"][0]["messages"]):
        rows = {split: [_without_system(row) for row in rows[split]] for split in rows}
    file = folder / "orders.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(written_rows(rows), encoding="utf-8")
    return Exercise(
        source=source,
        title=title,
        about=f"{title} learns to turn order e-mails into JSON: {len(rows['train'])} e-mails, made "
        f"by a generator with seed {SEEDS['train']}, to learn from; {HELD_OUT} others, of seed "
        f"{SEEDS['validation']}, to be judged by. An answer counts where its JSON is exactly that "
        "of the order.",
        file=file,
        shown=range(min(3, HELD_OUT)),
        answered=range(HELD_OUT),
        new_tokens=NEW_TOKENS,
        steps=steps,
        batch_size=batch_size,
        rates={"qlora": 1e-3, "lora": 1e-3, "full": 1e-4},
        exact=equal_texts,
        template=template,
    )


def _takes_system(tokenizer: Any, messages: list[dict[str, str]]) -> bool:
    """Whether a chat template has a place for the system's turn, and writes it."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (ValueError, TypeError, TemplateError):
        return False
    return messages[0]["content"] in text


def _without_system(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a conversation whose first turn, of the system, is part of the user's."""
    system, user, *rest = row["messages"]
    joined = {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}
    return {"messages": [joined, *rest]}


def check_source(source: str) -> None:
    """Tries the model's configuration before anything else."""
    try:
        engine.load_config(source)
    except LightningPeftError:
        # Of a GGUF file, and says what is wrong with it.
        raise
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"--model {source!r} is not a folder with a transformers model, and the hub did not "
            f"give it ({reason}). Check the name and the network (HF_HUB_OFFLINE must not be set), "
            "or leave --model out for the base that comes with the package."
        ) from error
