"""Exports of runs: real ones through the page, and what must never be: paths, tokens, strangers."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from finished import BASE, adapter_in
from peft import PeftModel
from sentences import EMBEDDING, RERANKER, model_in, random_adapter
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from gradio_app.errors import UserError
from gradio_app.export import record
from gradio_app.export.archive import build_archive, iter_files
from gradio_app.export.base_size import BaseSize, base_size, recorded_base
from gradio_app.export.manager import ExportManager, pusher_environment
from gradio_app.export.record import loading_code
from gradio_app.export.request import FORMATS, formats_of, validate_request
from gradio_app.pages.run import export_html
from gradio_app.recipe.edits import base_recipe
from gradio_app.recipe.yaml_text import dump_yaml
from gradio_app.runs.store import RunStore
from gradio_app.settings import DEMO_LIMITS, Settings
from gradio_app.texts import Texts
from lightning_peft.runs.status import write_json
from lightning_peft.task_registry import TASKS
from tests.app.attacking import call
from tests.app.browsing import PHONE, assert_readable, screenshot
from tests.app.runs import recipe, save_adapter, settings, until
from tests.app.test_real_run import exported
from tests.cli.test_export import Hub

TOKEN = "hf_right"
# Writes what an export does, slowly or not: it is given the same words.
STAND_IN = """
import json, os, pathlib, sys, time
words = sys.argv[1:]
output = pathlib.Path(words[-1])
wait = pathlib.Path.cwd() / "wait"
(output.parent / f".incomplete-1-{output.name}").mkdir()
print("merging: 40%", file=sys.stderr, flush=True)
while wait.exists():
    time.sleep(0.02)
if words[-2].endswith("/fail"):
    sys.exit("lightning-peft: No space left on device")
output.mkdir()
(output / "adapter_config.json").write_text("{}")
push = {"pushed": "--dry-run" not in words, "url": "https://hub.example/me/mine"}
found = {"words": words, "files": [{"path": "adapter_config.json", "bytes": 2}], "notes": []}
found |= {"commands": ["serve <b>it</b>"], "token": bool(os.environ.get("HF_TOKEN"))}
print(json.dumps(found | ({"push": push} if any("push-to" in word for word in words) else {})))
"""


class HeldHub(Hub):
    """Answers what is pushed when a test allows it: until then the export is in progress."""

    allowed = threading.Event()

    def do_POST(self) -> None:
        self.allowed.wait(60)
        super().do_POST()


def run_of(store, source, name="mine", owner="local"):
    """Returns a finished run of the page that has the checkpoint of another one."""
    run = store.create(owner, recipe(), name)
    shutil.copytree(adapter_in(source), run.folder.checkpoints / "adapters" / "best")
    run.folder.write(run.folder.status_file, {"state": "finished", "kind": "fit"})
    return store.get(owner, run.id)


def fake_run(store, name="mine", owner="local", text=""):
    run = store.create(owner, text or recipe(), name)
    save_adapter(run.folder, "best", None)
    run.folder.write(run.folder.status_file, {"state": "finished", "kind": "fit"})
    return store.get(owner, run.id)


@pytest.fixture
def room(tmp_path) -> ExportManager:
    """Exports by a stand-in of the command line; nobody uses the machine."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    made = replace(settings(tmp_path), command=(sys.executable, str(script)))
    return ExportManager(made, RunStore(made), lambda: None)


def ended(room, run):
    (export,) = until(lambda: [one for one in room.list(run) if not one.active])
    return export


# --- without a page ----------------------------------------------------------------------------


def test_an_export_is_made_downloaded_and_deleted(room, tmp_path):
    run = fake_run(room.store, "My <b>run</b>")
    room.start("local", run.id, validate_request(run, "adapter", "best", base_name="org/base"))
    export = ended(room, run)
    assert export.state == "finished"
    assert export.result["words"] == [
        "export",
        "--format=adapter",
        "--json",
        "--base-name=org/base",
        "--",
        f"my-b-run-b={run.checkpoints()[0].folder}",
        str(export.output),
    ]
    assert not list(export.folder.glob(".incomplete*"))
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (export.output / "link").symlink_to(secret)
    (export.output / "folder").symlink_to(tmp_path)
    assert [name for _, name in iter_files(export.output)] == ["adapter_config.json"]
    staging = tmp_path / "staging"
    staging.mkdir()
    with zipfile.ZipFile(build_archive(export, run, staging)) as packed:
        assert packed.namelist() == ["my-b-run-b/adapter_config.json", "my-b-run-b/recipe.yaml"]
    room.delete("local", run.id, export.name)
    assert room.list(run) == []
    assert secret.is_file()


def test_an_export_that_is_cancelled_leaves_nothing(room):
    run = fake_run(room.store)
    wait = room.settings.data_root / "wait"
    wait.touch()
    export = room.start("local", run.id, validate_request(run, "merged", "best"))
    until(lambda: room.list(run)[0].progress == ("merging", 40))
    for refused, key in (
        (lambda: room.start("local", run.id, export.request), "export.refused_one"),
        (lambda: room.delete("local", run.id, export.name), "export.refused_going"),
        (lambda: room.store.delete("local", run.id), "export.refused_delete"),
    ):
        with pytest.raises(UserError, match=key):
            refused()
    other = fake_run(room.store, "other")
    with pytest.raises(UserError, match="refused_heavy"):
        room.start("local", other.id, export.request)
    # Another server sees the same, and can end it.
    second = ExportManager(room.settings, room.store, lambda: None)
    assert second.list(run)[0].state == "going"
    second.cancel("local", run.id, export.name)
    assert ended(room, run).state == "cancelled"
    assert not list(export.folder.glob(".incomplete*"))
    assert not export.output.exists()
    with pytest.raises(UserError, match="refused_over"):
        room.cancel("local", run.id, export.name)
    wait.unlink()
    failing = fake_run(room.store, "fail")
    (failing.folder.checkpoints / "adapters" / "best").rename(
        failing.folder.checkpoints / "adapters" / "fail"
    )
    room.start("local", failing.id, validate_request(failing, "adapter", "fail"))
    assert ended(room, failing).failure == ("disk", "No space left on device")


def test_nothing_is_pushed_before_it_was_shown_and_the_token_is_kept_nowhere(room):
    run = fake_run(room.store)
    wish = validate_request(run, "adapter", "best", push_to="me/mine", private="yes")
    assert wish.private is True
    room.start("local", run.id, wish)
    export = ended(room, run)
    assert export.state == "asks"
    assert "--dry-run" in export.result["words"]
    assert export.result["token"] is bool(os.environ.get("HF_TOKEN"))
    wait = room.settings.data_root / "wait"
    wait.touch()
    room.push("local", run.id, export.name, TOKEN)
    until(lambda: room.list(run)[0].progress == ("merging", 40))
    pid = json.loads((export.folder / "proc.json").read_text())["pid"]
    process = psutil.Process(pid)
    assert TOKEN not in " ".join(process.cmdline())
    assert process.environ()["HF_TOKEN"] == TOKEN
    wait.unlink()
    export = ended(room, run)
    assert (export.state, export.result["token"]) == ("pushed", True)
    assert "--dry-run" not in export.result["words"]
    assert export.address == "https://hub.example/me/mine"
    assert "me/mine" in loading_code(export, run.checkpoints()[0].folder)
    with pytest.raises(UserError, match="nothing_listed"):
        room.push("local", run.id, export.name, TOKEN)
    for file in room.settings.runs.rglob("*"):
        assert not file.is_file() or TOKEN not in file.read_text(errors="replace")


def test_a_gguf_file_has_its_type(room):
    run = fake_run(room.store)
    words = {
        kind: validate_request(run, kind, "best", outtype="q8_0").argv("a=b", Path("out"), False)
        for kind in ("gguf", "ollama", "merged")
    }
    assert words["gguf"][1:5] == ["--format=gguf", "--json", "--outtype=q8_0", "--no-measure"]
    alone = validate_request(run, "gguf-adapter", "best", outtype="q8_0")
    alone = alone.argv("a=b", Path("o"), False)
    assert alone == ["export", "--format=gguf", "--adapter-only", "--json", "--", "a=b", "o"]
    assert "--outtype=q8_0" in words["ollama"]
    assert "--outtype=q8_0" not in words["merged"]


@pytest.mark.parametrize("task", TASKS)
def test_a_run_has_the_formats_of_its_task(task, room):
    text = dump_yaml(base_recipe(task))
    run = fake_run(room.store, text=text)
    language = ("gguf", "gguf-adapter", "vllm", "ollama")
    expected = ["adapter", "merged", "quantized"]
    if task in ("embedding", "reranker"):
        expected.append("sentence-transformers")
    elif task in ("sft", "dpo", "orpo", "kto", "grpo"):
        expected += language
    elif task == "image-text-to-text":
        expected.append("vllm")
    assert list(formats_of(run)) == expected
    for kind in set(FORMATS) - set(expected):
        with pytest.raises(UserError, match="refused_task"):
            validate_request(run, kind, "best")
    assert validate_request(run, expected[-1], "best").format == expected[-1]


def test_an_embedding_model_is_loaded_by_its_own_package(room):
    run = fake_run(room.store, text=dump_yaml(base_recipe("embedding")))
    room.start("local", run.id, validate_request(run, "sentence-transformers", "best"))
    export = ended(room, run)
    words = export.result["words"]
    assert words[1:4] == ["--format=sentence-transformers", "--json", "--no-measure"]
    facts = run.checkpoints()[0].folder / "provenance.json"
    for task, use in (("SentenceEmbedder", "embeddings = model.encode"), ("Reranker", "scores =")):
        facts.write_text(json.dumps({"task": f"lightning_peft.tasks.x.{task}"}))
        code = loading_code(export, facts.parent)
        name = "SentenceTransformer" if task == "SentenceEmbedder" else "CrossEncoder"
        assert code.startswith(f"from sentence_transformers import {name}")
        assert f"model = {name}('mine')\n{use}" in code


def test_a_gguf_base_is_measured_by_its_header(room, tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    for name, shape in (("a", (4, 32)), ("b", (7,))):
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folder = fake_run(room.store).checkpoints()[0].folder
    base = {"name_or_path": str(tmp_path / "base.gguf"), "revision": None}
    (folder / "provenance.json").write_text(json.dumps({"base": base}))
    assert base_size(folder) == BaseSize(4 * 32 + 7, 4 * 32)
    # Alone in its folder, which may be named for it.
    of_folder = tmp_path / "of-folder"
    shutil.copytree(folder, of_folder)
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "base.gguf", tmp_path / "alone")
    base_of_folder = {"name_or_path": str(tmp_path / "alone"), "revision": None}
    (of_folder / "provenance.json").write_text(json.dumps({"base": base_of_folder}))
    assert base_size(of_folder) == base_size(folder)
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    assert base_size(folder) is None
    (tmp_path / "base.gguf").unlink()
    assert base_size(folder) is None


def test_what_cannot_be_had_is_refused(room, tmp_path, lora_run):
    run = run_of(room.store, lora_run)
    for given, key in (
        ({"kind": "onnx"}, "refused_format"),
        ({"outtype": "q4_k_m"}, "refused_outtype"),
        ({"kind": "vllm", "push_to": "a/b"}, "refused_format"),
        ({"checkpoint": "../best"}, "refused_checkpoint"),
        ({"bits": 3}, "refused_bits"),
        ({"base_name": "/etc/passwd"}, "errors.hub_name"),
        ({"push_to": "--private"}, "errors.hub_name"),
        ({"push_to": "alone"}, "errors.hub_name"),
    ):
        given = {"kind": "adapter", "checkpoint": "best", **given}
        with pytest.raises(UserError, match=key):
            validate_request(run, given.pop("kind"), given.pop("checkpoint"), **given)
    wish = validate_request(run, "merged", "best")
    room._busy = lambda: run
    with pytest.raises(UserError, match=r"refused_busy \{"):
        room.start("local", run.id, wish)
    room._busy = lambda: replace(run, metadata=replace(run.metadata, owner="v-1", name="secret"))
    with pytest.raises(UserError, match="refused_busy_other") as refusal:
        room.start("local", run.id, wish)
    assert "secret" not in str(refusal.value)
    room._busy = lambda: None
    limits = replace(DEMO_LIMITS, parameters=1_000_000)
    room.settings = replace(room.settings, space=True, limits=limits)
    with pytest.raises(UserError, match="refused_large"):
        room.start("local", run.id, wish)
    size = base_size(run.checkpoints()[0].folder)
    assert size is not None
    assert 1_000_000 < size.parameters < size.merged_bytes < size.memory_bytes("merged", False)
    base = Path(recorded_base(run.checkpoints()[0].folder)[0])
    (tmp_path / "sharded").mkdir()
    shutil.copy(base / "model.safetensors", tmp_path / "sharded" / "a.safetensors")
    folder = shutil.copytree(run.checkpoints()[0].folder, tmp_path / "of-a-damaged-base")
    provenance = json.loads((folder / "provenance.json").read_text())
    provenance["base"]["name_or_path"] = str(tmp_path / "sharded")
    (folder / "provenance.json").write_text(json.dumps(provenance))
    assert base_size(folder) == size
    (tmp_path / "sharded" / "b.safetensors").write_bytes(b"cut")
    assert base_size(folder) is None
    for name in ("nothing", "../best", "", None):
        with pytest.raises(UserError, match="refused_name"):
            room.get("local", run.id, name)
    with pytest.raises(UserError, match="no_such_run"):
        room.start("v-else", run.id, wish)


def test_on_a_space_a_token_is_used_only_if_it_was_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_owner")
    on_space = Settings.on_a_space(tmp_path)
    without, given = pusher_environment(on_space, None), pusher_environment(on_space, TOKEN)
    assert "hf_of_the_owner" not in {*without.values(), *given.values()}
    assert without["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"
    assert given["HF_TOKEN"] == TOKEN
    assert "HF_HUB_DISABLE_IMPLICIT_TOKEN" not in given


def test_files_of_other_versions_are_no_exports(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    for text in ("", "[]", "{"):
        (folder / record.REQUEST_FILE).write_text(text)
        assert record.read_export(folder, in_progress=False) is None


# --- on the page -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    Hub.files, Hub.made, Hub.commits = {}, [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), HeldHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def site(serve, hub, tmp_path_factory):
    """A page whose hub is the stand-in; nobody is signed in there."""
    folder = tmp_path_factory.mktemp("site")
    env = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": None}
    env |= {"HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return serve(folder, env)


def open_tab(page, site, run, query=""):
    page.goto(f"{site.url}/run?run={run.id}{query}")
    page.get_by_role("tab", name="Export").click()


def logits_of(folder: Path) -> torch.Tensor:
    """Returns the base's answer with an adapter, loaded by PEFT alone."""
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, folder)(torch.arange(5, 40)[None]).logits


def test_an_adapter_is_listed_downloaded_and_pushed(site, store, visit, lora_run, tmp_path):
    """The whole way with the real command line; what is downloaded computes what was trained."""
    run = run_of(store, lora_run, "My adapter")
    page = visit(site.url)
    open_tab(page, site, run)
    page.get_by_role("button", name="To the Hugging Face Hub").click()
    page.get_by_label("Repository").fill("../mine")
    page.get_by_role("button", name="Show what would be uploaded").click()
    page.get_by_text("is not a valid name on the Hub").wait_for()
    page.get_by_label("Repository").fill("me/mine")
    page.get_by_role("button", name="Show what would be uploaded").click()
    # Seen at once: a small adapter is exported in a moment.
    page.get_by_text("It continues if you close this tab").wait_for()
    screenshot(page, "export-going")
    open_tab(page, site, run)
    page.get_by_role("heading", name="Confirm the upload").wait_for(timeout=60_000)
    page.get_by_text("to me/mine (private, if it is new)").wait_for()
    assert Hub.made == []
    with page.expect_download() as download:
        page.get_by_role("button", name="Download zip").click()
    assert download.value.suggested_filename == "my-adapter-adapter.zip"
    download.value.save_as(tmp_path / "got.zip")
    with zipfile.ZipFile(tmp_path / "got.zip") as packed:
        assert all(name.startswith("my-adapter/") for name in packed.namelist())
        assert {"my-adapter/README.md", "my-adapter/recipe.yaml"} <= set(packed.namelist())
        packed.extractall(tmp_path)
    assert torch.equal(logits_of(tmp_path / "my-adapter"), logits_of(adapter_in(lora_run)))
    screenshot(page, "export-asks")
    token = page.get_by_label("Token of your account")
    token.fill(TOKEN)
    page.get_by_role("button", name="Upload", exact=True).click()
    page.get_by_text("Exporting").wait_for()
    token.wait_for(state="detached")
    # The tab is opened again while the export is in progress, which the hub holds up.
    open_tab(page, site, run)
    page.locator("#export-now").get_by_text("It continues if you close this tab").wait_for()
    page.locator("#export-now").get_by_role("button", name="Cancel", exact=True).wait_for()
    assert page.locator("#export-list article").count() == 0
    assert Hub.commits == []
    HeldHub.allowed.set()
    page.locator("#export-list .badge", has_text="Uploaded").wait_for(timeout=60_000)
    (made,) = Hub.made
    assert made.get("private") is True or made.get("visibility") == "private"
    assert len(Hub.commits) == 1
    for file in (*site.runs.rglob("*"), site.folder / "server.log"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes()
    kept = page.evaluate("JSON.stringify({...localStorage, ...sessionStorage})")
    assert TOKEN not in kept
    screenshot(page, "export-pushed")


@pytest.mark.long
def test_it_says_when_there_is_nothing_and_can_be_cancelled_and_read(site, store, visit, lora_run):
    page = visit(site.url)
    open_tab(page, site, store.create("local", recipe(), "no checkpoint"))
    page.get_by_text("Nothing to export yet").wait_for()
    run = run_of(store, lora_run)
    page.set_viewport_size(PHONE)
    for theme in ("light", "dark"):
        open_tab(page, site, run, f"&__theme={theme}")
        page.get_by_role("radio", name="Quantized model").check()
        page.get_by_text("of disk and about").wait_for()
        assert_readable(page)
        screenshot(page, f"export-phone-{theme}")
    page.get_by_role("button", name="Export", exact=True).click()
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.locator("#export-list").get_by_text("Cancelled").wait_for()
    page.locator("#export-list").get_by_role("button", name="Delete", exact=True).click()
    page.get_by_text("Delete this export, Quantized model (").wait_for()
    page.locator("#export-list").get_by_role("button", name="Yes, delete it").click()
    page.locator("#export-list article").wait_for(state="detached")
    assert list((run.folder.path / "exports").iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("facts", "cls"), [(EMBEDDING, AutoModel), (RERANKER, AutoModelForSequenceClassification)]
)
def test_an_embedding_model_or_reranker_is_exported(facts, cls, site, store, visit, tmp_path):
    """What is downloaded is loaded by sentence-transformers."""
    package = pytest.importorskip("sentence_transformers")
    base = model_in(tmp_path / "base", "bert", ("Transformer", "Pooling"))
    task = "embedding" if facts is EMBEDDING else "reranker"
    run = store.create("local", dump_yaml(base_recipe(task)), task)
    adapter = run.folder.checkpoints / "adapters" / "best"
    random_adapter(adapter, base, facts, cls, **({"num_labels": 1} if task == "reranker" else {}))
    run.folder.write(run.folder.status_file, {"state": "finished", "kind": "fit"})
    page = visit(site.url)
    open_tab(page, site, run)
    page.get_by_role("radio", name="For sentence-transformers").wait_for()
    for name in ("GGUF", "GGUF adapter", "For vLLM", "For Ollama"):
        assert page.get_by_role("radio", name=name, exact=True).count() == 0
    made = exported(page, site, run, "For sentence-transformers", tmp_path / "got")
    if task == "embedding":
        loaded = package.SentenceTransformer(str(made), device="cpu")
        assert loaded.encode_query(["w1 w2"]).shape == (1, 64)
        assert loaded.max_seq_length == 20
    else:
        assert package.CrossEncoder(str(made), device="cpu").predict([("w1", "w2")]).shape == (1,)
    kind = "SentenceTransformer" if task == "embedding" else "CrossEncoder"
    page.get_by_text("Loading code").click()
    page.get_by_text(f"model = {kind}('{task}')").wait_for()
    page.goto(f"{site.url}/de-run?run={run.id}")
    page.get_by_role("tab", name="Export").click()
    page.get_by_role("radio", name="Für sentence-transformers").check()
    page.get_by_text("mit Pooling und Prompts").wait_for()
    assert_readable(page)


def test_a_modelfile_without_a_template_is_not_ready(tmp_path):
    folder = tmp_path / "for-ollama"
    (folder / "output").mkdir(parents=True)
    write_json(folder / "export.json", {"wish": {"format": "ollama", "checkpoint": "best"}})
    write_json(folder / "result.json", {"files": [], "commands": [], "notes": []})
    modelfile = folder / "output" / "Modelfile"
    for text, ready in (
        ("FROM ./model\nADAPTER ./adapter\n", False),
        ("FROM ./model\n# TEMPLATE is missing\n", False),
        ('FROM ./model\nTEMPLATE """{{ .Prompt }}"""\n', True),
        ('FROM ./model\ntemplate "{{ .Prompt }}"\n', True),
    ):
        modelfile.write_text(text)
        export = record.read_export(folder, in_progress=False)
        assert export.needs_template is not ready
        shown = export_html.heading(export, Texts())
        look, words = ("finished", "Ready") if ready else ("unfinished", "Needs a template")
        assert f'class="badge {look}"' in shown
        assert words in shown
    other = replace(export, request=replace(export.request, format="merged"))
    modelfile.write_text("FROM ./model\n")
    assert not other.needs_template


@pytest.mark.long
def test_a_foreign_run_is_shown_to_no_handler(client, store):
    foreign = fake_run(store, "a name", owner="v-somebody")
    foreign = store.rename("v-somebody", foreign.id, "secret")
    names = {"export-start", "export-preview", "export-push", "export-list", "compare-runs"}
    config = client.get("/config").json()
    ids = {
        one["id"]: one["props"]["elem_id"]
        for one in config["components"]
        if one["props"].get("elem_id") in names
    }
    handlers = [
        one
        for one in config["dependencies"]
        if one["backend_fn"] and any(place in ids for place, _ in one["targets"])
    ]
    assert {ids[place] for one in handlers for place, _ in one["targets"]} == names
    for one in handlers:
        for given in (foreign.id, [foreign.id]):
            assert "secret" not in call(client, one, [given] * len(one["inputs"]))
    assert not (foreign.folder.path / "exports").exists()
