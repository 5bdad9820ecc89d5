"""Pairs of answers: what is trained, what is refused, and how a batch is made of them."""

import pytest

from lightning_peft.data.encoding import IGNORED
from lightning_peft.data.preference import PreferenceData, collate
from lightning_peft.errors import ConfigError

from .conftest import TALKS, refusal

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
# The answer decides how the turns before it are written.
REWRITES = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% if 'short' in messages[-1]['content'] %}-{% endif %}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.fixture
def pairs(build, write):
    return lambda rows, **options: build(PreferenceData, write(rows), **{**TALKS, **options})


def rows(count):
    return [
        {"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No " + "idea " * i + "!"}
        for i in range(1, count + 1)
    ]


def said(data, row, answer):
    """Returns the trained text of an answer, and the text before it."""
    ids, labels = row[f"{answer}_input_ids"], row[f"{answer}_labels"]
    first = next(place for place, label in enumerate(labels) if label != IGNORED)
    assert labels[first:] == ids[first:]
    return data.tokenizer.decode(ids[first:]), data.tokenizer.decode(ids[:first])


def test_answers_are_trained_and_the_prompt_is_not(pairs):
    data = pairs(rows(12), validation_share=0, system_prompt="Be kind.")
    found = data.read().splits["train"]
    assert len(found) == 12
    for row in found:
        chosen, prompt = said(data, row, "chosen")
        rejected, same = said(data, row, "rejected")
        assert chosen == f"It is {row['row']}.</s>"
        assert rejected == "No " + "idea " * row["row"] + "!</s>"
        assert prompt == same
        assert "Be kind." in prompt
        assert f"What is {row['row']}?" in prompt
        assert row["length"] == max(len(row["chosen_labels"]), len(row["rejected_labels"]))
    counts = data.read().summary["splits"]["train"]
    assert counts["ends_trained"] == 24
    assert data.read().lengths("train") == found["length"]


def test_a_whole_conversation_is_the_same_as_prompt_and_answers(pairs, tmp_path):
    turns = rows(10)
    whole = [
        {
            answer: [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row[answer]},
            ]
            for answer in ("chosen", "rejected")
        }
        for row in turns
    ]
    ids = [
        pairs(given, validation_share=0).read().splits["train"].to_list()
        for given in (turns, whole)
    ]
    assert ids[0] == ids[1]


def test_a_batch_is_the_chosen_rows_and_then_the_rejected_ones(pairs):
    data = pairs(rows(12), validation_share=0, length_grouping=True)
    for batch in data.train_dataloader():
        ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
        assert ids.shape == mask.shape == labels.shape
        assert len(ids) == 8
        texts = [data.tokenizer.decode(i[m == 1]) for i, m in zip(ids, mask, strict=True)]
        for chosen, rejected in zip(texts[:4], texts[4:], strict=True):
            assert "It is" in chosen
            assert "idea" in rejected
            assert chosen.partition("Assistant")[0] == rejected.partition("Assistant")[0]
        assert ((labels != IGNORED) <= (mask == 1)).all()


def test_one_row_in_a_batch():
    row = {"chosen_input_ids": [1, 5, 2], "chosen_labels": [-100, 5, 2]}
    row |= {"rejected_input_ids": [1, 2], "rejected_labels": [-100, 2]}
    batch = {name: tensor.tolist() for name, tensor in collate([row], pad_token_id=9).items()}
    assert batch == {
        "input_ids": [[1, 5, 2], [1, 2, 9]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, 5, 2], [-100, 2, -100]],
    }


def test_all_problems_are_reported_by_row(pairs):
    bad = [
        {"prompt": "A?", "chosen": "Yes.", "rejected": "Yes."},
        {"prompt": "B?", "chosen": "Yes.", "rejected": ""},
        {"chosen": "Yes.", "rejected": "No."},
        {"prompt": "C?", "chosen": "a " * 300, "rejected": "b " * 400},
        {"chosen": CHAT, "rejected": [{"role": "user", "content": "Ho"}, CHAT[1]]},
        {"prompt": "D?", "chosen": "Yes</s>.", "rejected": "No."},
    ]
    errors = refusal(pairs([*rows(8), *bad]))
    assert "6 of 14 rows cannot be used" in errors
    assert "row 9 has the same text as chosen and rejected" in errors
    assert "row 10 has an empty rejected" in errors
    assert "row 11 has no prompt" in errors
    assert "of 256 allowed (chosen answer); has " in errors
    assert "of 256 allowed (rejected answer)" in errors
    assert "row 13 has different turns before the last" in errors
    assert "row 14 has the special token '</s>'" in errors


@pytest.mark.parametrize(
    ("length", "problem"),
    [(40, "row 9 has two answers of the same tokens after cutting"), (18, "none of its answer")],
)
def test_problems_of_truncation_are_reported(length, problem, pairs):
    same = "one two three four five six seven eight nine ten " * 4
    row = {"prompt": "Count with me, please.", "chosen": same + "yes", "rejected": same + "no"}
    data = pairs([*rows(8), row], max_length=length, over_long="truncate")
    with pytest.raises(ConfigError, match=problem):
        data.setup("fit")


def test_a_prompt_that_depends_on_the_answer_is_refused(pairs):
    row = {"prompt": "Explain.", "chosen": "A long text.", "rejected": "A short one."}
    data = pairs([*rows(8), row], chat_template=REWRITES)
    with pytest.raises(ConfigError, match="row 9 has another prompt in front of its chosen"):
        data.setup("fit")


def test_other_shapes_are_refused(pairs):
    data = pairs([{"prompt": "A?", "completion": "Yes."}])
    with pytest.raises(ConfigError, match="are for SupervisedData"):
        data.setup("fit")
