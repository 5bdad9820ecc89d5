"""Words with tags: which token carries which, what is cut, and what is refused."""

from functools import partial

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoTokenizer, PythonBackend

from lightning_peft.data.encoding import IGNORED
from lightning_peft.data.token_classification import (
    TokenClassificationData,
    collate_tags,
    words_of_tokens,
)
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import ConfigError

from .conftest import ALL_ROWS, refusal

# Of the tokenizer ``bert``: ``abc`` is a ##b ##c.
WORDS = ["abc", "a", "fbc"]
TAGS = ["B-X", "O", "I-X"]
PAD, UNKNOWN, CLS, SEP, A, B, F, _B, _C = range(9)


@pytest.fixture
def tagged(build):
    return partial(build, TokenClassificationData, **ALL_ROWS)


def batch_of(data):
    return data.collator()(list(data.rows("train")))


def test_the_first_token_of_a_word_carries_its_tag(tagged, write, bert):
    path = write([{"tokens": WORDS, "tags": TAGS}, {"tokens": ["b"], "tags": ["O"]}])
    data = tagged(path, tokenizer=bert)
    assert data.labels == ["B-X", "I-X", "O"]
    batch, no = batch_of(data), IGNORED
    assert batch["input_ids"].tolist() == [
        [CLS, A, _B, _C, A, F, _B, _C, SEP],
        [CLS, B, SEP, *[PAD] * 6],
    ]
    assert batch["labels"].tolist() == [
        [no, 0, no, no, 2, 1, no, no, no],
        [no, 2, *[no] * 7],
    ]
    assert batch["word_starts"].tolist() == [[0, 1, 0, 0, 1, 1, 0, 0, 0], [0, 1, *[0] * 7]]
    assert batch["attention_mask"].sum(1).tolist() == [9, 3]
    assert batch["words"] == [WORDS, ["b"]]
    assert data.record["classes"] == {"train": {"B-X": 1, "I-X": 1, "O": 2}}
    assert data.record["splits"]["train"]["words"] == 4


@pytest.mark.parametrize("own", [["O", "person"], ["0", "1"]])
def test_labels_may_give_other_names_to_the_numbers_of_classes(own, tagged, bert, tmp_path):
    names = {"O": own[0], "B-PER": own[1]}
    tags = List(ClassLabel(names=list(names)))
    features = Features({"tokens": List(Value("string")), "tags": tags})
    rows = [{"tokens": WORDS[:2], "tags": [1, 0]}, {"tokens": WORDS[1:], "tags": [0, 1]}]
    path = str(tmp_path / "a.parquet")
    Dataset.from_list(rows, features=features).to_parquet(path)
    data = tagged(path, tokenizer=bert, labels=own)
    assert data.labels == own
    assert data.read().splits["train"]["tags"][0] == [own[1], own[0]]
    with pytest.raises(ConfigError, match="has the tag 'B-PER'"):
        # In another order, a number would be another class.
        tagged(path, tokenizer=bert, labels=["person", "O"]).setup("fit")


def test_all_tokens_carry_tags_if_asked(tagged, write, bert):
    path = write([{"tokens": WORDS, "tags": TAGS}])
    batch = batch_of(tagged(path, tokenizer=bert, label_all_subwords=True))
    no = IGNORED
    # What follows on a B is inside the span that it begins.
    assert batch["labels"].tolist() == [[no, 0, 1, 1, 2, 1, 1, 1, no]]
    assert batch["word_starts"].tolist() == [[0, 1, 0, 0, 1, 1, 0, 0, 0]]
    # Without such a tag there is nothing else to say.
    path = write([{"tokens": WORDS, "tags": ["B-X", "O", "O"]}], "other.jsonl")
    batch = batch_of(tagged(path, tokenizer=bert, label_all_subwords=True))
    assert batch["labels"].tolist() == [[no, 0, 0, 0, 1, 1, 1, 1, no]]


def test_words_are_found_as_transformers_finds_them(bert):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    found = tokenizer(" ".join(WORDS), return_offsets_mapping=True)
    theirs = tokenizer(WORDS, is_split_into_words=True)
    assert found["input_ids"] == theirs["input_ids"]
    ours = words_of_tokens(WORDS, found["offset_mapping"], found.sequence_ids(0))
    assert ours == [-1 if word is None else word for word in theirs.word_ids()]


def test_words_are_read_as_running_text(tagged, write, tokenizer):
    words = ["What", "does", "`collections.abc`", "do", "?"]
    data = tagged(write([{"tokens": words, "tags": ["O", "O", "B-X", "O", "O"]}]))
    batch = batch_of(data)
    assert batch["input_ids"][0].tolist() == tokenizer(" ".join(words))["input_ids"]
    starts = batch["word_starts"][0].nonzero()[:, 0].tolist()
    firsts = tokenizer.convert_ids_to_tokens(batch["input_ids"][0][starts])
    assert [token.removeprefix("Ġ")[0] for token in firsts] == [word[0] for word in words]
    # Before "?" the blank is a token of its own, which carries no tag.
    assert firsts[1:4] == ["Ġdoes", "Ġ`", "Ġdo"]
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())[-2:] == ["Ġ", "?"]


def test_tokens_of_blanks_have_no_word_and_tokens_of_two_words_are_refused():
    words = ["ab", "c"]
    assert words_of_tokens(words, [(0, 0), (0, 2), (2, 3), (3, 4)], [None, 0, 0, 0]) == [
        -1, 0, -1, 1,
    ]  # fmt: skip
    assert words_of_tokens(words, [(0, 2), (2, 4)], [0, 0]) == [0, 1]
    with pytest.raises(EncodingProblem, match="'ab' and 'c' in one token 'b c'"):
        words_of_tokens(words, [(0, 1), (1, 4)], [0, 0])


def test_a_blank_between_the_tokens_of_a_word_does_not_begin_it_again():
    row = {
        "input_ids": [5, 6, 7, 8],
        "token_type_ids": [],
        "word_of": [0, -1, 0, 1],
        "words": ["a b", "c"],
        "tags": ["B-X", "O"],
    }
    batch = collate_tags([row], pad_token_id=0, numbers={"B-X": 0, "O": 1}, all_subwords=False)
    assert batch["word_starts"].tolist() == [[1, 0, 0, 1]]
    assert batch["labels"].tolist() == [[0, IGNORED, IGNORED, 1]]


def test_what_is_cut_is_counted_in_tokens_and_words(tagged, write, bert):
    path = write([{"tokens": WORDS, "tags": TAGS}, {"tokens": ["b", "a"], "tags": ["O", "B-X"]}])
    with pytest.raises(ConfigError, match="row 1 has 9 tokens, and 6 are allowed"):
        tagged(path, tokenizer=bert, max_length=6).setup("fit")
    data = tagged(path, tokenizer=bert, max_length=6, over_long="truncate")
    row = data.read().splits["train"][0]
    assert row["input_ids"] == [CLS, A, _B, _C, A, SEP]
    assert (row["words"], row["tags"]) == (WORDS[:2], TAGS[:2])
    train = data.record["splits"]["train"]
    assert (train["truncated"], train["tokens_cut"], train["words_cut"]) == (1, 3, 1)
    # Within a word: its first token is there.
    row = tagged(path, tokenizer=bert, max_length=7, over_long="truncate").read()
    assert row.splits["train"][0]["words"] == WORDS
    assert row.splits["train"][0]["input_ids"] == [CLS, A, _B, _C, A, F, SEP]
    with pytest.raises(ConfigError, match="row 1 has 9 tokens, and 2 are allowed"):
        tagged(path, tokenizer=bert, max_length=2, over_long="truncate").setup("fit")


def test_bad_rows_are_all_reported(tagged, write, bert):
    rows = [
        {"tokens": ["a", "b"], "tags": ["O", "B-X"]},
        {"tokens": ["a", "b"], "tags": ["O"]},
        {"tokens": ["a", "\u200b"], "tags": ["O", "O"]},
        {"tokens": ["a", "[SEP]"], "tags": ["O", "O"]},
        {"tokens": ["f"], "tags": ["b-X"]},
        {"tokens": [], "tags": []},
    ]
    errors = refusal(tagged(write(rows), tokenizer=bert, labels=["O", "B-X"]))
    assert "5 of 6 rows cannot be used" in errors
    for text in (
        "row 2 has 2 tokens and 1 tags",
        "row 3 has the word '\\u200b' as number 1, of which the tokenizer makes no token",
        "row 4 has the special token '[SEP]' inside its text",
        "row 5 has the tag 'b-X', which is none of the 2 that are given; near names: B-X",
        "row 6 has empty tokens",
    ):
        assert text in errors


def test_numbers_of_tags_stand_for_given_names(tagged, write):
    data = tagged(write([{"tokens": ["a", "b"], "ner_tags": [1, 0]}]), labels=["O", "B-X"])
    assert data.read().splits["train"]["tags"] == [["B-X", "O"]]


class Slow(PythonBackend):
    """A tokenizer that does not say where its tokens are."""

    vocab_size = 2

    def get_vocab(self):
        return {"a": 0, "b": 1}

    def _tokenize(self, text, **options):
        return list(text)

    def _convert_token_to_id(self, token):
        return 0

    def _convert_id_to_token(self, index):
        return "a"


def test_a_slow_tokenizer_is_refused(tagged, write):
    data = tagged(write([{"tokens": ["a", "b"], "tags": ["O", "B-X"]}]), max_length=4)
    data._tokenizer = Slow()
    with pytest.raises(
        ConfigError, match=r"is a slow one \(Slow\), .* Use a model that has a fast"
    ):
        data.setup("fit")


def test_batches_are_int64(tagged, write):
    batch = batch_of(tagged(write([{"tokens": ["a", "b"], "tags": ["O", "B-X"]}])))
    words = batch.pop("words")
    assert words == [["a", "b"]]
    assert all(value.dtype == torch.int64 for value in batch.values())
