"""Rows for embeddings and rerankers: what is read, what is refused, and what a batch holds."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lightning_peft.data.embedding import EmbeddingData
from lightning_peft.data.reranking import RerankingData
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import detect_layout
from lightning_peft.demo.run import BASE
from lightning_peft.errors import ConfigError
from lightning_peft.sentence_folder import SENTENCES, SentenceFolder, read_sentence_folder

from .conftest import ALL_ROWS, refusal

PAIRS = [{"anchor": f"what is {i}?", "positive": f"it is {i}"} for i in range(6)]
SCORED = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": i / 4} for i in range(5)]
RANKED = [{"query": f"q {i}", "positive": f"p {i}", "negative": f"n {i}"} for i in range(4)]


PACKAGE = "sentence_transformers.models"


@pytest.fixture
def made(build):
    return partial(build, **ALL_ROWS)


@pytest.mark.parametrize(
    ("row", "shape", "sample"),
    [
        (
            {"anchor": "a", "positive": "b"},
            "anchor_positive",
            Sample(text="a", text_pair="b"),
        ),
        (
            {"query": "a", "positive": "b", "negatives": ["c", "d"], "negative_2": "e"},
            "anchor_positive",
            Sample(text="a", text_pair="b", negatives=["c", "d", "e"]),
        ),
        (
            {"query": "a", "passage": "b", "label": 1},
            "scored_pair",
            Sample(text="a", text_pair="b", score=1.0),
        ),
        (
            {"text_a": "a", "text_b": "b", "score": "0.5"},
            "scored_pair",
            Sample(text="a", text_pair="b", score=0.5),
        ),
    ],
)
def test_columns_are_recognised(row, shape, sample):
    layout = detect_layout([row], None, "auto", ("scored_pair", "anchor_positive"))
    assert layout.shape.name == shape
    assert layout.parse(row) == sample
    assert sample.digest() != Sample(text="a", text_pair="b", negatives=["z"]).digest()
    assert sample.prompt_digest() == Sample(text="a", text_pair="z", score=0.0).prompt_digest()


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"question": "q", "answer": "a", "label": 0}, "label"),
        ({"anchor": "q", "positive": "a", "label": 0}, "label"),
        ({"query": "q", "positive": "a", "score": 0.3}, "score"),
        ({"query": "q", "positive": "a", "similarity_score": 1}, "similarity_score"),
    ],
)
def test_a_score_next_to_an_anchor_is_not_dropped(row, name):
    layout = detect_layout([row], None, "auto", ("scored_pair", "anchor_positive"))
    assert layout.shape.name == "anchor_positive"
    ((kind, text),) = layout.parse(row)
    assert kind == "score"
    assert text.startswith(f"has {name}={row[name]}, and every positive is learnt as belonging")
    first, second = list(row)[:2]
    columns = {"text_a": first, "text_b": second}
    scored = detect_layout([row], columns, "auto", ("scored_pair", "anchor_positive")).parse(row)
    assert scored == Sample(text="q", text_pair="a", score=row[name])


def test_two_columns_for_one_text_are_refused():
    accepts = ("scored_pair", "anchor_positive")
    row = {"question": "q", "answer": "a", "document": "d"}
    known = r"has 'document' and 'answer', and each of them may be its positive\. .*\"positive\": "
    with pytest.raises(ConfigError, match=known):
        detect_layout([PAIRS[0], row, row], None, "auto", accepts)
    layout = detect_layout([row], {"positive": "answer"}, "auto", accepts)
    assert layout.parse(row) == Sample(text="q", text_pair="a", unused=("document",))
    scored = {"query": "q", "passage": "p", "document": "d", "score": 1}
    with pytest.raises(ConfigError, match="'passage' and 'document', and each .* its text_b"):
        detect_layout([scored], None, "auto", accepts)
    named = {"anchor": "q", "positive": "p", "document": "d"}
    found = detect_layout([named], None, "auto", accepts).parse(named)
    assert found.text_pair == "p"


def test_a_column_of_a_later_row_is_read_and_an_unknown_one_refused():
    layout = detect_layout([PAIRS[0]], None, "auto", ("anchor_positive",))
    assert layout.parse({**PAIRS[0], "negative_3": "c"}).negatives == ["c"]
    assert layout.parse({**PAIRS[0], "negative_11": "c"}) == [
        (
            "negatives",
            "has the column 'negative_11', and negative, negatives and negative_1 to negative_10 "
            "are read",
        )
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PAIRS[0], "negative": " it is 0 "}, "has its positive among its negatives: 'it is 0'"),
        ({**PAIRS[0], "negative": "what is 0?"}, "has its anchor among its negatives: 'what is"),
        ({**PAIRS[0], "negatives": ["x", 3]}, "has 3 as negatives, not text"),
        ({"anchor": "a", "positive": " "}, "has an empty positive"),
    ],
)
def test_rows_that_contradict_themselves_are_refused(made, write, row, message):
    text = refusal(made(EmbeddingData, write([*PAIRS[1:], row])))
    assert f"row {len(PAIRS)} {message}" in text


def test_a_batch_of_pairs(made, write):
    rows = [*PAIRS[:2], {**PAIRS[2], "negatives": ["other", "it is 0"]}]
    data = made(EmbeddingData, write(rows))
    batch = data.collator()(list(data.rows("train")))
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    texts = [r["anchor"] for r in rows] + [r["positive"] for r in rows] + ["other", "it is 0"]
    expected = tokenizer(texts)["input_ids"]
    for ids, mask, right in zip(batch["input_ids"], batch["attention_mask"], expected, strict=True):
        assert ids[mask.bool()].tolist() == right
    assert batch["rows"].tolist() == [0, 1, 2, 0, 1, 2, 2, 2]
    # The last negative is the first row's positive; nothing else is equal.
    assert batch["digests"][7] == batch["digests"][3]
    assert len(batch["digests"].unique()) == 7
    assert "scores" not in batch
    counts = data.record["splits"]["train"]
    assert (counts["negatives"], counts["repeated_texts"], data.record["shape"]) == (
        *(2, 1),
        "anchor_positive",
    )


def test_a_batch_of_scores(made, write):
    data = made(EmbeddingData, write(SCORED))
    batch = data.collator()(list(data.rows("train")))
    torch.testing.assert_close(batch["scores"], torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    assert batch["rows"].tolist() == [*range(5), *range(5)]
    assert (data.scored, data.score_range) == (True, (0.0, 1.0))


def test_cut_texts_are_the_same_text(made, write):
    rows = [{"anchor": f"{i}", "positive": f"one two three four {i}"} for i in range(2)]
    data = made(EmbeddingData, write(rows), max_length=3, over_long="truncate")
    batch = data.collator()(list(data.rows("train")))
    assert batch["digests"][2] == batch["digests"][3]
    refused = refusal(made(EmbeddingData, write(rows), max_length=3))
    assert "tokens, and 3 are allowed" in refused


def test_nothing_to_learn_is_refused(made, write):
    assert "batch_size=1 leaves each anchor alone" in refusal(
        made(EmbeddingData, write(PAIRS), batch_size=1)
    )
    rows = [{**row, "negative": "no"} for row in PAIRS]
    made(EmbeddingData, write(rows, "n.jsonl"), batch_size=1).setup("fit")
    same = [{**row, "score": 1} for row in SCORED]
    assert "Every score in" in refusal(made(EmbeddingData, write(same, "s.jsonl")))


def test_a_reranker_needs_negatives_and_scores_to_one(made, write):
    text = refusal(made(RerankingData, write([*RANKED, {"query": "q", "positive": "p"}])))
    assert "row 5 has no negative to compare its positive with" in text
    scores = [*SCORED, {**SCORED[0], "sentence2": "z", "score": 3}]
    text = refusal(made(RerankingData, write(scores, "s.jsonl")))
    assert "row 6 has the score 3, not one from 0 to 1" in text


def test_a_batch_of_passages(made, write):
    rows = [{**RANKED[0], "negative_1": "m"}, RANKED[1]]
    data = made(RerankingData, write(rows))
    batch = data.collator()(list(data.rows("train")))
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    pairs = [("q 0", "p 0"), ("q 0", "n 0"), ("q 0", "m"), ("q 1", "p 1"), ("q 1", "n 1")]
    for ids, mask, pair in zip(batch["input_ids"], batch["attention_mask"], pairs, strict=True):
        assert ids[mask.bool()].tolist() == tokenizer(*pair)["input_ids"]
    assert batch["rows"].tolist() == [0, 0, 0, 1, 1]
    assert batch["labels"].tolist() == [1, 0, 0, 1, 0]


@pytest.fixture
def folder(tmp_path):
    """Files of a sentence-transformers model next to the demo's tokenizer."""

    def folder(pooling=None, prompts=None, modules=("Transformer", "Pooling"), **encoder):
        place = tmp_path / "model"
        (place / "1_Pooling").mkdir(parents=True, exist_ok=True)
        AutoTokenizer.from_pretrained(BASE).save_pretrained(place)
        paths = ["", "1_Pooling", "2"]
        listed = [
            {"path": p, "type": m if "." in m else f"{PACKAGE}.{m}"}
            for p, m in zip(paths, modules, strict=False)
        ]
        files = {
            "modules.json": listed,
            "1_Pooling/config.json": pooling or {"pooling_mode_mean_tokens": True},
            "sentence_bert_config.json": {"max_seq_length": 7, **encoder},
            SENTENCES: {"prompts": prompts or {}, "default_prompt_name": None},
        }
        for name, content in files.items():
            (place / name).write_text(json.dumps(content))
        return str(place)

    return folder


def test_prompts_and_lengths_are_those_of_the_files(made, write, folder):
    name = folder(prompts={"query": "ask: ", "passage": "doc: "})
    data = made(EmbeddingData, write(PAIRS), tokenizer=name)
    assert data.max_length == 7
    assert data.record["prompts"] == {"query": "ask: ", "document": "doc: "}
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    row = next(iter(data.rows("train")))
    expected = tokenizer(["ask: " + PAIRS[0]["anchor"], "doc: " + PAIRS[0]["positive"]])
    assert row["texts"] == expected["input_ids"]
    # The digest is that of the text alone: an anchor that is a positive elsewhere is found.
    given = made(EmbeddingData, write(PAIRS), tokenizer=name, query_prompt="", max_length=30)
    assert (given.max_length, given.record["prompts"]["query"]) == (30, "")
    assert next(iter(given.rows("train")))["digests"] == row["digests"]


def test_a_model_without_such_files_has_defaults(tmp_path):
    assert read_sentence_folder(str(tmp_path)) == SentenceFolder()
    for name in ("org/model-GGUF:model.Q4_K_M.gguf", str(tmp_path / "model.gguf")):
        assert read_sentence_folder(name) == SentenceFolder()


def test_an_empty_prompt_is_one_and_scored_texts_are_no_queries(made, write, folder):
    name = folder(prompts={"query": "ask: ", "document": "", "default": "x: "})
    file = Path(name, SENTENCES)
    file.write_text(file.read_text().replace("null", '"default"'))
    assert read_sentence_folder(name).prompt_of("passage") == ""
    data = made(EmbeddingData, write(PAIRS), tokenizer=name)
    assert data.record["prompts"] == {"query": "ask: ", "document": ""}
    scored = made(EmbeddingData, write(SCORED, "scored.jsonl"), tokenizer=name)
    assert scored.record["prompts"] == {}
    given = made(EmbeddingData, scored.hparams["data"], tokenizer=name, query_prompt="q: ")
    assert given.record["prompts"] == {"query": "q: "}


def test_a_tokenizer_may_make_the_lower_case(folder):
    name = folder(do_lower_case=True)
    file = Path(name, "tokenizer.json")
    content = json.loads(file.read_text())
    content["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(content))
    assert read_sentence_folder(name).known


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("mean", False)),
        ({"pooling": {"pooling_mode": "lasttoken"}}, ("lasttoken", False)),
        ({"pooling": {"pooling_mode_cls_token": True}}, ("cls", False)),
        ({"modules": ("Transformer", "Pooling", "Normalize")}, ("mean", True)),
    ],
)
def test_pooling_is_that_of_the_files(folder, options, expected):
    found = read_sentence_folder(folder(**options))
    assert (found.known, found.pooling, found.normalize) == (True, *expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules": ("Transformer", "Pooling", "Dense")}, "lists a Dense, which is neither"),
        (
            {"pooling": {"pooling_mode_max_tokens": True}},
            "pools by max, and one of mean, cls",
        ),
        (
            {"pooling": {"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}},
            "pools by cls and max",
        ),
        ({"pooling": {"include_prompt": False}}, "leaves prompts out of the pooling"),
        ({"do_lower_case": True}, "makes texts lower case"),
        ({"modules": ("own.Transformer", "Pooling")}, "lists own.Transformer, which is code of"),
    ],
)
def test_what_is_not_computed_is_refused(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        read_sentence_folder(folder(**options))
