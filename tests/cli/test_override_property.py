"""A misspelled override is answered with the one that was meant, wherever it stands."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from properties import few_and_many

from lightning_peft.cli.described_data import described_data
from lightning_peft.errors import LightningPeftError

KEYS = [
    "--data.init_args.batch_size=2",
    "--data.init_args.max_length=32",
    "--data.init_args.validation_share=0.2",
    "--data.init_args.skip_bad_rows=true",
    "--model.init_args.learning_rate=0.001",
    "--model.init_args.weight_decay=0.0",
    "--trainer.max_epochs=1",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.gradient_clip_val=1.0",
    "--trainer.strategy.init_args.lora_alpha=8",
    "--trainer.strategy.init_args.target_modules=all-linear",
]


@st.composite
def typos(draw):
    """Draws a name, and its override with one letter dropped, doubled or moved."""
    option = draw(st.sampled_from(KEYS))
    path, equals, value = option.partition("=")
    above, dot, name = path.rpartition(".")
    place = draw(st.integers(1, len(name) - 2))
    wrong = {
        "dropped": name[:place] + name[place + 1 :],
        "doubled": name[: place + 1] + name[place:],
        "moved": name[:place] + name[place + 1] + name[place] + name[place + 2 :],
    }[draw(st.sampled_from(["dropped", "doubled", "moved"]))]
    assume(wrong != name)
    return name, f"{above}{dot}{wrong}{equals}{value}"


@few_and_many(4)
@given(typos())
def test_a_misspelled_override_is_answered_with_the_nearest(drawn):
    name, option = drawn
    with pytest.raises(LightningPeftError) as caught:
        described_data(["sft-qlora"], ["--data.init_args.data=rows.jsonl", option])
    text = str(caught.value)
    assert re.search(rf"near names: .*\b{name}\b", text), text
    assert "jsonargparse" not in text
