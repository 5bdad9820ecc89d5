"""Rows as other programs write them: OpenAI, gpt-oss, TRL, LLaMA-Factory, Mistral, tables."""

import json

import pytest
from datasets import Dataset

from lightning_peft.data.encoding import Encoder
from lightning_peft.data.preference import PreferenceData
from lightning_peft.data.prompts import PromptCollector
from lightning_peft.data.samples import Sample
from lightning_peft.data.templates import find_template
from lightning_peft.data.validation import EncodingProblem

from .conftest import ALL_ROWS
from .test_encoding import HEAD, trained
from .test_row_keys import READS, TALK
from .test_tool_calls import CALL, CALLING, TOOL, checked, encoder, parse

FUNCTION = TOOL["function"]
# As Mistral: calls have ids of nine characters.
IDS = READS.replace(
    "{{- '<call>' +",
    "{%- if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids have nine') }}"
    "{%- endif %}{{- '<call>' + c.id + ",
)
NO_SYSTEM = HEAD.replace("%}[", "%}{% if m['role'] != 'system' %}[") + (
    "{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_row_of_openai_is_read_as_a_whole(tokenizer):
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "call_1", **CALL}],
                "weight": 0,
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
            {"role": "assistant", "content": "Sun.", "weight": 1},
        ],
        "tools": [TOOL],
        "parallel_tool_calls": False,
    }
    text, answers, unused = checked(tokenizer, row)
    assert answers == ["Sun.</s>"]
    assert "Be brief." in text
    assert '<call>weather{"town": "Ulm"}</call></s>' in text
    assert unused == ["messages[].tool_calls[].id", "messages[].tool_call_id"]
    assert parse(row).unused == ("parallel_tool_calls",)


def test_ids_are_used_where_a_template_asks_for_them(tokenizer):
    call = {"id": "abc123xyz", "function": {"name": "weather", "arguments": '{"town": "Ulm"}'}}
    turns = [CALLING[0], {**CALLING[1], "tool_calls": [call]}, *CALLING[2:]]
    _, answers, unused = checked(tokenizer, {"messages": turns, "tools": [TOOL]}, IDS)
    assert answers[0] == '<call>abc123xyzweather{"town": "Ulm"}</call></s>'
    assert unused == []
    with pytest.raises(EncodingProblem, match="ids have nine"):
        checked(tokenizer, {"messages": CALLING, "tools": [TOOL]}, IDS)


def test_thoughts_in_a_channel_of_their_own_belong_to_the_next_answer():
    thought = {"role": "assistant", "channel": "analysis", "content": "Hm."}
    final = {**TALK[1], "channel": "final"}
    assert parse({"messages": [TALK[0], thought, final]}).messages == [
        TALK[0],
        {**final, "reasoning_content": "Hm."},
    ]
    assert parse({"messages": [TALK[0], final, final]}) == [
        ("roles", "has two assistant turns in a row")
    ]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        (
            {"prompt": TALK[:1], "completion": [{**TALK[1], "thinking": "Hm."}]},
            [TALK[0], {**TALK[1], "reasoning_content": "Hm."}],
        ),
        (
            {"question": "a?", "answer": "b.", "reasoning": "Hm."},
            [TALK[0], {**TALK[1], "reasoning_content": "Hm."}],
        ),
        (
            {"instruction": "a?", "output": "b.", "thinking": "Hm.", "system_prompt": "s"},
            [{"role": "system", "content": "s"}, TALK[0], {**TALK[1], "reasoning_content": "Hm."}],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a?", "weight": 0},
                    {"from": "gpt", "value": "x", "weight": 0},
                    {"from": "human", "value": "a?"},
                    {"from": "gpt", "value": "b.", "weight": 1},
                ]
            },
            [TALK[0], {**TALK[1], "content": "x", "train": False}, *TALK],
        ),
    ],
)
def test_other_spellings(row, turns):
    assert parse(row) == Sample(turns)


def test_thoughts_in_a_column_are_refused_where_they_could_be_of_any_turn():
    assert parse({"messages": TALK, "reasoning": "Hm."}) == [
        ("key", "has reasoning next to its turns: put the thoughts into the turn they are of")
    ]


def test_a_preference_gets_its_tools_and_thoughts(build, write, tokenizer):
    answers = {
        "chosen": [{**TALK[1], "reasoning_content": "Hm."}],
        "rejected": [{"role": "assistant", "content": "c.", "id": 7}],
    }
    file = write([{"prompt": TALK[:1], **answers, "tools": [FUNCTION], "margin": 2.0}])
    data = build(PreferenceData, file, **ALL_ROWS, chat_template=READS)
    row = data.read().splits["train"][0]
    chosen = tokenizer.decode(row["chosen_input_ids"])
    assert chosen.startswith("[tools]" + json.dumps(TOOL))
    assert chosen.endswith("<think>Hm.</think>b.</s>")
    assert [key["key"] for key in data.read().summary["keys_unused"]] == ["margin", "messages[].id"]


@pytest.mark.parametrize("suffix", ["parquet", "json"])
def test_a_table_adds_no_keys_to_tools_and_arguments(make, write, tmp_path, suffix):
    other = {"type": "function", "function": {"name": "sum", "parameters": {"of": {"a": 1}}}}
    call = {"type": "function", "function": {"name": "sum", "arguments": {"a": 3}}}
    asks = [{"role": "user", "content": "Sum?"}, {**CALLING[1], "tool_calls": [call]}]
    rows = [{"messages": CALLING, "tools": [TOOL]}, {"messages": asks, "tools": [other]}]
    if suffix == "parquet":
        file = str(tmp_path / "rows.parquet")
        Dataset.from_list(rows).to_parquet(file)
    else:
        file = write([json.dumps(rows)], "rows.json")
    data = make(file, chat_template=READS, validation_share=0.0)
    assert data.read().problems == []
    texts = [data.tokenizer.decode(row["input_ids"]) for row in data.read().splits["train"]]
    # pyarrow 20 writes the keys of a struct in alphabetical order.
    tools = [json.loads(t.removeprefix("[tools]").partition("[user]")[0]) for t in texts]
    assert tools == [TOOL, other]
    assert '<call>weather{"town": "Ulm"}</call>' in texts[0]
    assert '<call>sum{"a": 3}</call>' in texts[1]


def test_a_turn_that_the_template_leaves_out_is_refused(tokenizer):
    turns = [{"role": "system", "content": "Be brief."}, *TALK]
    for template in (NO_SYSTEM, NO_SYSTEM.replace("{{ m['content'] }}", MARKED_CONTENT)):
        with pytest.raises(
            EncodingProblem, match=r"a text in turn 1 \(system\) that the chat"
        ) as e:
            encoder(tokenizer, template).encode(Sample(turns))
        assert e.value.kind == "key"
        assert len(encoder(tokenizer, template).encode(Sample(TALK))) == 1
    # Written in another way is not left out.
    (row,) = encoder(tokenizer, READS.replace("m.content", "m.content | upper")).encode(
        Sample(turns)
    )
    assert trained(tokenizer, row) == ["B.</s>"]


MARKED_CONTENT = (
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
)


def test_a_held_out_row_with_tools_is_not_asked_without_them(tmp_path):
    prompts = PromptCollector()
    prompts.add(Sample(TALK, context={"tools": [TOOL]}), "validation")
    prompts.add(Sample(TALK), "validation")
    prompts.write(tmp_path)
    assert json.loads((tmp_path / "prompts.json").read_text())["held_out"] == [TALK]


def test_a_slow_tokenizer_masks_no_thoughts(tokenizer):
    one = Encoder(tokenizer, find_template(tokenizer, READS), 99, "assistant", "error", "mask")
    one.tokenizer = _Slow(tokenizer)
    turns = [TALK[0], {**TALK[1], "reasoning_content": "Hm."}]
    with pytest.raises(EncodingProblem, match="with a fast tokenizer"):
        one.encode(Sample(turns))


class _Slow:
    """The tokenizer as one without offsets."""

    def __init__(self, tokenizer):
        self.tokenizer, self.is_fast = tokenizer, False

    def __call__(self, *args, **kwargs):
        return self.tokenizer(*args, **kwargs)

    def decode(self, ids):
        return self.tokenizer.decode(ids)
