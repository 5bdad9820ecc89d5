"""A misspelled override is answered with the one that was meant, wherever it stands."""

import inspect
import re
from functools import lru_cache
from importlib import import_module

import lightning.pytorch.cli
import pytest
import yaml
from hypothesis import assume
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from properties import few_and_many

from lightning_peft.cli.data_config import data_from_config
from lightning_peft.cli.plan_config import plan_from_config
from lightning_peft.errors import LightningPeftError
from lightning_peft.plugin.config_errors import constructor_parameters
from lightning_peft.plugin.lightning_cli import parsed_config
from lightning_peft.recipe_files import find_recipe, resolved_recipes

RECIPES = ["sft-qlora", "dpo-lora", "text-classification-qlora", "translation-lora"]


def preview(recipe, option):
    data_from_config([recipe], ["--data.init_args.data=rows.jsonl", option])


def check(recipe, option):
    data_from_config([recipe], ["--data=rows.jsonl", option], options=["--config", "--json"])


def plan(recipe, option):
    plan_from_config([recipe], [option])


def fit(recipe, option):
    with resolved_recipes([f"--config={recipe}", option]) as words:
        parsed_config(words)


COMMANDS = [preview, check, plan, fit]


@pytest.fixture(scope="module", autouse=True)
def one_parser():
    """Keeps the parser, which is the same in every run of one process and slow to make."""
    cls, kept = lightning.pytorch.cli.LightningCLI, {}
    made = cls.setup_parser

    def setup_parser(self, *arguments):
        if not kept:
            made(self, *arguments)
            kept["parser"] = self.parser
        self.parser = kept["parser"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "setup_parser", setup_parser)
        yield


@lru_cache
def keys(recipe):
    """Returns every key of a recipe that can be overridden, as what is above it and its name."""
    content = yaml.safe_load(find_recipe(recipe).read_text())
    places = {
        "model": content["model"],
        "data": content["data"],
        "trainer.strategy": content["trainer"]["strategy"],
    }
    found = [("trainer.", name) for name in inspect.signature(Trainer).parameters]
    for place, part in places.items():
        module, _, name = part["class_path"].rpartition(".")
        names = constructor_parameters(getattr(import_module(module), name))
        found += [(f"{place}.init_args.", one) for one in names]
    return [(above, name) for above, name in found if len(name) > 4]


@st.composite
def typos(draw):
    """Draws a command, a recipe, a name, and its override with one letter wrong."""
    recipe = draw(st.sampled_from(RECIPES))
    above, name = draw(st.sampled_from(keys(recipe)))
    place = draw(st.integers(1, len(name) - 2))
    wrong = {
        "dropped": name[:place] + name[place + 1 :],
        "doubled": name[: place + 1] + name[place:],
        "moved": name[:place] + name[place + 1] + name[place] + name[place + 2 :],
        "other": name[:place] + draw(st.sampled_from("aeioxz")) + name[place + 1 :],
        "begun": name[:-1],
    }[draw(st.sampled_from(["dropped", "doubled", "moved", "other", "begun"]))]
    assume(all(wrong != other for _, other in keys(recipe)))
    value = draw(st.sampled_from(["1", "0.5", "true", "null", "a b", "[1, 2]", "{a: 1}", ""]))
    return draw(st.sampled_from(COMMANDS)), recipe, name, f"--{above}{wrong}={value}"


@few_and_many(6, drawn=typos())
def test_a_misspelled_override_is_answered_with_the_nearest(drawn):
    command, recipe, name, option = drawn
    with pytest.raises(LightningPeftError) as caught:
        command(recipe, option)
    text = str(caught.value)
    assert re.search(rf"near names: .*\b{name}\b", text), text
    assert "jsonargparse" not in text


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("option", "word"), [("bias=lora_onyl", "lora_only"), ("verify=chep", "cheap")]
)
def test_a_misspelled_value_is_answered_with_the_nearest(command, option, word):
    with pytest.raises(LightningPeftError) as caught:
        command("sft-qlora", f"--trainer.strategy.init_args.{option}")
    assert re.search(rf"is none of .*near names: .*\b{word}\b", str(caught.value))
