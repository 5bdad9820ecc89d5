"""Rows of other services and tokenizers: named templates, OpenAI's pairs, thoughts twice."""

import pytest
from transformers import AutoTokenizer

from lightning_peft.data.preference import PreferenceData
from lightning_peft.data.supervised import SupervisedData
from lightning_peft.data.templates import find_template
from lightning_peft.demo.run import BASE
from lightning_peft.errors import ConfigError

from .conftest import ALL_ROWS

SMALL = (
    "{% for m in messages %}({{ m.role }}){{ m.reasoning_content }}|{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}\n"
    "{% if add_generation_prompt %}(assistant){% endif %}"
)
# Begins with an empty line and ends with one, which Jinja treats in ways of their own.
WITH_TOOLS = (
    "\n  {%- for t in tools %}[{{ t.function.name }}{{ t.function.parameters }}]{% endfor %}\n"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "!{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}\n"
    "{% if add_generation_prompt %}<assistant>{% endif %}\n"
)
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
CLOCK = "[clock{'type': 'object'}]"
ASKED = [{"role": "user", "content": "Late?"}]
TALK = [*ASKED, {"role": "assistant", "content": "Not yet."}]


def turn(**keys):
    return {"role": "assistant", **keys}


@pytest.fixture
def named(tmp_path):
    """Writes a tokenizer with several chat templates by name, and returns its folder."""

    def named(**templates):
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        tokenizer.chat_template = templates
        folder = tmp_path / "tokenizer"
        tokenizer.save_pretrained(folder)
        return str(folder)

    return named


@pytest.fixture
def texts(build, write):
    """Returns each row of some data as text, with what is trained in brackets."""

    def texts(rows, cls=SupervisedData, **options):
        data = build(cls, write(rows), **{**ALL_ROWS, "chat_template": SMALL, **options})
        data.setup("fit")
        prepared = data.read()
        return [
            "".join(f"[{r.text}]" if r.trained else r.text for r in data.render_row(row))
            for row in prepared.splits["train"]
        ], prepared.summary

    return texts


def test_rows_with_tools_are_written_by_the_template_for_them_and_others_by_the_default(
    named, texts
):
    folder = named(default=SMALL, tool_use=WITH_TOOLS)
    rows = [{"messages": TALK}, {"messages": TALK, "tools": TOOLS}]

    (plain, tools), _ = texts(rows, tokenizer=folder, chat_template=None)

    assert plain == "(user)|Late?(assistant)[|Not yet.</s>]"
    assert tools == f"{CLOCK}<user>Late?<assistant>[Not yet.</s>]"


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [False, True])
def test_the_one_source_of_named_templates_writes_what_transformers_writes(named, tools, prompt):
    tokenizer = AutoTokenizer.from_pretrained(named(default=SMALL, tool_use=WITH_TOOLS))
    how = {"tools": tools, "tokenize": False, "add_generation_prompt": prompt}

    expected = tokenizer.apply_chat_template(TALK, **how)

    source = find_template(tokenizer, None).text
    assert tokenizer.apply_chat_template(TALK, chat_template=source, **how) == expected


def test_a_template_is_chosen_by_its_name(named):
    tokenizer = AutoTokenizer.from_pretrained(named(rag=SMALL, tool_use=WITH_TOOLS))

    assert find_template(tokenizer, "rag").text == SMALL
    with pytest.raises(ConfigError, match=r"'tools_use' is neither .*near names: tool_use"):
        find_template(tokenizer, "tools_use")
    with pytest.raises(ConfigError, match=r'none is called default.*chat_template="rag"'):
        find_template(tokenizer, None)


def test_pairs_as_openai_writes_them(texts):
    row = {
        "input": {"messages": ASKED, "tools": TOOLS, "parallel_tool_calls": True},
        "preferred_output": [turn(content="Not yet.")],
        "non_preferred_output": [turn(content="No.")],
    }

    (pair,), summary = texts([row], PreferenceData, chat_template=WITH_TOOLS)

    assert f"{CLOCK}<user>Late?<assistant>[Not yet.</s>]" in pair
    assert f"{CLOCK}<user>Late?<assistant>[No.</s>]" in pair
    assert [one["key"] for one in summary["keys_unused"]] == ["input.parallel_tool_calls"]


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({"instruction": "Translate.", "input": "Käse"}, "Translate.\n\nKäse"),
        ({"instruction": "Sing.", "input": ""}, "Sing."),
        ({"input": "Why?"}, "Why?"),
        ({"prompt": "Why?", "instruction": "Sing."}, "Why?"),
    ],
)
def test_the_prompt_of_a_pair_may_be_an_instruction_with_its_input(texts, given, asked):
    rows = [{**given, "chosen": "good", "rejected": "bad"}]

    (pair,), summary = texts(rows, PreferenceData)

    assert f"(user)|{asked}(assistant)[|good</s>]" in pair
    unused = ["instruction"] if "prompt" in given else []
    assert [one["key"] for one in summary["keys_unused"]] == unused


def test_tools_in_two_places_of_a_pair_are_refused(texts):
    inner = {"messages": ASKED, "tools": TOOLS}
    row = {"input": inner, "tools": TOOLS, "chosen": "good", "rejected": "bad"}

    with pytest.raises(ConfigError, match="a prompt or tools in its input and outside of it"):
        texts([row], PreferenceData, chat_template=WITH_TOOLS)


@pytest.mark.parametrize("content", ["<think>hm</think>\n\nNo.", "<think>\n\n</think>No.", "No."])
def test_thoughts_that_stand_in_two_places_are_learnt_once(texts, content):
    answer = turn(content=content, reasoning_content="hm")

    (text,), _ = texts([{"messages": [*ASKED, answer]}])

    assert text == "(user)|Late?(assistant)[hm|No.</s>]"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"messages": [*ASKED, turn(content="<think>a</think>b", reasoning_content="c")]},
            "other thoughts in its text than in a key",
        ),
        (
            {"prompt": "a", "completion": "<think>a</think>b", "reasoning": "c"},
            "other thoughts in its answer than in reasoning",
        ),
        (
            {"messages": [*ASKED, turn(content="<think>a</think>", reasoning_content="a")]},
            "is empty besides its thoughts",
        ),
        ({"messages": [*ASKED, turn(content="b", learn=False)]}, "learn=False in turn 2"),
    ],
)
def test_contradictions_of_an_answer_are_refused(texts, row, words):
    with pytest.raises(ConfigError, match=words):
        texts([row])
