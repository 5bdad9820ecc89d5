"""Chat templates that put text around turns are translated for Ollama, and no others."""

from __future__ import annotations

import pytest
from finished import BASE
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lightning_peft.data.templates import NAMED
from lightning_peft.export.go_template import translate
from lightning_peft.export.modelfile import added_token

from .go_rendering import go

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}" + PROMPT
)
# In the shape of the templates that these models come with.
FAMILIES = {
    "smollm2": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n"
    "{% endif %}" + CHATML,
    "qwen3": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}" + PROMPT,
    "llama2": "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' }}{% if loop.first and messages[0].role == 'system' %}"
    "{{ '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}"
    "{% endfor %}",
    "llama3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}"
    "<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "llama3.2": "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nUntil: 2023\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}<|eot_id|>"
    "{% for m in rest %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "llama4": "{{ bos_token }}{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>\n\n"
    "{{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}",
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}{% else %}"
    "{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ (first if loop.first else '') + m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "mistral": "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}"
    "{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}{{ m.content }}[/INST]{% else %}"
    "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    "mistral7": "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]{% elif m.role == 'user' %}"
    "[INST]{{ m.content }}[/INST]{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
    "phi3": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    "phi4": "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
    "deepseek": "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<User>{{ m.content }}{% else %}<Assistant>"
    "{{ m.content.split('</think>')[-1] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}",
    "no system": "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('none') }}{% endif %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}",
    "braces": "{% for m in messages %}{{ '{{' + m['role'] + '}}' + m['content'] }}{% endfor %}",
}
TALK = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "Five"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


TEMPLATES = {**{name: NAMED[name] for name in NAMED}, **FAMILIES}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_translation_renders_the_same(name: str, tokenizer) -> None:
    template = TEMPLATES[name]
    turns = translate(tokenizer, template)
    assert turns is not None
    assert ("system" in turns.around) is (name != "no system")
    opening = [] if name == "no system" else [{"role": "system", "content": "Be kind."}]
    for messages in (TALK, TALK[:3], TALK[:1], [*opening, *TALK], [*opening, *TALK[:1]]):
        expected = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert turns.render(messages) == expected
        assert go(turns.as_go(None), messages) == expected
        # Ollama begins with the token itself.
        bos = tokenizer.bos_token
        assert go(turns.as_go(bos), messages) == expected.removeprefix(bos)


def test_a_token_that_the_template_writes_alone_stays(tokenizer) -> None:
    # As SmolLM2's, whose token of the beginning is the mark of every turn.
    turns = translate(tokenizer, FAMILIES["smollm2"])
    text = turns.as_go(None)
    assert text.startswith("<|im_start|>system\n{{ if not .System }}You are kind.<|im_end|>\n")
    assert text.endswith("<|im_start|>assistant\n")


def test_where_an_answer_ends_is_known(tokenizer) -> None:
    ends = {
        name: translate(tokenizer, template).around["assistant"][1]
        for name, template in FAMILIES.items()
    }
    assert ends["smollm2"] == ends["qwen3"] == "<|im_end|>\n"
    assert ends["llama3"] == ends["llama3.2"] == "<|eot_id|>"
    assert ends["gemma"] == "<end_of_turn>\n"
    assert ends["llama2"].strip() == ends["mistral"] == tokenizer.eos_token


OTHERS = {
    "numbers turns": "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}",
    "drops old turns": "{{ messages[-1]['content'] }}",
    "changes contents": "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | upper }}"
    "{% endfor %}",
    "quotes": "{% for m in messages %}{{ '\"\"\"' + m['content'] }}{% endfor %}",
    "broken": "{% for m in messages %}",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_says_more_is_not_translated(kind: str, tokenizer) -> None:
    assert translate(tokenizer, OTHERS[kind]) is None


def test_only_a_token_that_ollama_adds_is_left_out(tokenizer) -> None:
    assert added_token(tokenizer) == tokenizer.bos_token
    plain = AutoTokenizer.from_pretrained(BASE)
    plain.add_bos_token = False
    plain.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    assert added_token(plain) is None
