import copy

import pytest
from transformers import AutoTokenizer

from lightning_peft.data.encoding import IGNORED, Encoder
from lightning_peft.data.samples import Sample
from lightning_peft.data.templates import NAMED, find_template
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.demo.run import BASE
from lightning_peft.errors import ConfigError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A row of items."},
    {"role": "user", "content": "And a set?"},
    {"role": "assistant", "content": "Items without order."},
]
HEAD = "{% for m in messages %}[{{ m['role'] }}]"
WITHOUT_END = (
    HEAD
    + "{{ m['content'] }}<turn>\n{% endfor %}"
    + ("{% if add_generation_prompt %}[assistant]{% endif %}")
)
MARKED = HEAD + (
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
)
MARKED_WITHOUT_END = MARKED.replace(
    "{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}"
)
MARKS_ALL = "{% generation %}" + HEAD + "{{ m['content'] }}{% endfor %}{% endgeneration %}"
MARKS_NOTHING = MARKED.replace("== 'assistant'", "== 'robot'")
# As Qwen 3 does: earlier answers are written in another way than the last.
REWRITES = HEAD + (
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def encoder(tokenizer, template="plain", max_length=256, loss_on="assistant", over_long="error"):
    found = find_template(tokenizer, template)
    return Encoder(tokenizer, found, max_length, loss_on, over_long)


def trained(tokenizer, row):
    """Returns the runs of trained tokens as text."""
    runs, before = [], IGNORED
    for token, label in zip(row.input_ids, row.labels, strict=True):
        assert label in (IGNORED, token)
        if label != IGNORED:
            runs.append([]) if before == IGNORED else None
            runs[-1].append(token)
        before = label
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [*NAMED, MARKED, MARKED_WITHOUT_END])
def test_answers_and_their_ends_are_trained_and_nothing_else(tokenizer, template):
    (row,) = encoder(tokenizer, template).encode(Sample(TALK))
    # The mark of ChatML is written out by a tokenizer that does not know it.
    mark = "<|im_end|>" if template == "chatml" else ""
    expected = [f"{turn['content']}{mark}</s>" for turn in TALK if turn["role"] == "assistant"]
    assert trained(tokenizer, row) == expected
    (last,) = encoder(tokenizer, template, loss_on="completion").encode(Sample(TALK))
    assert trained(tokenizer, last) == expected[1:]
    assert last.input_ids == row.input_ids
    assert not row.end_added


def test_marks_around_every_turn_train_the_answers_alone(tokenizer):
    """Reports of trainers that learn the user's turns by a template with misplaced marks."""
    every = MARKED.replace("{% if m['role'] == 'assistant' %}", "{% if true %}")
    (row,) = encoder(tokenizer, every).encode(Sample(TALK[1:]))
    assert trained(tokenizer, row) == ["A row of items.</s>", "Items without order.</s>"]
    cleaned = copy.deepcopy(tokenizer)
    cleaned.clean_up_tokenization_spaces = True
    talk = [*TALK[1:-1], {"role": "assistant", "content": "Items , apart ."}]
    (row,) = encoder(cleaned, every).encode(Sample(talk))
    assert trained(tokenizer, row) == ["A row of items.</s>", "Items , apart .</s>"]
    others = encoder(tokenizer, MARKED.replace("== 'assistant'", "== 'user'"))
    with pytest.raises(EncodingProblem, match="0 % trained tokens"):
        others.encode(Sample(TALK[1:]))


def test_a_template_that_fails_is_refused_in_words(tokenizer):
    long = "{% for i in range(10 ** 9) %}{% endfor %}"
    with pytest.raises(EncodingProblem, match="is refused by the chat template.*Range too big"):
        encoder(tokenizer, long + MARKED).encode(Sample(TALK[1:]))


@pytest.mark.parametrize("template", NAMED)
def test_the_tokens_are_those_that_the_model_is_asked_with(tokenizer, template):
    (row,) = encoder(tokenizer, template).encode(Sample(TALK))
    source = find_template(tokenizer, template).text
    asked = tokenizer.apply_chat_template(
        TALK[:-1], chat_template=source, add_generation_prompt=True, return_dict=False
    )
    assert row.input_ids[: len(asked)] == asked
    assert row.input_ids[0] == tokenizer.bos_token_id != row.input_ids[1]
    assert row.labels[len(asked) :] == row.input_ids[len(asked) :]


def test_an_end_is_added_where_the_template_writes_none(tokenizer):
    (row,) = encoder(tokenizer, WITHOUT_END).encode(Sample(TALK))
    assert row.end_added
    ends = trained(tokenizer, row)
    # The template's own mark at the end of a turn is learnt too.
    assert ends[0] == "A row of items.<turn>\n"
    assert ends[1] == "Items without order.<turn>\n</s>"


def test_an_end_after_the_whole_text_is_not_part_of_earlier_answers(tokenizer):
    # As Phi 3 does.
    ends = WITHOUT_END.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    (row,) = encoder(tokenizer, ends).encode(Sample(TALK))
    assert not row.end_added
    assert trained(tokenizer, row) == [
        "A row of items.<turn>\n",
        "Items without order.<turn>\n</s>",
    ]


def test_answers_that_a_template_rewrites_are_learnt_as_they_are_generated(tokenizer):
    first, second = encoder(tokenizer, REWRITES).encode(Sample(TALK))
    assert trained(tokenizer, first) == ["<think></think>A row of items.</s>"]
    assert trained(tokenizer, second) == ["<think></think>Items without order.</s>"]
    # Each after the prompt that requests it: here without the thoughts of the answer before.
    source = find_template(tokenizer, REWRITES).text
    for row, turns in ((first, TALK[:2]), (second, TALK[:4])):
        asked = tokenizer.apply_chat_template(
            turns, chat_template=source, add_generation_prompt=True, return_dict=False
        )
        assert row.input_ids[: len(asked)] == asked
        assert row.labels[: len(asked)] == [IGNORED] * len(asked)
    (row,) = encoder(tokenizer, REWRITES, loss_on="completion").encode(Sample(TALK))
    assert row == second


def test_a_prompt_that_is_not_the_beginning_of_its_answer_is_named(tokenizer):
    opens = REWRITES.replace("[assistant]{% endif %}", "[assistant]<open>{% endif %}")
    with pytest.raises(EncodingProblem, match=r"given as chat_template.*ends with '.*<open>'") as e:
        encoder(tokenizer, opens).encode(Sample(TALK))
    assert e.value.kind == "template"


@pytest.mark.parametrize(
    ("template", "kind", "message"),
    [
        (MARKS_NOTHING, "untrained", "0 % trained tokens with the chat template given as"),
        (MARKS_ALL, "all_trained", "100 % trained tokens, its prompt too, with the chat template"),
        ("{{ raise_exception('no system turns') }}", "template", "no system turns"),
    ],
)
def test_a_template_that_trains_nothing_or_all_is_named(tokenizer, template, kind, message):
    with pytest.raises(EncodingProblem, match=message) as error:
        encoder(tokenizer, template).encode(Sample(TALK))
    assert error.value.kind == kind


def test_a_token_across_the_end_of_the_prompt_is_parted(tokenizer):
    prompt, answer = "Answer: def", "ault value"
    whole = tokenizer(prompt + answer, add_special_tokens=False, return_offsets_mapping=True)
    assert any(a < len(prompt) < b for a, b in whole["offset_mapping"])
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    (row,) = encoder(tokenizer, "raw").encode(Sample(turns))
    assert row.input_ids[: len(tokenizer(prompt)["input_ids"])] == tokenizer(prompt)["input_ids"]
    assert trained(tokenizer, row) == [answer + "</s>"]


def test_special_tokens_inside_a_text_are_refused(tokenizer):
    turns = [{"role": "user", "content": "Is </s> an end?"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(EncodingProblem, match="'</s>' inside its user turn"):
        encoder(tokenizer).encode(Sample(turns))


def test_long_rows_are_refused_cut_or_split(tokenizer):
    talk = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "it " * 50}]
    (whole,) = encoder(tokenizer).encode(Sample(talk))
    with pytest.raises(EncodingProblem, match=rf"has {len(whole.input_ids)} tokens of 30 allowed"):
        encoder(tokenizer, max_length=30).encode(Sample(talk))
    (cut,) = encoder(tokenizer, max_length=30, over_long="truncate").encode(Sample(talk))
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:30], whole.labels[:30])
    assert cut.cut == len(whole.input_ids) - 30
    # A row that was cut does not end there.
    assert tokenizer.eos_token_id not in cut.labels
    with pytest.raises(EncodingProblem, match="none of its answer is left") as error:
        encoder(tokenizer, max_length=6, over_long="truncate").encode(Sample(talk))
    assert error.value.kind == "untrained"
    text = Encoder(tokenizer, None, 10, "assistant", "split")
    for words in range(1, 40):
        pieces = text.encode(Sample(text="word " * words))
        tokens = [token for piece in pieces for token in piece.input_ids]
        assert tokens == [*tokenizer("word " * words)["input_ids"], tokenizer.eos_token_id]
        assert all(1 < len(piece.input_ids) <= 10 for piece in pieces)
        assert all(piece.labels == [IGNORED, *piece.input_ids[1:]] for piece in pieces)


def test_templates_are_the_tokenizers_own_or_requested(tokenizer):
    with pytest.raises(ConfigError, match=r'has no chat template.*chat_template="chatml"'):
        find_template(tokenizer, None)
    with pytest.raises(ConfigError, match="'chatlm' is neither Jinja source nor one of chatml"):
        find_template(tokenizer, "chatlm")
    own = AutoTokenizer.from_pretrained(BASE)
    own.chat_template = MARKED
    assert find_template(own, None).text == MARKED
    assert str(BASE) in find_template(own, None).name
    assert find_template(own, None).marks_answers
    assert not find_template(own, "plain").marks_answers


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        Encoder(endless, None, 10, "assistant", "error")
