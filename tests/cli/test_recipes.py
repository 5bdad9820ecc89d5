"""Every recipe is a config of the real classes, and the pages made of them are up to date."""

import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from lightning_peft.cli.recipes import main
from lightning_peft.demo.real_base import smollm2
from lightning_peft.errors import ConfigError
from lightning_peft.recipe_files import installed_folder, recipe_files, resolved

ROOT = Path(__file__).parents[2]
FILES = recipe_files()
RECIPES = [name for name in FILES if "/" not in name and name != "forkme"]


def class_of(path):
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def arguments_of(path):
    """Returns the names of what a class takes, with those of the classes above it."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        parameter.name
        for base in class_of(path).__mro__
        if base.__module__.startswith("lightning_peft") and "__init__" in vars(base)
        for parameter in inspect.signature(base.__init__).parameters.values()
        if parameter.kind in named and parameter.name != "self"
    }


def sections(content):
    """Yields the class path and arguments of everything in a config that is a class."""
    if isinstance(content, dict):
        if "class_path" in content:
            yield content["class_path"], content.get("init_args", {})
        for value in content.values():
            yield from sections(value)
    elif isinstance(content, list):
        for value in content:
            yield from sections(value)


@pytest.mark.parametrize("name", [*RECIPES, "forkme"])
def test_every_key_is_an_argument_of_its_class(name):
    found = list(sections(yaml.safe_load(FILES[name].read_text())))
    assert len(found) >= 3
    for path, arguments in found:
        if path.startswith("lightning_peft"):
            assert not set(arguments) - arguments_of(path), path


def test_forkme_explains_every_key():
    found = list(sections(yaml.safe_load(FILES["forkme"].read_text())))
    assert len(found) == 7
    for path, arguments in found:
        assert set(arguments) == arguments_of(path), path


@pytest.mark.parametrize("name", RECIPES)
def test_lora_and_qlora_differ_in_the_strategy_alone(name):
    task, _, method = name.rpartition("-")
    assert method in ("lora", "qlora")
    assert f"small/{task}" in FILES
    contents = [yaml.safe_load(FILES[f"{task}-{m}"].read_text()) for m in ("lora", "qlora")]
    strategies = [content["trainer"].pop("strategy") for content in contents]
    assert contents[0] == contents[1]
    names = [strategy["class_path"] for strategy in strategies]
    assert names == ["lightning_peft.LoRAStrategy", "lightning_peft.QLoRAStrategy"]
    assert strategies[0]["init_args"] == strategies[1]["init_args"]


def test_files_of_small_trials_are_there():
    for name, file in FILES.items():
        if "installed:" in file.read_text() and smollm2() is None:
            continue
        for path in re.findall(r": (/\S+)", resolved(file)):
            assert Path(path).exists(), (name, path)


def test_a_recipe_names_files_of_other_packages(tmp_path, monkeypatch):
    file = tmp_path / "own.yaml"
    file.write_text("model: installed:yaml/loader.py\nnote: uninstalled:yaml/loader.py\n")
    read = yaml.safe_load(resolved(file))
    assert Path(read["model"]).samefile(yaml.loader.__file__)
    assert read["note"] == "uninstalled:yaml/loader.py"
    file.write_text(
        "# see: installed:nope/x\na:  'installed:yaml/loader.py'\nb: [recipe:x, \"package:y z\"]\n"
        "c:\n- installed:yaml/loader.py # installed:nope/x\nd: 'use: installed:nope/ here'\n"
    )
    read, shown = yaml.safe_load(resolved(file)), resolved(file)
    assert Path(read["a"]).samefile(yaml.loader.__file__)
    assert read["c"] == [read["a"]]
    assert read["b"][0].endswith("/recipes/x")
    assert read["b"][1].endswith("/lightning_peft/y z")
    assert read["d"] == "use: installed:nope/ here"
    assert shown.startswith("# see: installed:nope/x\n")
    assert installed_folder("yaml") == Path(yaml.__file__).parent
    (tmp_path / "of_no_file" / "part").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_folder("of_no_file") == tmp_path / "of_no_file"
    for name in ("sys", "os", "_io", "__main__", "six", "my-pkg"):
        assert installed_folder(name) is None
    file.write_text("a: installed:no_such_one/x\nb: installed:yaml/x\nc: installed:nor_this/y\n")
    named = r"not installed: no_such_one nor_this\. .*--no-deps no-such-one nor-this\)"
    with pytest.raises(ConfigError, match=named):
        resolved(file)


def test_the_page_is_made_of_the_records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = runpy.run_path(str(ROOT / "benchmarks" / "recipes.py"))
    content = json.loads((ROOT / "recipes" / "results.json").read_text())
    assert module["PAGE"].read_text() == module["table"](content)
    shown = [(row["recipe"], row["method"]) for row in content["rows"]]
    assert shown == module["trials"]([])


def test_the_list_shows_what_was_measured(capsys):
    assert main(["--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(FILES)
    for name in RECIPES:
        assert rows[name]["memory"].endswith(" MB")
        assert " to " in rows[name]["small trial"]
        assert rows[name]["task"]
        assert rows[name]["about"].endswith(".")


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "lightning_peft.cli", "recipes", "show", "forkme"]
    reader, writer = os.pipe()
    # Closed before anything is written, so that the first write finds nobody.
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == ""
