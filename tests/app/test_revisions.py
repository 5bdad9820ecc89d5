"""A pinned model has its own tokenizer at the same revision, however the recipe came about."""

from __future__ import annotations

import pytest

from gradio_app.errors import UserError
from gradio_app.recipe.commands import python_code
from gradio_app.recipe.content import value_at, with_value
from gradio_app.recipe.edits import base_recipe, recipe_of_run, with_data, with_model
from gradio_app.recipe.validation import validate_content
from tests.app.runs import settings

COMMIT, OTHER = "0" * 40, "1" * 40
MODEL, DATA = "model.init_args.", "data.init_args."
OWN = "tokenizer_revision"


@pytest.mark.parametrize(
    ("task", "part"),
    [
        *(("sft", "tokenizer"), ("reward", "tokenizer"), ("summarization", "tokenizer")),
        *(("speech-recognition", "processor"), ("image-classification", "processor")),
    ],
)
def test_the_form_pins_both(task, part):
    def revisions(content):
        return [
            value_at(content, path, None)
            for path in (f"{MODEL}revision", f"{DATA}{part}", f"{DATA}{part}_revision")
        ]

    content = with_model(base_recipe(task), "me/our", COMMIT)
    assert revisions(content) == [COMMIT, "me/our", COMMIT]
    assert revisions(with_model(content, "me/our", OTHER)) == [OTHER, "me/our", OTHER]
    assert revisions(with_model(content, "me/our", None)) == [None, "me/our", None]
    assert revisions(with_model(content, "me/more", None)) == [None, "me/more", None]
    assert revisions(with_data(content, "upload:x"))[2] == COMMIT
    # Another one's tokenizer has revisions of its own.
    content = with_value(content, f"{DATA}{part}", "you/yours")
    content = with_value(content, f"{DATA}{part}_revision", "v1")
    assert revisions(with_model(content, "me/our", OTHER)) == [OTHER, "you/yours", "v1"]


def test_time_series_have_nothing_to_pin():
    content = with_model(base_recipe("time-series"), "me/our", COMMIT)
    assert not [name for name in content["data"]["init_args"] if name.endswith("revision")]


def test_a_recipe_that_was_written_is_pinned_where_it_does_not_say(tmp_path):
    here = settings(tmp_path)
    written = with_value(base_recipe("sft"), f"{MODEL}model", "me/our")
    written = with_value(written, f"{MODEL}revision", COMMIT)

    def checked(**data):
        content = written
        for name, value in data.items():
            content = with_value(content, f"{DATA}{name}", value)
        return value_at(validate_content(content, here, "local"), DATA + OWN, None)

    assert checked(tokenizer="me/our") == COMMIT
    assert checked(tokenizer=" me/our ") == COMMIT
    assert checked(tokenizer="me/our", tokenizer_revision=None) == COMMIT
    assert checked(tokenizer="me/our", tokenizer_revision="main") == "main"
    assert checked(tokenizer="you/yours") is None
    assert checked(tokenizer="package:demo/base") is None
    for value in ("-x", "a..b", "a b", "--config=x"):
        with pytest.raises(UserError, match=r"errors\.revision"):
            checked(tokenizer="me/our", tokenizer_revision=value)


def test_it_stays_in_what_is_made_of_the_recipe(tmp_path):
    here = settings(tmp_path)
    made = with_model(base_recipe("sft"), "me/our", COMMIT)
    made = with_data(made, "package:demo/instructions.jsonl")
    content = validate_content(made, here, "local")
    assert python_code(content).count(COMMIT) == 2
    again = recipe_of_run(content, here)
    assert value_at(again, DATA + OWN) == COMMIT


def test_a_key_with_a_dot_stays_one_key(tmp_path):
    content = {"model": {"init_args": {"a.b": "/x", "cache_dir": "/c"}}}
    again = recipe_of_run(content, settings(tmp_path))
    assert again == {"model": {"init_args": {"a.b": "/x"}}}
    assert content["model"]["init_args"]["cache_dir"] == "/c"
