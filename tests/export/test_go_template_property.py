"""Templates of random texts around turns are translated to the same, or not at all."""

from __future__ import annotations

from finished import BASE
from hypothesis import strategies as st
from properties import few_and_many
from transformers import AutoTokenizer

from lightning_peft.export.go_template import translate

from .go_rendering import go

TOKENIZER = AutoTokenizer.from_pretrained(BASE)
# With what templates write, what means something in Go or Jinja, and nothing.
PIECE = st.text("ab<>|[]/ \n{}$.%#'", max_size=6)
SYSTEM = ("turn", "default", "first", "last", "none")


def quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return "{{ '" + escaped + "' }}"


@st.composite
def templates(draw):
    opening, prompt, default = (quoted(draw(PIECE)) for _ in range(3))
    roles = {name: (quoted(draw(PIECE)), quoted(draw(PIECE))) for name in ("u", "a", "s")}
    kind, bos = draw(st.sampled_from(SYSTEM)), draw(st.sampled_from(["", "{{ bos_token }}"]))
    inside = {"first": "loop.first", "last": "loop.last"}.get(kind)
    own = "{{ messages[0].content }}".join(roles["s"])
    text = "{% set n = 1 if messages[0].role == 'system' else 0 %}"
    text += "{% if n %}{{ raise_exception('none') }}{% endif %}" if kind == "none" else ""
    text += bos + opening
    if kind in ("turn", "default"):
        other = default if kind == "default" else ""
        text += f"{{% if n %}}{own}{{% else %}}{other}{{% endif %}}"
    text += "{% for m in messages[n:] %}{% if m.role == 'user' %}" + roles["u"][0]
    if inside:
        text += f"{{% if n and {inside} %}}{own}{{% endif %}}"
    text += "{{ m.content }}" + roles["u"][1] + "{% else %}"
    text += "{{ m.content }}".join(roles["a"]) + "{% endif %}{% endfor %}"
    return text + "{% if add_generation_prompt %}" + prompt + "{% endif %}"


@st.composite
def talks(draw):
    content = st.text("abc 1\n", min_size=1, max_size=8).filter(lambda text: text.strip() == text)
    count = draw(st.integers(0, 3))
    roles = ["user", "assistant"] * count + ["user"]
    system = draw(st.booleans())
    return [{"role": role, "content": draw(content)} for role in ["system"] * system + roles]


@few_and_many(template=templates(), messages=talks())
def test_a_translation_renders_the_same(template, messages):
    turns = translate(TOKENIZER, template)
    if turns is None or (messages[0]["role"] == "system" and "system" not in turns.around):
        return
    expected = TOKENIZER.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert turns.render(messages) == expected
    assert go(turns.as_go(None), messages) == expected
    bos = TOKENIZER.bos_token
    assert go(turns.as_go(bos), messages) == expected.removeprefix(bos)
