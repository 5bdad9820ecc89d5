"""``lightning-peft export`` in every format, and its push to a stand-in of the hub."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from finished import BASE, ROOT, adapter_in
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_peft.cli import main
from lightning_peft.export.loading import writes_text

IDS = torch.arange(5, 40)[None]


def test_the_adapter_with_its_card(qlora_run, tmp_path, exported):
    out = tmp_path / "out"
    found = exported(qlora_run, out, "adapter", "--base-name", "org/base", "--chat-template", "raw")
    assert {file["path"] for file in found["files"]} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "provenance.json",
    }
    assert found["notes"] == []
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\nbase_model: org/base\ntags:")
    facts = json.loads((adapter_in(qlora_run) / "provenance.json").read_text())
    assert facts["adapter_sha256"] in card
    assert facts["base"]["fingerprint"] in card
    assert f"| peft | `{facts['versions']['peft']}` |" in card
    assert "license of the base | `not known here" in card
    for file in found["files"]:
        if not file["path"].endswith("safetensors"):
            assert str(ROOT) not in (out / file["path"]).read_text()
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    assert torch.isfinite(PeftModel.from_pretrained(base, out)(IDS).logits).all()


def test_a_folder_that_travels_names_no_place_of_its_data(lora_run, tmp_path, exported):
    trained = tmp_path / "trained"
    shutil.copytree(adapter_in(lora_run), trained)
    facts = json.loads((trained / "provenance.json").read_text())
    facts["data"] = {"data": str(tmp_path / "rows.jsonl"), "tokenizer": str(BASE), "rows": 2}
    (trained / "provenance.json").write_text(json.dumps(facts))
    notes = []
    for name, words in (("path", []), ("mark", ["--base-name", "package:demo/base"])):
        notes += exported(trained, tmp_path / name, "adapter", *words)["notes"]
        facts = json.loads((tmp_path / name / "provenance.json").read_text())
        assert facts["data"] == {"data": "rows.jsonl", "tokenizer": BASE.name, "rows": 2}
    # A mark is not a name that the hub has, and the card does not say it were one.
    assert "(package:demo/base): give the name" in notes[1]
    card = (tmp_path / "mark" / "README.md").read_text()
    assert "base_model:" not in card
    assert "from_pretrained('base')" in card


def test_a_license_that_the_base_names(lora_run, tmp_path, exported):
    base = tmp_path / "base"
    base.mkdir()
    for file in BASE.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# Base\n")
    exported(lora_run, tmp_path / "out", "adapter", "--base", str(base))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in card
    assert "| license of the base | `apache-2.0` |" in card


@pytest.mark.parametrize(("bits", "most"), [(8, 0.08), (4, 0.3)])
def test_quantized_folders_load_without_this_package(qlora_run, tmp_path, exported, bits, most):
    out = tmp_path / "out"
    found = exported(qlora_run, out, "quantized", "--bits", str(bits))
    error = found["quantized"]["logit_error"]
    assert 0 < error["relative"] < most
    assert not (out / "merged").exists()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.quantization_config.to_dict()[f"load_in_{bits}bit"] is True
    assert torch.isfinite(model(IDS).logits).all()
    assert (out / "model.safetensors").stat().st_size < 0.7 * (
        BASE / "model.safetensors"
    ).stat().st_size
    assert AutoTokenizer.from_pretrained(out).vocab_size == 4096
    assert f"The linear layers are {bits}-bit" in (out / "README.md").read_text()


def test_vllm(qlora_run, tmp_path, exported, refused):
    found = exported(qlora_run, tmp_path / "out", "vllm", "--base-name", "org/base")
    assert found["commands"] == [
        "vllm serve org/base --enable-lora --max-lora-rank 8 "
        f"--lora-modules mine={tmp_path / 'out'}",
        "vllm serve org/base --enable-lora --max-lora-rank 8 "
        f"--lora-modules mine={tmp_path / 'out'} --quantization bitsandbytes",
    ]
    folder = tmp_path / "full"
    folder.mkdir()
    for file in adapter_in(qlora_run).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, message in [
        ({"modules_to_save": ["lm_head"], "bias": "all"}, "has modules_to_save, bias, and vLLM"),
        ({"r": 1024}, "has rank 1024, and vLLM takes at most 512"),
    ]:
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        words = ["export", str(folder), str(tmp_path / "other"), "--format", "vllm"]
        assert message in refused(*words, code=1)
        assert not (tmp_path / "other").exists()
    facts = json.loads((folder / "provenance.json").read_text())
    for name in ("LlamaForSequenceClassification", "WhisperForConditionalGeneration"):
        base = facts["base"] | {"class": name}
        (folder / "provenance.json").write_text(json.dumps(facts | {"base": base}))
        assert f"trained on a {name}, and vLLM serves" in refused(*words, code=1)
        assert not (tmp_path / "other").exists()
    assert writes_text("LlavaForConditionalGeneration")
    assert writes_text("OfMyOwn")


def test_ollama(qlora_run, tmp_path, exported):
    out = tmp_path / "out"
    words = ("--chat-template", "chatml", "--system", "Be brief.", "--no-measure")
    found = exported(qlora_run, out, "ollama", *words)
    text = (out / "Modelfile").read_text()
    assert text.startswith(
        "FROM ./mine-f16.gguf\n"
        'TEMPLATE """{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}'
    )
    assert '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n' in text
    assert text.endswith(
        '<|im_start|>assistant\n"""\nPARAMETER stop "</s>"\nPARAMETER stop "<|im_end|></s>"\n'
        'SYSTEM """Be brief."""\n'
    )
    (written,) = found["gguf"]["files"]
    assert [file["path"] for file in found["files"]] == ["Modelfile", "mine-f16.gguf"]
    assert hashlib.sha256((out / written["file"]).read_bytes()).hexdigest() == written["sha256"]
    assert found["merge"]["into"] == "dequantized"
    assert any("ollama create mine" in line for line in found["commands"])
    apart = exported(qlora_run, tmp_path / "apart", "ollama", "--with-adapter", "--base-name", "b")
    text = (tmp_path / "apart" / "Modelfile").read_text()
    assert text.startswith("FROM b\nADAPTER ./mine-lora-f32.gguf\n")
    assert any(n.startswith("not ready: no chat template is known") for n in apart["notes"])


# --- the hub -----------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """What a push asks of the hub's HTTP API, with LFS uploads, in memory."""

    token, files, made, commits = "hf_right", {}, [], []

    def reply(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def refused(self):
        right = self.headers.get("Authorization") == f"Bearer {self.token}"
        if not right:
            self.reply({"error": "Invalid credentials"}, 401)
        return not right

    def do_GET(self):
        if not self.refused():
            self.reply({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def do_HEAD(self):
        self.reply({}, 404)

    def do_PUT(self):
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.files[self.path.rpartition("/")[2]] = content
        self.reply({})

    def do_POST(self):
        body = self.body()
        if self.refused():
            return
        host = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            self.reply({"url": f"{host}/me/mine", "id": "me/mine"})
        elif "/preupload/" in self.path:
            rows = json.loads(body)["files"]
            kind = lambda row: "lfs" if row["path"].endswith(".safetensors") else "regular"  # noqa: E731
            self.reply(
                {
                    "files": [
                        {"path": r["path"], "uploadMode": kind(r), "shouldIgnore": False}
                        for r in rows
                    ]
                }
            )
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": one["oid"],
                    "size": one["size"],
                    "actions": {"upload": {"href": f"{host}/lfs/{one['oid']}"}},
                }
                for one in json.loads(body)["objects"]
            ]
            self.reply({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self.commits.append([json.loads(line) for line in body.splitlines() if line.strip()])
            self.reply(
                {
                    "commitUrl": f"{host}/me/mine/commit/{'1' * 40}",
                    "commitOid": "1" * 40,
                    "pullRequestUrl": None,
                }
            )
        else:
            self.reply({"errors": [], "warnings": []})

    def log_message(self, *words):
        """Says nothing."""


@pytest.fixture
def hub():
    Hub.files, Hub.made, Hub.commits = {}, [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def online(hub, tmp_path, token):
    return {
        "HF_ENDPOINT": hub,
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "NO_PROXY": "127.0.0.1",
    }


PUSHES = """
import os, sys
from lightning_peft.cli import main
words = ["export", sys.argv[1], "--push-to", "me/mine"]
pushed = main([*words, "out", "--json"])
os.environ["HF_TOKEN"] = "hf_wrong"
sys.exit(10 * pushed + main([*words, "refused", "--format", "merged"]))
"""


def test_pushing_to_a_stand_in_of_the_hub(lora_run, hub, tmp_path, refused, program):
    # What decides about the hub is read when its package is imported.
    environment = online(hub, tmp_path, "hf_right")
    code, out, err = program.run(tmp_path, str(lora_run), code=PUSHES, fresh=True, **environment)
    assert code == 1, err
    found = json.loads(out)
    assert found["push"]["pushed"] is True
    assert found["push"]["url"] == f"{hub}/me/mine"
    (made,) = Hub.made
    assert made["name"] == "mine"
    assert made["organization"] == "me"
    assert made.get("private") is True or made.get("visibility") == "private"
    weights = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert list(Hub.files.values()) == [weights]
    (commit,) = Hub.commits
    pushed = {line["value"]["path"] for line in commit if line["key"] in ("file", "lfsFile")}
    assert pushed == {file["path"] for file in found["files"]}
    assert "hf_right" not in out + err
    # A token that is refused costs no merge.
    assert "The hub does not say whose token this is" in err
    assert "hf_wrong" not in out + err
    assert not (tmp_path / "refused").exists()
    words = ("export", lora_run, tmp_path / "refused", "--push-to", "me/mine")
    assert "HF_HUB_OFFLINE must not be set" in refused(*words, code=1)


def test_a_dry_run_pushes_nothing(lora_run, tmp_path, capsys):
    words = ["export", str(lora_run), str(tmp_path / "out"), "--push-to", "me/mine", "--dry-run"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "would push 4 files, 0.6 MB, to me/mine (private)" in said
    assert "adapter_model.safetensors" in said


def test_bad_input(lora_run, tmp_path, refused):
    out = str(tmp_path / "out")
    for words, message in [
        ([out, "--dry-run"], "--dry-run is for --push-to"),
        ([out, "--push-to", "a/b/c"], "is not a repository name"),
        ([out, "--push-to", "alone"], "write NAMESPACE/NAME"),
        ([out, "--chat-template", "chatlm"], "chat_template='chatlm'"),
        ([str(BASE)], "is there already"),
        ([out, "--format", "ollama", "--with-adapter", "--system", '"""'], "ends a text in a Mod"),
    ]:
        assert message in refused("export", str(lora_run), *words)
    assert not Path(out).exists()
