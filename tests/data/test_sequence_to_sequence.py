"""Pairs of texts: shapes, tokens, ends, lengths, languages, and the batch."""

from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import NllbTokenizer, PreTrainedTokenizerFast

from lightning_peft.data.sequence_to_sequence import Seq2SeqData
from lightning_peft.errors import ConfigError

from .conftest import ALL_ROWS


@pytest.fixture
def make(build):
    return partial(build, Seq2SeqData, **ALL_ROWS)


def pairs(count=4):
    return [{"document": f"A long text {i} " * 3, "summary": f"text {i}"} for i in range(count)]


def stored(data):
    return data.read().splits["train"]


SHAPES = [
    ({"article": "a b", "highlights": "c"}, "source_target"),
    ({"dialogue": "a b", "summary": "c", "id": "7"}, "source_target"),
    ({"prompt": "a b", "completion": "c"}, "prompt_completion"),
    ({"translation": {"en": "a b", "fr": "c", "de": None}}, "translation"),
]


@pytest.mark.parametrize(("row", "shape"), SHAPES)
def test_shapes_are_recognised_and_say_the_same(row, shape, make, write, tokenizer):
    data = make(write([row]), source_language="en", target_language="fr", prefix="say: ")
    found = stored(data)[0]
    assert data.record["shape"] == shape
    assert (found["source"], found["target"]) == ("a b", "c")
    assert found["input_ids"] == tokenizer("say: a b")["input_ids"]
    assert found["labels"] == [*tokenizer("c")["input_ids"], tokenizer.eos_token_id]
    assert found["length"] == len(found["input_ids"])


def test_the_end_is_trained_in_every_row_and_said_to_be_added(make, write):
    counts = make(write(pairs())).record["splits"]["train"]
    assert counts["ends_trained"] == counts["ends_added"] == counts["rows"] == 4
    assert counts["unknown_tokens"] == counts["truncated"] == 0


def test_an_end_that_the_tokenizer_writes_is_not_doubled(make, write, tmp_path):
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}
    backend = Tokenizer(models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    from tokenizers.processors import TemplateProcessing

    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save_pretrained(tmp_path / "words")
    options = {"tokenizer": str(tmp_path / "words"), "max_length": 3, "over_long": "truncate"}
    rows = [{"source": "a b a b", "target": "b a"}, {"source": "a", "target": "a b a"}]
    first, second = stored(make(write(rows), **options))
    # The source keeps its end; a target that is cut gets none, as it does not end there.
    assert first["input_ids"] == [3, 4, 1]
    assert first["labels"] == [4, 3, 1]
    assert (first["tokens_cut"], first["end_added"]) == (2, False)
    assert second["labels"] == [3, 4, 3]
    wrong = make(write([{"source": "a", "target": "b {a} ç"}]), tokenizer=options["tokenizer"])
    with pytest.raises(ConfigError, match=r"row 1 has 3 unknown tokens(.|\n)*'\{', '\}', 'ç'"):
        wrong.setup("fit")
    kept = make(write([{"source": "a", "target": "ç"}]), unknown="keep", **options)
    assert stored(kept)[0]["labels"] == [2, 1]
    assert kept.record["splits"]["train"]["unknown_tokens"] == 1


BAD = [
    ({"source": "a", "target": ""}, "row 1 has an empty target"),
    ({"source": "a " * 300, "target": "b"}, r"row 1 has 30\d tokens as source of 256 allowed"),
    ({"source": "a", "target": "b " * 30}, "as target of 16 allowed .max_target_length"),
    ({"source": "a", "target": "b </s> c"}, "special token '</s>' inside its target"),
    (
        {"prompt": [{"role": "user", "content": "a"}], "completion": "b", "system": "c"},
        "row 1 has the turns system, user, assistant",
    ),
    ({"translation": {"en": "a", "fr": " "}}, "no text in 'fr' as translation"),
    ({"translation": ["a"]}, "as translation, not texts by language"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_rows_with_problems_are_named(row, message, make, write):
    data = make(write([row]), max_target_length=16, source_language="en", target_language="fr")
    with pytest.raises(ConfigError, match=message):
        data.setup("fit")


def test_arguments_that_do_not_fit_are_refused(make, write):
    with pytest.raises(ConfigError, match="one language alone is given"):
        make("rows.jsonl", source_language="en")
    with pytest.raises(ConfigError, match="max_target_length=0 is less than 1"):
        make("rows.jsonl", max_target_length=0)
    rows = write([{"translation": {"en": "a", "fr": "b"}}])
    with pytest.raises(ConfigError, match='such as source_language="en"'):
        make(rows).setup("fit")
    with pytest.raises(ConfigError, match="Plain text are for SupervisedData"):
        make(write([{"text": "a"}], "text.jsonl")).setup("fit")


def test_a_batch_is_padded_on_both_sides_apart(make, write, tokenizer):
    rows = [{"source": "a b c", "target": "d"}, {"source": "e", "target": "f g h i"}]
    data = make(write(rows))
    (batch,) = data.loader("train")
    order = [batch["source"].index(row["source"]) for row in rows]
    first, second = (stored(data)[place] for place in (0, 1))
    width = len(first["input_ids"])
    short = len(second["input_ids"])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, width)
    assert batch["labels"].shape == (2, len(second["labels"]))
    assert batch["input_ids"][order[1]].tolist() == [
        *second["input_ids"],
        *[tokenizer.pad_token_id] * (width - short),
    ]
    assert batch["attention_mask"].sum(1)[order].tolist() == [width, short]
    labels = batch["labels"][order[0]].tolist()
    assert labels[: len(first["labels"])] == first["labels"]
    assert set(labels[len(first["labels"]) :]) == {-100}
    assert [batch["target"][place] for place in order] == ["d", "f g h i"]


@pytest.fixture
def many_languages(tmp_path):
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "▁a": 4, "▁b": 5}
    tokenizer = NllbTokenizer(vocab=vocabulary, merges=[])
    tokenizer.save_pretrained(tmp_path / "nllb")
    return str(tmp_path / "nllb")


def test_tokenizers_for_many_languages_are_set_to_them(make, write, many_languages):
    rows = write([{"translation": {"en": "a", "fr": "b"}}])
    asked = {"source_language": "en", "target_language": "fr", "tokenizer": many_languages}
    codes = {"en": "eng_Latn", "fr": "fra_Latn"}
    data = make(rows, language_codes=codes, unknown="keep", **asked)
    english, french = data.tokenizer.convert_tokens_to_ids(["eng_Latn", "fra_Latn"])
    row = stored(data)[0]
    assert row["input_ids"][0] == english
    assert row["labels"][0] == french
    assert row["labels"][-1] == data.tokenizer.eos_token_id
    assert data.generation == {"forced_bos_token_id": french}
    with pytest.raises(
        ConfigError, match=r"no such language codes: \n  - 'en'; near names: .*\n  - 'fr'"
    ):
        make(rows, **asked).setup("fit")
    with pytest.raises(ConfigError, match="is for many languages"):
        make(rows, tokenizer=many_languages).setup("fit")


def test_the_key_depends_on_what_decides_the_tokens(make, write):
    rows = write(pairs())
    keys = {
        make(rows, **options).record["key"]
        for options in ({}, {"prefix": "x"}, {"max_target_length": 50}, {"unknown": "keep"})
    }
    assert len(keys) == 4
    assert torch.is_tensor(next(iter(make(rows).loader("train")))["labels"])
