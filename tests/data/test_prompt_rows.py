"""Prompts for training on rewards: where an answer begins, and the columns that are kept."""

import pytest

from lightning_peft.data.prompt_rows import PromptData
from lightning_peft.errors import ConfigError

from .conftest import TALKS, refusal


@pytest.fixture
def prompts(build, write):
    return lambda rows, **options: build(PromptData, write(rows), **TALKS, **options)


def test_prompts_end_where_the_answer_begins_and_columns_are_kept(prompts):
    turns = [{"role": "user", "content": "And 2?"}]
    rows = [
        {"prompt": "What is 1?", "completion": "It is 1.", "expected": {"a": [1]}, "weight": 0},
        {"prompt": turns, "completion": None, "expected": "", "weight": 2},
    ]
    data = prompts(rows, validation_share=0, system_prompt="Be kind.")
    (batch,) = data.train_dataloader()
    by_number = {row["row"]: row for row in batch["rows"]}
    assert by_number[1]["prompt"] == "What is 1?"
    assert by_number[1]["columns"] == {
        "completion": "It is 1.",
        "expected": {"a": [1]},
        "weight": 0,
    }
    assert by_number[2]["prompt"] == turns
    assert by_number[2]["columns"] == {"completion": None, "expected": "", "weight": 2}
    texts = {
        row["row"]: data.tokenizer.decode(ids[mask.bool()])
        for row, ids, mask in zip(
            batch["rows"], batch["input_ids"], batch["attention_mask"], strict=True
        )
    }
    end = "### Assistant:\n"
    assert texts[1].endswith(f"Be kind.\n\n### User:\nWhat is 1?\n\n{end}")
    assert texts[2].endswith(f"Be kind.\n\n### User:\nAnd 2?\n\n{end}")
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    assert 0 in batch["attention_mask"][:, 0].tolist()


def test_what_cannot_be_answered_is_refused_by_row(prompts):
    answer = {"role": "assistant", "content": "Hello."}
    bad = [
        {"prompt": [{"role": "user", "content": "Hi"}, answer]},
        {"prompt": "word " * 300},
        {"prompt": ""},
    ]
    message = refusal(prompts([{"prompt": f"{i}?"} for i in range(6)] + bad))
    assert "row 7 has a prompt that ends with an answer" in message
    assert "of 256 allowed" in message
    assert "row 9 has an empty prompt" in message


def test_prompts_are_not_cut(prompts):
    with pytest.raises(ConfigError, match="over_long='truncate' would cut the end of a prompt"):
        prompts([{"prompt": "a"}], over_long="truncate")
