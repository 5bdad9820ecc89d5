"""Tokens that a model has no embedding for are refused before the first step, with their rows."""

from __future__ import annotations

import json

import pytest
import short_runs
from paired import CONFIG
from transformers import AutoTokenizer

from lightning_peft.data.embedding import EmbeddingData
from lightning_peft.data.supervised import SupervisedData
from lightning_peft.demo.run import BASE
from lightning_peft.errors import ConfigError
from lightning_peft.tasks.causal_lm import CausalLM
from lightning_peft.tasks.embedding import SentenceEmbedder

ROWS = [("What is a?", "It is b."), ("What is zip?", "It is a list."), ("And c?", "It is d.")]


@pytest.fixture(scope="module")
def largest():
    """The largest token of the second row, whose word no other row has."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    found = [max(tokenizer("\n".join(row))["input_ids"]) for row in ROWS]
    assert found[1] == max(found)
    assert found.count(found[1]) == 1
    return found[1], tokenizer.convert_ids_to_tokens(found[1])


def rows_in(folder, kind, names, **options):
    splits = ("train", "validation", "train")
    rows = [
        dict(zip((*names, "split"), (*row, splits[i]), strict=True)) for i, row in enumerate(ROWS)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"batch_size": 2, "cache_dir": str(folder / "cache")}
    path = str(folder / "rows.jsonl")
    return short_runs.make(kind, path, str(BASE), **given, **options)


def test_rows_with_tokens_beyond_the_embeddings_are_named(tmp_path, largest):
    token, word = largest
    for size in (token, token + 1):
        data = rows_in(tmp_path, SupervisedData, ("prompt", "completion"), chat_template="plain")
        task = short_runs.make(CausalLM, "tiny", config={**CONFIG, "vocab_size": size})
        run = short_runs.trainer(max_steps=1)
        if size > token:
            run.fit(task, data)
            assert run.global_step == 1
            continue
        with pytest.raises(ConfigError) as caught:
            run.fit(task, data)
        message = str(caught.value)
        assert f"'tiny' has embeddings for the tokens up to {token - 1:,}, and" in message
        assert f"row 2 of 'rows.jsonl': the token {token:,} ({word!r})" in message
        assert message.count("the token ") == 1
        assert run.global_step == 0
        with pytest.raises(ConfigError, match=r"row 2 of 'rows\.jsonl': the token"):
            short_runs.trainer().predict(task, datamodule=data)


def test_padding_and_texts_in_lists_are_looked_at_too(tmp_path, largest):
    token, _ = largest
    data = rows_in(tmp_path, EmbeddingData, ("anchor", "positive"))
    data.tokenizer.add_special_tokens({"pad_token": "<filler>"})
    config = {**short_runs.ENCODER, "vocab_size": token}
    task = short_runs.make(SentenceEmbedder, "tiny", config=config)
    with pytest.raises(ConfigError) as caught:
        short_runs.trainer(max_steps=1).fit(task, data)
    assert f"row 2 of 'rows.jsonl': the token {token:,}" in str(caught.value)
    assert "padding: the token 4,096 ('<filler>')" in str(caught.value)
