"""Thoughts in answers: trained, masked or taken out, as the template writes them."""

import pytest

from lightning_peft.data.encoding import IGNORED, Encoder
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import detect_layout
from lightning_peft.data.templates import find_template
from lightning_peft.data.validation import EncodingProblem

from .test_encoding import HEAD, trained

END = "{{ eos_token if m['role'] == 'assistant' }}\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}[assistant]{% endif %}"
THOUGHT = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}"
# Thoughts of every answer, of the last alone (as Qwen 3), and cut out of the content (as R1).
WRITES = HEAD + THOUGHT + "{{ m['content'] }}" + END + PROMPT
LAST = WRITES.replace("if m.reasoning_content", "if m.reasoning_content and loop.last")
CUTS = WRITES.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
NONE = WRITES.replace(THOUGHT, "")
MARKED = HEAD + (
    "{% if m['role'] == 'assistant' %}{% generation %}"
    + THOUGHT.replace("if m.reasoning_content", "if m.reasoning_content and loop.last")
    + "{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "\n{% endfor %}" + PROMPT
)
KEYED = [
    {"role": "user", "content": "Twice 4?"},
    {"role": "assistant", "content": "It is 8.", "reasoning_content": "4 and 4."},
    {"role": "user", "content": "Twice 5?"},
    {"role": "assistant", "content": "It is 10.", "reasoning_content": "5 and 5."},
]
ONCE = KEYED[:2]
WITH = "<think>\n4 and 4.\n</think>\nIt is 8.</s>"


def encoded(tokenizer, turns, template=WRITES, reasoning="train", loss_on="assistant", **variables):
    found = find_template(tokenizer, template)
    one = Encoder(tokenizer, found, 256, loss_on, "error", reasoning, variables)
    rows = one.encode(Sample(turns))
    return [trained(tokenizer, row) for row in rows], [tokenizer.decode(r.input_ids) for r in rows]


def read(turn):
    row = {"messages": [KEYED[0], {"role": "assistant", "content": "It is 8.", **turn}]}
    parsed = detect_layout([row], None, "auto").parse(row)
    return parsed.messages[1] if isinstance(parsed, Sample) else parsed


@pytest.mark.parametrize(
    "turn",
    [
        *({key: "4 and 4."} for key in ("reasoning_content", "reasoning", "thinking")),
        {"reasoning": "4 and 4.", "reasoning_content": "4 and 4.", "thinking": None},
        {"content": [{"type": "thinking", "thinking": "4 and 4."}, {"text": "It is 8."}]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "4 and 4."}]},
                {"type": "text", "text": "It is 8."},
            ]
        },
    ],
)
def test_thoughts_are_read_from_every_key_and_part(turn):
    assert read(turn) == ONCE[1]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"reasoning": "a", "thinking": "b"}, "several thoughts under several keys: 'a' and 'b'"),
        ({"reasoning": 3}, "has 3 as thoughts, not text"),
        ({"content": [{"text": "It"}, {"type": "thinking", "thinking": "x"}]}, "are not text"),
    ],
)
def test_thoughts_that_cannot_be_read_are_refused(turn, message):
    ((_, text),) = read(turn)
    assert message in text


def test_thoughts_of_other_turns_are_a_key_like_any_other(tokenizer):
    row = {"messages": [{**KEYED[0], "thinking": "Hm."}, {"role": "assistant", "content": "8"}]}
    sample = detect_layout([row], None, "auto").parse(row)
    assert sample.messages[0] == {**KEYED[0], "thinking": "Hm."}
    one = Encoder(tokenizer, find_template(tokenizer, NONE), 256, "assistant", "error")
    assert one.unused(sample) == ["messages[].thinking"]
    part = {"role": "user", "content": [{"type": "thinking", "thinking": "x"}, {"text": "y"}]}
    ((kind, text),) = detect_layout([row], None, "auto").parse(
        {"messages": [part, *row["messages"][1:]]}
    )
    assert (kind, "(user) has thoughts as a part" in text) == ("thoughts", True)


@pytest.mark.parametrize("template", [WRITES, LAST, CUTS, MARKED])
def test_thoughts_are_trained_masked_or_taken_out(tokenizer, template):
    assert encoded(tokenizer, ONCE, template)[0] == [[WITH]]
    ((first, second),), (text,) = encoded(tokenizer, ONCE, template, "mask")
    # The marks are learnt, so that thoughts begin and end.
    assert first + second in (
        "<think>\n</think>\nIt is 8.</s>",
        "<think>\n\n</think>\nIt is 8.</s>",
        "<think></think>\nIt is 8.</s>",
    )
    assert WITH in text
    assert encoded(tokenizer, ONCE, template, "strip")[0] == [["It is 8.</s>"]]


@pytest.mark.parametrize("opening", ["<think>\n", "", "<thinking>", "[THINK]"])
def test_thoughts_inside_the_content(tokenizer, opening):
    closing = "[/THINK]" if "[" in opening else "</thinking>" if "ing" in opening else "</think>"
    turns = [ONCE[0], {"role": "assistant", "content": f"{opening}4 and 4.{closing} It is 8."}]
    whole = f"{opening}4 and 4.{closing} It is 8.</s>"
    assert encoded(tokenizer, turns, NONE)[0] == [[whole]]
    (runs,), (text,) = encoded(tokenizer, turns, NONE, "mask")
    assert "and" not in "".join(runs)
    assert runs[-1].endswith("It is 8.</s>")
    assert whole in text
    assert encoded(tokenizer, turns, NONE, "strip")[0] == [["It is 8.</s>"]]


def test_thoughts_that_the_template_does_not_write_are_refused(tokenizer):
    inside = [ONCE[0], {"role": "assistant", "content": "<think>4 and 4.</think>It is 8."}]
    for turns, template in ((ONCE, NONE), (inside, CUTS)):
        for reasoning in ("train", "mask"):
            with pytest.raises(EncodingProblem, match="thoughts in turn 2 that the chat temp") as e:
                encoded(tokenizer, turns, template, reasoning)
            assert e.value.kind == "thoughts"
        assert encoded(tokenizer, turns, template, "strip")[0] == [["It is 8.</s>"]]


@pytest.mark.parametrize("template", [LAST, MARKED])
def test_earlier_thoughts_are_learnt_where_they_are_generated(tokenizer, template):
    runs, texts = encoded(tokenizer, KEYED, template)
    assert runs == [[WITH], ["<think>\n5 and 5.\n</think>\nIt is 10.</s>"]]
    # The second answer is generated without the thoughts before the first in its prompt.
    assert ["4 and 4." in text for text in texts] == [True, False]
    assert encoded(tokenizer, KEYED, template, loss_on="completion")[0] == runs[1:]
    assert encoded(tokenizer, KEYED, template, "strip")[0] == [["It is 8.</s>", "It is 10.</s>"]]
    # Where thoughts stay, one text has both.
    assert encoded(tokenizer, KEYED, WRITES)[0] == [[runs[0][0], runs[1][0]]]


def test_thoughts_of_a_turn_that_is_not_trained_need_not_be_written(tokenizer):
    turns = [KEYED[0], {**KEYED[1], "train": False}, *KEYED[2:]]
    assert encoded(tokenizer, turns, LAST)[0] == [["<think>\n5 and 5.\n</think>\nIt is 10.</s>"]]


def test_a_prompt_that_opens_the_thoughts(tokenizer):
    # As Qwen's thinking models: the mark is in the prompt, and the template writes it.
    opens = WRITES.replace("[assistant]{% endif %}", "[assistant]<think>\n{% endif %}")
    assert encoded(tokenizer, ONCE, opens)[0] == [["4 and 4.\n</think>\nIt is 8.</s>"]]
    (runs,), _ = encoded(tokenizer, ONCE, opens, "mask")
    assert "".join(runs).lstrip() == "</think>\nIt is 8.</s>"


def test_a_switch_of_the_template_is_followed(tokenizer):
    off = WRITES.replace(
        "[assistant]{% endif %}",
        "[assistant]{% if enable_thinking is defined and not enable_thinking %}"
        "<think>\n\n</think>\n{% endif %}{% endif %}",
    ).replace("{% endfor %}", "{% endfor %}", 1)
    plain = [ONCE[0], {"role": "assistant", "content": "<think>\n\n</think>\nIt is 8."}]
    runs, texts = encoded(tokenizer, plain, off, enable_thinking=False)
    assert runs == [["It is 8.</s>"]]
    assert "[assistant]<think>\n\n</think>\nIt is 8." in texts[0]


def test_a_masked_thought_keeps_its_tokens(tokenizer):
    found = find_template(tokenizer, WRITES)
    (row,) = Encoder(tokenizer, found, 256, "assistant", "error", "mask").encode(Sample(ONCE))
    (full,) = Encoder(tokenizer, found, 256, "assistant", "error").encode(Sample(ONCE))
    assert row.input_ids == full.input_ids
    differs = [i for i, label in enumerate(row.labels) if label != full.labels[i]]
    assert all(row.labels[i] == IGNORED for i in differs)
    assert "4 and 4." in tokenizer.decode([row.input_ids[i] for i in differs])
