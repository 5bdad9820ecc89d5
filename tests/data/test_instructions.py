import json
from pathlib import Path

import pytest
import torch

from lightning_peft.data.encoding import IGNORED
from lightning_peft.data.instructions import InstructionData, encode, read_rows
from lightning_peft.demo.run import BASE, INSTRUCTIONS
from lightning_peft.errors import ConfigError


@pytest.fixture
def data():
    return InstructionData(str(INSTRUCTIONS), str(BASE), batch_size=4, max_length=128)


def test_only_the_response_and_its_end_are_trained(data):
    row = {"prompt": "What does `len` do?", "response": "Return the number of items."}
    example = encode(data.tokenizer, row, 128)
    trained = [token for token in example["labels"] if token != IGNORED]
    assert data.tokenizer.decode(trained[:-1]) == row["response"]
    assert trained[-1] == data.tokenizer.eos_token_id
    start = example["labels"].index(trained[0])
    assert "Return" not in data.tokenizer.decode(example["input_ids"][:start])
    assert example["input_ids"][start:] == trained


def test_a_long_row_is_cut_to_the_limit(data):
    row = {"prompt": "word " * 50, "response": "word " * 50}
    example = encode(data.tokenizer, row, 70)
    assert len(example["input_ids"]) == len(example["labels"]) == 70


def test_splits_do_not_overlap_and_loaders_serve_them(data):
    data.setup("fit")
    train = {tuple(example["input_ids"]) for example in data.splits["train"]}
    held_out = {tuple(example["input_ids"]) for example in data.splits["validation"]}
    assert len(train) > 1000
    assert len(held_out) == 200
    assert not train & held_out
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"].shape == batch["labels"].shape
    assert batch["input_ids"].dtype == torch.int64
    assert len(list(data.loader("train", limit=10))) == 3


def test_every_bad_row_is_named(tmp_path: Path):
    rows = [
        json.dumps({"prompt": "a", "response": "b"}),
        "{not json",
        json.dumps({"prompt": "a"}),
        "",
        json.dumps({"prompt": " ", "response": ""}),
        json.dumps(["a", "b"]),
    ]
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(rows))
    with pytest.raises(ConfigError) as error:
        read_rows(file)
    text = str(error.value)
    assert "row 2 is not JSON" in text
    assert "row 3 has no response" in text
    assert "row 5 has no prompt and no response" in text
    assert "row 6 has no prompt and no response" in text
    assert "row 1" not in text


def test_a_prompt_that_leaves_nothing_to_train_is_refused(tmp_path: Path):
    rows = [{"prompt": "short", "response": "yes"}, {"prompt": "word " * 300, "response": "no"}]
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    data = InstructionData(str(file), str(BASE), max_length=64)
    with pytest.raises(ConfigError, match="example 2: 'word word"):
        data.setup("fit")


def test_other_keys_are_named_or_refused(tmp_path, caplog):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "response": "b", "id": i, "split": "train"} for i in range(3)]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert len(read_rows(file)) == 3
    assert "Keys of 'rows.jsonl' that are not used: 'id' (rows 1-3)." in caplog.text
    rows[1] |= {"weight": 0.5, "system": "s"}
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match=r"row 2 has weight=0.5 .*\n.*row 2 has system, and no"):
        read_rows(file)
