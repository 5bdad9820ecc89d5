"""What the chat template gets when a model is asked is what it got in training."""

import json
import logging

import pytest
import torch
from finished import BASE, adapter_in

from lightning_peft.chat.chat_model import ChatModel
from lightning_peft.chat.comparison import Prompt, read_prompts
from lightning_peft.chat.sampling import Sampling
from lightning_peft.chat.template_inputs import read_tools_file, read_variables
from lightning_peft.data.encoding import Encoder
from lightning_peft.data.samples import Sample
from lightning_peft.data.templates import find_template
from lightning_peft.errors import ConfigError
from lightning_peft.export.adapters import find_adapter
from lightning_peft.export.base import find_base
from lightning_peft.export.loading import load_with_adapters

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% if style %}[{{ style }}]{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% for c in m.tool_calls or [] %}"
    "{{ c.function | tojson }}{% endfor %}{{ eos_token if m['role'] == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ASKED = [{"role": "user", "content": "Weather?"}]
CALLED = [
    *ASKED,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"a": 1}}}
        ],
    },
    {"role": "tool", "content": "sun"},
]


@pytest.fixture(scope="module")
def talk():
    loaded = load_with_adapters(find_base(str(BASE)), [], device=torch.device("cpu"))
    return ChatModel(loaded, [], TEMPLATE, Sampling(max_new_tokens=2))


@pytest.mark.parametrize("turns", [ASKED, CALLED])
def test_a_prompt_is_that_of_training(talk, turns):
    tokenizer = talk.loaded.tokenizer
    template = find_template(tokenizer, TEMPLATE)
    encoder = Encoder(tokenizer, template, 256, "completion", "error", variables={"style": "low"})
    said = [*turns, {"role": "assistant", "content": "Sun."}]
    (row,) = encoder.encode(Sample(said, context={"tools": [TOOL]}))
    talk.tools, talk.variables_override = [TOOL], {"style": "low"}
    asked = talk.tokens_of(turns)[0].tolist()
    assert row.input_ids[: len(asked)] == asked
    assert set(row.labels[: len(asked)]) == {-100}
    assert row.labels[len(asked)] == row.input_ids[len(asked)]
    assert talk.answer(turns).tokens > 0


def test_what_the_template_would_not_write_is_refused(talk):
    talk.tools, talk.variables_override = [], {"stile": "low"}
    with pytest.raises(ConfigError, match="no variable 'stile'; near names: style"):
        talk.tokens_of(ASKED)
    talk.variables_override, talk.chat_template_override = None, "plain"
    try:
        with pytest.raises(ConfigError, match="has tool_calls, and the chat template plain"):
            talk.tokens_of(CALLED)
        talk.tools = [TOOL]
        with pytest.raises(ConfigError, match="has tools, and the chat template plain writes noth"):
            talk.tokens_of(ASKED)
    finally:
        talk.tools, talk.chat_template_override = [], TEMPLATE


def test_recorded_variables_are_used(lora_run, tmp_path):
    folder = adapter_in(lora_run)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    facts = json.loads((folder / "provenance.json").read_text())
    encoding = {"chat_template_kwargs": {"style": "low"}, "reasoning": "mask"}
    facts["data"] = {"settings": {"encoding": encoding}}
    (tmp_path / "provenance.json").write_text(json.dumps(facts))
    adapter = find_adapter(str(tmp_path))
    loaded = load_with_adapters(find_base(str(BASE)), [adapter], device=torch.device("cpu"))
    talk = ChatModel(loaded, [adapter], TEMPLATE)
    for name in (adapter.name, "base"):
        talk.switch(name)
        assert loaded.tokenizer.decode(talk.tokens_of(ASKED)[0]).startswith("[low]<user>")
    assert talk.recorded("reasoning", "train") == "mask"
    talk.variables_override = {}
    assert loaded.tokenizer.decode(talk.tokens_of(ASKED)[0]).startswith("<user>")
    assert find_adapter(str(lora_run)).chat_template_kwargs == {}


def test_options_are_read_or_refused(tmp_path):
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([TOOL["function"]]))
    assert read_tools_file(str(file)) == [TOOL]
    assert read_tools_file(None) == []
    assert read_variables('{"style": "low"}') == {"style": "low"}
    assert read_variables(None) is None
    for text, message in (("[]", "holds no tools"), ("weather", "has 'weather' as tools")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_tools_file(str(file))
    with pytest.raises(ConfigError, match="cannot be read as text"):
        read_tools_file(str(tmp_path / "none.json"))
    for given, message in (
        ("{a: 1}", "is not JSON"),
        ("[1]", r"has \[1\] as chat_template_kwargs, not an object"),
        ('{"tokenize": true}', "has tokenize in chat_template_kwargs"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_variables(given)


def test_prompts_with_more_than_prompts(tmp_path, caplog):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a?", "id": 1}, {"prompt": "b?", "reference": "b.", "id": 2, "topic": "x"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.WARNING):
        assert read_prompts(str(file)) == [Prompt("a?"), Prompt("b?", "b.")]
    assert "'id' (lines 1-2), 'topic' (lines 2)." in caplog.text
    file.write_text(json.dumps({"prompt": "a?", "system": "s", "images": ["x"], "sytem": ""}))
    with pytest.raises(ConfigError, match=r"line 1 has system\n.*line 1 has images"):
        read_prompts(str(file))
