"""What a chat begins with, kept while rows are prepared: system prompt and held-out rows."""

import json
from dataclasses import replace

import pytest

from lightning_peft.data.conversations import parse_messages
from lightning_peft.data.image_turns import MARK
from lightning_peft.data.prompts import (
    FILE,
    MAX_ALL_CHARACTERS,
    MAX_CHARACTERS,
    MAX_HELD_OUT,
    MAX_IMAGE_BYTES,
    MAX_SYSTEM_PROMPTS,
    PromptCollector,
    read_prompts,
)
from lightning_peft.data.samples import Sample

SYSTEM = "You turn orders into JSON."


def conversation(*turns, system=SYSTEM):
    first = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    said = [{"role": roles[place % 2], "content": text} for place, text in enumerate(turns)]
    return Sample(messages=[*first, *said])


def kept(folder, prompts):
    prompts.write(folder)
    return read_prompts(folder)


def test_the_most_frequent_system_prompt_of_the_training_rows(tmp_path):
    prompts = PromptCollector()
    for number in range(3):
        prompts.add(conversation(f"two lamps {number}", "{}"), "train")
    prompts.add(conversation("a rare one", "{}", system="Other."), "train")
    prompts.add(conversation("none", "{}", system=""), "train")
    for _ in range(9):
        prompts.add(conversation("not trained on", "{}", system="Other."), "validation")
    assert kept(tmp_path, prompts)["system"] == {"text": SYSTEM, "rows": 3, "of": 5}


def test_rows_are_kept_that_can_be_asked_as_text(tmp_path):
    prompts = PromptCollector()
    prompts.add(conversation("q", "a", "q2"), "validation")
    prompts.add(conversation("q", "x" * (MAX_CHARACTERS + 1)), "validation")
    parts = [{"type": "text", "text": "q"}]
    prompts.add(Sample(messages=[{"role": "user", "content": parts}]), "validation")
    tool = [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "three"}]
    prompts.add(Sample(messages=tool), "validation")
    prompts.add(Sample(text="plain"), "validation")
    assert kept(tmp_path, prompts) is None
    for number in range(5):
        prompts.add(conversation("first", "one", f"second {number}", "two"), "validation")
    found = kept(tmp_path, prompts)
    assert [row[3]["content"] for row in found["held_out"]] == [f"second {n}" for n in range(5)]
    assert [turn["role"] for turn in found["held_out"][0]] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip
    assert found["system"] == {"text": "", "rows": 0, "of": 0}


def test_images_are_kept_with_their_questions(tmp_path):
    prompts = PromptCollector()
    said = [f"{MARK}{MARK}Which?", "The red one.", f"{MARK}And this?", "Blue."]
    prompts.add(replace(conversation(*said, system=""), images=(b"1", b"2", b"3")), "validation")
    # A chat shows the images of a question before its text.
    inside = conversation(f"Before {MARK} after", "x")
    prompts.add(replace(inside, images=(b"1",)), "validation")
    large = conversation(f"{MARK}What?", "x")
    # What is too large is not encoded, which a range could not be.
    prompts.add(replace(large, images=(range(MAX_IMAGE_BYTES),)), "validation")
    alone = conversation(MARK, "A lamp.", system="")
    prompts.add(replace(alone, images=(b"4",)), "validation")
    row, lamp = kept(tmp_path, prompts)["held_out"]
    assert [turn["content"] for turn in row] == ["Which?", "The red one.", "And this?", "Blue."]
    assert [turn.get("images") for turn in row] == [["MQ==", "Mg=="], None, ["Mw=="], None]
    assert lamp[0] == {"role": "user", "content": "", "images": ["NA=="]}


def test_images_of_a_system_turn_are_not_kept_as_a_chat_cannot_show_them(tmp_path):
    prompts = PromptCollector()
    row = replace(conversation("q", "a", system=f"{MARK}Our logo."), images=(b"1",))
    prompts.add(row, "validation")
    for _ in range(2):
        prompts.add(row, "train")
    prompts.add(conversation("q", "a"), "train")
    found = kept(tmp_path, prompts)
    assert found["held_out"] == []
    assert found["system"] == {"text": SYSTEM, "rows": 1, "of": 3}


def test_rows_are_not_kept_whose_answer_is_more_than_its_text(tmp_path):
    """A score of the text alone would be of another answer than the one that was trained."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "c"}}}
    prompts = PromptCollector()
    question = {"role": "user", "content": "Weather?"}
    for answer in (
        {"content": None, "tool_calls": [call]},
        {"content": "Let me look.", "tool_calls": [call]},
        {"content": "Rain.", "reasoning_content": "It is autumn."},
    ):
        row = parse_messages({"messages": [question, {"role": "assistant", **answer}]})
        prompts.add(row, "validation")
    empty = {"role": "assistant", "content": " \n"}
    prompts.add(Sample(messages=[question, empty]), "validation")
    assert kept(tmp_path, prompts) is None
    # Keys without effect.
    plain = {"role": "assistant", "content": "Rain.", "tool_calls": None, "date": "today"}
    prompts.add(Sample(messages=[question, {**plain, "train": True}]), "validation")
    assert kept(tmp_path, prompts)["held_out"] == [
        [question, {"role": "assistant", "content": "Rain."}]
    ]


def test_held_out_rows_are_bounded(tmp_path):
    prompts = PromptCollector()
    for number in range(MAX_HELD_OUT + 5):
        prompts.add(conversation(f"q{number}", "a"), "validation")
    assert len(kept(tmp_path, prompts)["held_out"]) == MAX_HELD_OUT
    prompts = PromptCollector()
    for number in range(MAX_ALL_CHARACTERS // MAX_CHARACTERS + 5):
        prompts.add(conversation("q", "a" * (MAX_CHARACTERS - 500 - number)), "validation")
    found = kept(tmp_path, prompts)["held_out"]
    assert len(found) == MAX_ALL_CHARACTERS // MAX_CHARACTERS
    assert sum(len(turn["content"]) for row in found for turn in row) <= MAX_ALL_CHARACTERS


def test_many_different_system_prompts_take_bounded_memory(tmp_path):
    prompts = PromptCollector()
    for number in range(MAX_SYSTEM_PROMPTS + 50):
        prompts.add(conversation("q", "a", system=f"You are number {number}."), "train")
    assert len(prompts._systems) == MAX_SYSTEM_PROMPTS
    prompts.add(conversation("q", "a", system="You are number 7."), "train")
    found = kept(tmp_path, prompts)["system"]
    assert found == {"text": "You are number 7.", "rows": 2, "of": MAX_SYSTEM_PROMPTS + 51}


@pytest.mark.parametrize("given", [None, "Be brief."])
def test_data_has_its_prompts_and_its_record_no_rows(make, write, given):
    rows = [{"prompt": f"What is {n}?", "completion": f"secret {n}"} for n in range(40)]
    data = make(write(rows), system_prompt=given, validation_share=0.3)
    trained = data.read().summary["splits"]["train"]["rows"]
    found = data.prompts
    assert found["system"] == {"text": given or "", "rows": trained if given else 0, "of": trained}
    held_out = len(data.read().splits["validation"])
    assert [len(row) for row in found["held_out"]] == [3 if given else 2] * held_out
    # In the order in which samples are taken of them.
    first = data.render_row(data.read().splits["validation"][0])
    assert found["held_out"][0][-1]["content"] in "".join(run.text for run in first)
    assert "secret" not in json.dumps(data.record, default=str)
    assert (data.read().folder / FILE).is_file()
    plain = make(write([{"text": f"word {n}"} for n in range(40)], "plain.jsonl"))
    assert plain.prompts is None
