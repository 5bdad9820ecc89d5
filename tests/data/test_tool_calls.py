"""Tools, tool calls, weights of turns, and variables of templates."""

import json
from dataclasses import replace

import pytest

from lightning_peft.data.encoding import Encoder
from lightning_peft.data.samples import RowProblems, Sample
from lightning_peft.data.shapes import detect_layout
from lightning_peft.data.template_context import read_tools
from lightning_peft.data.templates import find_template
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import ConfigError

from .test_encoding import trained
from .test_row_keys import READS, TALK, talk

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
OTHER = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Ulm"}}}
CALLING = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sun"},
    {"role": "assistant", "content": "Sun."},
]
ROW = {"messages": CALLING, "tools": [TOOL]}
# Write calls in other ways: by JSON text alone, as Python, without names, without arguments.
AS_TEXT = READS.replace("(c.function.arguments | tojson)", "c.function.arguments")
AS_PYTHON = AS_TEXT.replace("'<call>' + c.function.name + ", "'<call>' ~ c.function.name ~ ")
AS_PYTHON = AS_PYTHON.replace("arguments + '</call>'", "arguments ~ '</call>'")
NO_NAMES = READS.replace("c.function.name + ", "")
NO_CALLS = READS.replace("m.tool_calls or []", "[]")
NO_TOOLS = READS.replace("{%- if tools %}", "{%- if false %}")
NO_PARAMETERS = READS.replace("t | tojson", "t.function.name")
NO_STRICT = READS.replace("t | tojson", "[t.function.name, t.function.parameters] | tojson")


def parse(row, variables=frozenset()):
    return replace(detect_layout([row], None, "auto"), variables=variables).parse(row)


def encoder(tokenizer, template=READS, **options):
    found = find_template(tokenizer, template)
    return Encoder(tokenizer, found, 256, "assistant", "error", **options)


def checked(tokenizer, row, template=READS, **options):
    """Returns the text of a row, what of it is trained, and the keys that are not used."""
    one = encoder(tokenizer, template, **options)
    sample = parse(row, one.variables)
    assert isinstance(sample, Sample), sample
    unused = one.unused(sample)
    (encoded,) = one.encode(sample)
    return tokenizer.decode(encoded.input_ids), trained(tokenizer, encoded), unused


def asked(**keys):
    return {"messages": [{**TALK[0], **keys}, TALK[1]]}


@pytest.mark.parametrize(
    "given",
    [
        [TOOL],
        TOOL,
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        [TOOL["function"]],
        [{"type": "function", **TOOL["function"]}],
    ],
)
def test_tools_are_read_in_every_spelling(given):
    assert read_tools(given, "tools") == [TOOL]
    assert parse({"messages": TALK, "functions": given}).context == {"tools": [TOOL]}


def test_tools_of_other_types_stay_and_others_are_refused():
    assert read_tools([{"type": "web_search"}], "tools") == [{"type": "web_search"}]
    assert read_tools("[]", "tools") == read_tools(None, "tools") == []
    with pytest.raises(RowProblems) as error:
        read_tools(["weather", {}, TOOL], "tools")
    assert [text for _, text in error.value.problems] == [
        "has 'weather' as tool 1, not an object",
        "has {} as tool 2, not an object",
    ]


@pytest.mark.parametrize(
    "turn",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([CALL])},
        {
            "tool_calls": [
                {**CALL, "function": {**CALL["function"], "arguments": '{"town": "Ulm"}'}}
            ]
        },
        {"tool_calls": [CALL["function"]]},
        {"tool_calls": [{"name": "weather", "parameters": {"town": "Ulm"}}]},
        {"function_call": {"name": "weather", "arguments": '{"town":"Ulm"}'}},
    ],
)
def test_calls_are_read_in_every_spelling(turn):
    row = {"messages": [CALLING[0], {"role": "assistant", "content": None, **turn}, *CALLING[2:]]}
    assert parse(row).messages == CALLING


def test_calls_of_sharegpt_are_read():
    said = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "sun"},
        {"from": "gpt", "value": "Sun."},
    ]
    assert parse({"conversations": said, "tools": json.dumps([TOOL["function"]])}) == Sample(
        CALLING, context={"tools": [TOOL]}
    )


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ("soon", "has 'soon' as tool_calls, not a list"),
        ([{"id": 1}], "(1) without the name of a function"),
        ([{"name": "f", "arguments": "{'a': 1}"}], "(1) whose arguments are not a JSON object"),
        ([{"name": "f", "arguments": [1]}], "(1) whose arguments are not a JSON object: [1]"),
    ],
)
def test_calls_that_cannot_be_read_are_refused(calls, message):
    turns = [CALLING[0], {"role": "assistant", "content": "", "tool_calls": calls}]
    ((kind, text),) = parse({"messages": turns})
    assert kind == "tools"
    assert message in text


@pytest.mark.parametrize("template", [READS, AS_TEXT, AS_PYTHON])
def test_tools_and_calls_reach_the_text(tokenizer, template):
    text, answers, unused = checked(tokenizer, ROW, template)
    assert text.startswith("[tools]" + json.dumps(TOOL))
    assert answers == ['<call>weather{"town": "Ulm"}</call></s>', "Sun.</s>"]
    assert unused == []


def test_the_prompt_is_the_one_that_the_model_is_asked_with(tokenizer):
    one = encoder(tokenizer, variables={"style": "loud"})
    (row,) = one.encode(Sample(CALLING[:1] + CALLING[3:], context={"tools": [TOOL]}))
    prompt = tokenizer.apply_chat_template(
        CALLING[:1],
        tools=[TOOL],
        chat_template=READS,
        add_generation_prompt=True,
        return_dict=False,
        style="loud",
    )
    assert row.input_ids[: len(prompt)] == prompt
    assert row.labels[len(prompt) :] == row.input_ids[len(prompt) :]


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (NO_TOOLS, ROW, "has tools: the chat template given as chat_template writes none of it"),
        (NO_CALLS, ROW, r"has tool_calls=\[.* in turn 2"),
        (NO_NAMES, {**ROW, "tools": [TOOL, OTHER]}, r"tool_calls\[\].function.name in turn 2"),
        (NO_PARAMETERS, ROW, r"has tools\[\].function.parameters of its tools"),
        (READS, {**ROW, "documents": [{"text": "x"}]}, "has documents: the chat template"),
        (
            READS,
            {**ROW, "chat_template_kwargs": {"stile": "loud"}},
            "has stile='loud' in chat_template_kwargs; near names: style",
        ),
        (READS, {"messages": talk(refusal="No.")}, "has refusal='No.' in turn 2: the chat"),
        (READS, {"messages": talk(images=["a.png"])}, r"has images=\['a.png'\] in turn 2"),
        (READS, {"messages": talk(train_detail=[{"a": 1}])}, "has train_detail="),
        (READS, {"messages": talk(channel="analysis")}, "has channel='analysis' in turn 2"),
        (READS, {"messages": talk(wieght=0)}, r"wieght=0 in turn 2 \(nearest key .* 'weight'\)"),
        (READS, {"messages": talk(Thinking="x")}, r"nearest key that is read: 'thinking'"),
    ],
)
def test_what_the_template_does_not_write_is_refused(tokenizer, template, row, message):
    with pytest.raises(EncodingProblem, match=message) as error:
        checked(tokenizer, row, template)
    assert error.value.kind == "key"


@pytest.mark.parametrize(
    ("template", "row", "unused"),
    [
        (NO_NAMES, ROW, []),
        (READS, {"messages": talk(channel="final", end_turn=True)}, ["channel", "end_turn"]),
        (READS, asked(name="Ada", date="today"), ["date"]),
        (READS.replace("m.name", "m.date"), asked(name="Ada", date="x"), ["name"]),
        (
            READS,
            {**ROW, "messages": [CALLING[0], {**CALLING[1], "tool_calls": [{**CALL, "id": "1"}]}]},
            ["tool_calls[].id"],
        ),
    ],
)
def test_what_changes_nothing_is_named(tokenizer, template, row, unused):
    assert checked(tokenizer, row, template)[2] == [f"messages[].{key}" for key in unused]


def test_keys_of_tools_that_are_not_written_are_named(tokenizer):
    tool = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    row = {**ROW, "tools": [tool]}
    assert checked(tokenizer, row, NO_STRICT)[2] == ["tools[].function.strict"]
    assert checked(tokenizer, row)[2] == []


def test_variables_come_from_the_row_or_from_the_argument(tokenizer):
    text = checked(tokenizer, {"messages": TALK}, variables={"style": "loud"})[0]
    assert text.startswith("[loud]")
    for row in ({"style": "low"}, {"chat_template_kwargs": {"style": "low"}}):
        row = {"messages": TALK, **row}
        assert checked(tokenizer, row, variables={"style": "loud"})[0].startswith("[low]")
    # What it is anyway need not be left out.
    assert checked(tokenizer, {"messages": TALK, "chat_template_kwargs": {"style": ""}})[2] == []
    with pytest.raises(ConfigError, match=r"no variable 'stile'; near names: style.* It has style"):
        encoder(tokenizer, variables={"stile": "loud"})
    with pytest.raises(ConfigError, match="'tools' is set by the data"):
        encoder(tokenizer, variables={"tools": []})
    with pytest.raises(ConfigError, match="plain text has no variable 'a'"):
        Encoder(tokenizer, None, 10, "assistant", "error", variables={"a": 1})


def test_special_tokens_in_tools_and_arguments_are_refused(tokenizer):
    bad = {"name": "f", "description": "Ends with </s>", "parameters": {}}
    with pytest.raises(EncodingProblem, match="'</s>' inside its tools"):
        encoder(tokenizer).encode(parse({"messages": TALK, "tools": [bad]}))
    call = {"name": "f", "arguments": {"a": ["</s>"]}}
    turns = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(EncodingProblem, match="'</s>' inside its assistant turn"):
        encoder(tokenizer).encode(parse({"messages": turns}))


# --- weights of turns ---------------------------------------------------------------------------

SAID = [
    *({"role": "user", "content": "a?"}, {"role": "assistant", "content": "bad"}),
    *({"role": "user", "content": "b?"}, {"role": "assistant", "content": "good"}),
]
MARKED = READS.replace("{{- m.content }}", "{% generation %}{{- m.content }}{% endgeneration %}")


def weighed(place, **keys):
    return {"messages": [{**turn, **(keys if i == place else {})} for i, turn in enumerate(SAID)]}


@pytest.mark.parametrize("template", [READS, MARKED])
@pytest.mark.parametrize(
    "off",
    [{"weight": 0}, {"weight": 0.0}, {"weight": "0"}, {"train": False}, {"training": False}]
    + [{"trainable": 0}, {"loss": False}, {"weight": 0, "train": False}],
)
def test_a_turn_that_is_off_is_not_trained_and_its_neighbour_is(tokenizer, template, off):
    text, answers, unused = checked(tokenizer, weighed(1, **off), template)
    assert (answers, unused) == (["good</s>"], [])
    assert "bad</s>" in text
    # The last one: nothing after the last trained answer is read.
    text, answers, _ = checked(tokenizer, weighed(3, **off), template)
    assert answers == ["bad</s>"]
    assert "good" not in text


@pytest.mark.parametrize("on", [{"weight": 1}, {"weight": 1.0}, {"train": True}, {"weight": None}])
def test_a_turn_that_is_on_is_trained_as_ever(on):
    assert parse(weighed(1, **on)) == Sample(SAID)
    # Other turns may be off, which they are anyway.
    assert parse(weighed(0, weight=0, train=False)) == Sample(SAID)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (weighed(1, weight=0.5), "turn 2 of messages (assistant) has weight=0.5: it is trained"),
        (weighed(1, weight=-1), "has weight=-1: it is trained (1) or not (0)"),
        (weighed(3, train="maybe"), "turn 4 of messages (assistant) has train='maybe'"),
        (weighed(1, weight=0, train=True), "has weight=0, train=True, which contradict"),
        (weighed(0, weight=1), "(user) has weight=1, and assistant turns alone are trained"),
    ],
)
def test_other_weights_are_refused_with_the_reason(row, message):
    ((kind, text),) = parse(row)
    assert kind == "weight"
    assert message in text


def test_a_row_without_a_turn_to_learn_is_refused(tokenizer):
    row = {"messages": [SAID[0], {**SAID[1], "weight": 0}]}
    with pytest.raises(EncodingProblem, match="no turn to learn: the weights") as error:
        encoder(tokenizer).encode(parse(row))
    assert error.value.kind == "untrained"


def test_a_template_of_a_tokenizer_is_requested_in_plain_text(tokenizer):
    assert encoder(tokenizer, "plain").variables == frozenset()
    assert encoder(tokenizer).variables == {"style"}
    with pytest.raises(EncodingProblem, match="has tools: the chat template plain writes none"):
        checked(tokenizer, {"messages": TALK, "tools": [TOOL]}, "plain")
