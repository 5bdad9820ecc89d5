"""Chat templates that only put text around turns are translated, and no others."""

from __future__ import annotations

import re

import pytest
from finished import BASE
from transformers import AutoTokenizer

from lightning_peft.data.templates import NAMED
from lightning_peft.export.go_template import Turns, translate

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
)
BRACES = "{% for m in messages %}{{ '{{' + m['role'] + '}}' + m['content'] }}{% endfor %}"
TALK = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def go(text: str, messages: list[dict[str, str]]) -> str:
    """Renders what :meth:`Turns.as_go` writes: the few words of Go's language that it uses."""
    before, _, rest = text.partition("{{ range .Messages }}")
    body, _, after = rest.rpartition("{{ end }}{{ end }}")
    pattern = r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}'
    pieces = re.split(pattern, body)
    branches = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    turns = [branches[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages]
    return (before + "".join(turns) + after).replace('{{ "{{" }}', "{{")


@pytest.mark.parametrize("template", [*NAMED.values(), LLAMA3, NO_SYSTEM, BRACES])
def test_the_translation_renders_the_same(template: str, tokenizer) -> None:
    turns = translate(tokenizer, template)
    assert turns is not None
    assert ("system" in turns.around) is (template != NO_SYSTEM)
    opening = [{"role": "system", "content": "Be kind."}] if template != NO_SYSTEM else []
    for messages in (TALK, TALK[:1], [*opening, *TALK]):
        expected = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert turns.render(messages) == expected
        assert go(turns.as_go(None), messages) == expected
        assert go(turns.as_go("<s>"), messages) == expected.removeprefix("<s>")


OTHERS = {
    "numbers turns": "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}",
    "default system turn": "{% if messages[0]['role'] != 'system' %}You are kind.{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}",
    "drops old turns": "{{ messages[-1]['content'] }}",
    "ends the last turn only": "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if loop.last %}!{% endif %}{% endfor %}",
    "quotes": "{% for m in messages %}{{ '\"\"\"' + m['content'] }}{% endfor %}",
    "broken": "{% for m in messages %}",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_says_more_is_not_translated(kind: str, tokenizer) -> None:
    assert translate(tokenizer, OTHERS[kind]) is None


def test_turns_are_text() -> None:
    turns = Turns("<s>", {"user": ("U:", "\n"), "assistant": ("A:", "\n")}, "A:")
    assert turns.render(TALK) == "<s>U:One?\nA:Two.\nU:Three\nA:"
