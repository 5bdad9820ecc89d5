"""What is given out of a machine: to strangers nothing of its folders, to all what can be read."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import sysconfig
import zipfile
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import yaml

from gradio_app.export.archive import build_archive
from gradio_app.export.manager import ExportManager
from gradio_app.export.record import read_export
from gradio_app.export.request import ExportRequest
from gradio_app.recipe.command_worker import CommandResult
from gradio_app.recipe.content import value_at, with_value
from gradio_app.recipe.edits import base_recipe
from gradio_app.recipe.preview import preview_data
from gradio_app.recipe.yaml_text import dump_yaml
from gradio_app.redaction import Redactor, bundled_folders
from gradio_app.runs.store import RunStore
from gradio_app.runs.types import Run
from gradio_app.settings import Settings
from tests.app.attacking import Call, called, handlers_of
from tests.app.runs import save_adapter, settings, until
from tests.app.servers import Server
from tests.app.visitors import HERS, owner_with

SITE = sysconfig.get_paths()["purelib"]
PACKAGE = str(bundled_folders()["package:"])
UPLOADED = "20260101-0123abcd-rows.jsonl"
MODEL, DATA = "model.init_args.model", "data.init_args.data"
# What a run has written about an alert that this page does not know.
OURS = "Our own alert"


@pytest.fixture
def stranger(tmp_path, monkeypatch) -> Redactor:
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "owner"))
    made = Settings.on_a_space(tmp_path)
    return Redactor(made, made.runs / "mine")


# --- texts -------------------------------------------------------------------------------------


def test_a_stranger_is_reported_no_folder(stranger):
    runs, uploads = stranger.settings.runs, stranger.settings.uploads
    home = Path.home()
    for text, message in (
        (f'File "{SITE}/torch/nn/x.py", line 3', 'File "torch/nn/x.py", line 3'),
        (f"saved {runs}/mine/checkpoints/a.ckpt", "saved checkpoints/a.ckpt"),
        (f"in {runs}/mine: {runs}/other/a", "in .: other/a"),
        (f"{uploads}/v-0f/{UPLOADED}:3", f"upload:{UPLOADED}:3"),
        (f"{home}/a and file://{home}/b, X={home}/c:{home}/d -I{home}/e", None),
        (f"{PACKAGE}/demo/base {PACKAGE}/runs/session.py", None),
        ("/proc/1/maps a:/etc/b/c ~/x/y", "maps a:c ~/x/y"),
        ("https://a.b/c/d </s> and/or ./a/b package:demo/base", None),
    ):
        assert message is None or stranger.text(text) == message
        for place in (runs, uploads, home, SITE, PACKAGE):
            assert str(place) not in stranger.text(text)
    assert "package:demo/base lightning_peft/runs/session.py" in stranger.text(
        f"{PACKAGE}/demo/base {PACKAGE}/runs/session.py"
    )
    same = "https://a.b/c/d </s> and/or ./a/b package:demo/base a/tmp/b"
    assert stranger.text(same) == same
    # What may be somebody's own text is left alone, but for folders of this machine.
    assert stranger.record(f"#!/usr/bin/env {SITE}/x") == "#!/usr/bin/env x"


def test_on_a_laptop_paths_stay_where_they_help(tmp_path):
    here = Redactor(settings(tmp_path))
    text = f"{PACKAGE}/demo/base {here.settings.uploads}/local/{UPLOADED} /data/rows.jsonl {SITE}"
    assert here.text(text) == here.record(text) == text
    assert here.value({"a": [text, 1]}) == {"a": [text, 1]}
    portable = here.portable(text)
    assert portable == f"package:demo/base upload:{UPLOADED} /data/rows.jsonl {SITE}"


# --- what the command line answers ---------------------------------------------------------------


class _Warm:
    """Stands in for the process that answers, with an answer that names folders."""

    def __init__(self, redactor: Redactor, detail: str) -> None:
        self.redactor, self._detail = redactor, detail

    def run(self, words: list[str], seconds: float, *_: object) -> CommandResult:
        rows = [{"row": 1, "file": "rows.jsonl", "detail": self._detail}]
        first = [{"row": 2, "runs": [{"text": "/usr/bin/env", "trained": True}]}]
        return CommandResult(1, json.dumps({"problems": [{"rows": rows}], "first_rows": first}))


def test_problems_of_rows_name_no_folder_and_rows_stay_as_they_are(stranger):
    detail = f"no file {stranger.settings.uploads}/v-0f/a.wav"
    report = preview_data(base_recipe("sft"), _Warm(stranger, detail), space=True)
    assert report.problems[0]["rows"][0]["detail"] == "no file upload:a.wav"
    assert report.numbers["first_rows"][0]["runs"][0]["text"] == "/usr/bin/env"


# --- recipes and exports -------------------------------------------------------------------------


def resolved(uploads: Path) -> str:
    """Returns a recipe as a run writes it down: with absolute paths."""
    content = with_value(base_recipe("sft"), MODEL, f"{PACKAGE}/demo/base")
    return dump_yaml(with_value(content, DATA, f"{uploads}/{UPLOADED}"))


def run_in(store: RunStore, owner: str, name: str, said: str) -> Run:
    """Makes a run on disk that says ``said`` wherever a run can say something."""
    uploads = store.settings.uploads / owner
    uploads.mkdir(parents=True, exist_ok=True)
    (uploads / UPLOADED).write_text('{"prompt": "a", "completion": "b"}\n')
    run = store.create(owner, resolved(uploads), name)
    folder = run.folder
    folder.recipe.write_text(resolved(uploads) + f"# {said}\n")
    status = {"state": "failed", "kind": "fit", "phase": f"failed: {said}", "step": 3}
    folder.write(folder.status_file, status | {"checkpoint": f"{folder.path}/x.ckpt"})
    folder.log.write_text(f"{said}\nlast line\n")
    error = {"error": "OSError", "message": said, "traceback": [f'File "{said}"\n']}
    folder.write(folder.error, error)
    base = {"name_or_path": f"{PACKAGE}/demo/base", "fingerprint": "f"}
    data = {"data": f"{uploads}/{UPLOADED}", "tokenizer": f"{PACKAGE}/demo/base", "said": said}
    metadata = {"task": said, "base": {"model": base}, "data": data, "versions": {"a": said}}
    folder.write(folder.provenance, metadata)
    folder.append(folder.events, {"step": 1, "kind": "odd", "text": f"{OURS} {said}", "alert": {}})
    folder.append(folder.metrics, {"step": 1, "train_loss": 1.0, "val_loss": 1.0, "note": said})
    (folder.path / "left-out.jsonl").write_text(json.dumps({"reasons": [said]}) + "\n")
    adapter = save_adapter(folder, "best", None, base_model_name_or_path=base["name_or_path"])
    folder.write(adapter / "provenance.json", metadata | {"base": base})
    return store.get(owner, run.id)


def exported(run: Run, name: str, said: str, **result: object) -> Path:
    """Makes an export on disk; one without a result has failed."""
    folder = run.folder.path / "exports" / name
    output = folder / "output"
    folder.mkdir(parents=True)
    wish = {"format": "adapter", "checkpoint": "best"}
    metadata = {"wish": wish, "run_name": "hers", "created": 1.0}
    (folder / "export.json").write_text(json.dumps(metadata))
    (folder / "log").write_text(f"lightning-peft: {said}\n")
    if result:
        shutil.copytree(run.checkpoints()[0].folder, output)
        (output / "README.md").write_text(said)
        result |= {"notes": [said], "commands": [f"serve {output}/model {said}"]}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_a_recipe_in_a_zip_can_be_read_elsewhere(tmp_path):
    store = RunStore(settings(tmp_path))
    run = run_in(store, "local", "mine", "")
    before = run.folder.recipe.read_text()
    export = read_export(exported(run, "one", "", files=[]), in_progress=False)
    (tmp_path / "staging").mkdir()
    with zipfile.ZipFile(build_archive(export, run, tmp_path / "staging")) as packed:
        recipe = yaml.safe_load(packed.read("hers/recipe.yaml"))
        config = json.loads(packed.read("hers/adapter_config.json"))
    assert value_at(recipe, MODEL) == "package:demo/base"
    assert value_at(recipe, DATA) == f"upload:{UPLOADED}"
    # What the trainer reads, and what PEFT loads on this machine, stay.
    assert run.folder.recipe.read_text() == before
    assert config["base_model_name_or_path"] == f"{PACKAGE}/demo/base"


def test_on_a_space_not_even_what_is_pushed_names_a_folder(tmp_path):
    """The command line writes and sends what is pushed; it gets the name of the base."""
    words = tmp_path / "words"
    script = tmp_path / "script.py"
    script.write_text(f"import sys; open({str(words)!r}, 'w').write(' '.join(sys.argv[1:]))")
    command = (sys.executable, str(script))
    for space, wanted in ((True, "--base-name=package:demo/base"), (False, "")):
        made = replace(settings(tmp_path), command=command, space=space)
        exports = ExportManager(made, RunStore(made), lambda: None)
        run = run_in(exports.store, "local", "mine", "")
        exports.start("local", run.id, ExportRequest(push_to="me/mine"))
        until(words.is_file)
        until(words.read_text)
        assert ("--base-name" in words.read_text()) is bool(wanted)
        assert wanted in words.read_text()
        words.unlink()


# --- everything that a visitor of a Space can get ------------------------------------------------


@pytest.fixture(scope="module")
def space(serve, tmp_path_factory) -> Server:
    """A Space whose owner has a home like no other folder."""
    folder = tmp_path_factory.mktemp("site")
    return serve(folder, {"HOME": str(folder / "home" / "owner")}, space=True, trainer="fake")


def downloads(client: httpx.Client, text: str) -> dict[str, str]:
    """Returns the content of every file that an answer offers, those in a zip one by one."""
    found = {}
    for path in set(re.findall(r'"path":\s*"(/[^"]+)"', text)):
        content = client.get(f"/gradio_api/file={path}").raise_for_status().content
        if path.endswith(".zip"):
            with zipfile.ZipFile(io.BytesIO(content)) as packed:
                found |= {name: packed.read(name).decode() for name in packed.namelist()}
        else:
            found[Path(path).name] = content.decode()
    return found


def test_nothing_that_a_visitor_gets_names_a_folder_of_the_server(space):
    owner = owner_with(HERS)
    store = RunStore(Settings.on_a_space(space.folder))
    home = str(space.folder / "home" / "owner")
    places = [str(space.runs), str(space.folder / "uploads"), home, SITE, PACKAGE]
    said = " ".join(f"{place}/a.py '{place}' X={place}/b:{place}/c" for place in places)
    run, other = run_in(store, owner, "Hers", said), run_in(store, owner, "Another", said)
    other.folder.error.unlink()
    exported(run, "one", said, files=[])
    exported(run, "two", said, push={"pushed": False})
    exported(run, "three", said)
    query = {"run": run.id, "runs": f"{run.id},{other.id}", "from": run.id}
    answers, files = {}, {}
    with space.client(HERS) as client:
        named = {group[0].name: group[0] for group in handlers_of(space, client)}

        def ask(name: str, *data: object, click: str = "", run: str = run.id) -> None:
            (one,) = (one for place, one in named.items() if place.endswith(name))
            given = [*data, *[None] * (one.inputs - len(data))]
            event = {"act": "download", "export": click} if click else None
            text = called(client, one, [Call(given, event, query | {"run": run})], "hers")
            answers[f"{name} {click} {run}"] = text
            files.update(downloads(client, text))

        for page in ("/config", f"/run?run={run.id}", "/new", "/compare"):
            answers[page] = client.get(page).text
        ask("build.<locals>.first")
        ask("ComparePage._on_load", "val_loss", "step")
        ask("RunView.on_load", run=other.id)
        ask("RunView.on_load")
        ask("ExportTab.refresh", None, None, "adapter")
        ask("ExportTab._act", None, None, "adapter", click="one")
        ask("PlaygroundTab._poll")
        ask("bind_page_load.<locals>.load", "")
        for name, data in (("status", []), ("metrics", [0]), ("stop", [])):
            ask(f"_about_runs.<locals>.{name}", run.id, *data)
        ask("_about_runs.<locals>.runs")
        recipe = with_value(base_recipe("sft"), DATA, f"upload:{UPLOADED}")
        ask("_about_recipes.<locals>.check", dump_yaml(recipe), "")
    for name, text in (answers | files).items():
        for place in places:
            at = text.find(place)
            assert at < 0, f"{name} shows {place}: {text[max(0, at - 300) : at + 100]}"
    _all_was_there(answers, files, run)


def _all_was_there(answers: dict[str, str], files: dict[str, str], run: Run) -> None:
    """Says that what was looked through is what it is taken for."""
    opened = answers[f"RunView.on_load  {run.id}"]
    for word in (OURS, "last line", "failed: a.py", "package:demo/base", f"upload:{UPLOADED}"):
        assert word in opened
    assert f"upload:{UPLOADED}" in answers[f"bind_page_load.<locals>.load  {run.id}"]
    assert "serve hers/model" in answers[f"ExportTab.refresh  {run.id}"]
    assert f'"data":"upload:{UPLOADED}"' in answers[f"_about_recipes.<locals>.check  {run.id}"]
    assert "data.init_args" not in answers[f"ComparePage._on_load  {run.id}"]
    assert "Another" in answers[f"ComparePage._on_load  {run.id}"]
    refused = [name for name, text in answers.items() if '"title":"Error"' in text]
    assert refused == []
    status = answers[f"_about_runs.<locals>.status  {run.id}"]
    assert '"checkpoint":"x.ckpt"' in status
    zipped = {"README.md", "adapter_config.json", "adapter_model.safetensors", "provenance.json"}
    assert {"left-out.jsonl", *(f"hers/{name}" for name in (*zipped, "recipe.yaml"))} <= set(files)
    config = json.loads(files["hers/adapter_config.json"])
    assert config["base_model_name_or_path"] == "package:demo/base"
