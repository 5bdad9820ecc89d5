"""Packaged recipe files and their names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from lightning_peft.errors import ConfigError

_PACKAGE = Path(__file__).parent
# In a wheel they are inside the package, in a checkout next to it.
_FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes")
_INSTALLED = re.compile(r"installed:([\w-]+)/")


def recipes_folder() -> Path:
    """Returns the folder of all recipes."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    if folder is None:
        raise ConfigError(
            f"The recipes are not in {str(_FOLDERS[0])!r}: the installation is not whole. Install "
            "lightning-peft again, or give --config a file of your own."
        )
    return folder


def recipe_files() -> dict[str, Path]:
    """Returns the recipes by name, in order; those for small trials are called ``small/...``."""
    folder = recipes_folder()
    files = sorted(folder.rglob("*.yaml"), key=lambda file: (len(file.parts), file))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def find_recipe(name: str) -> Path:
    """Returns the file that ``name`` means: a path, or the name of a recipe."""
    if Path(name).is_file():
        return Path(name)
    known = recipe_files()
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"Near names: {', '.join(near)}" if near else f"Recipes: {', '.join(known)}"
        raise ConfigError(f"{name!r} is neither a file nor a recipe. {hint}.")
    return known[name]


def installed_folder(package: str) -> Path | None:
    """Returns the folder of another package, which is not imported; ``None`` where it has none."""
    try:
        spec = find_spec(package)
    # Such as __main__, which has no specification.
    except (ImportError, ValueError):
        return None
    places = spec.submodule_search_locations if spec is not None else None
    return next(map(Path, places or ()), None)


def resolved(file: Path) -> str:
    """Returns the text of a recipe in which marked paths are absolute.

    The marks are ``package:`` (this package), ``recipe:`` (its recipes) and ``installed:NAME/``
    (another package), at the beginning of a value.
    """
    try:
        text = file.read_text(encoding="utf-8")
        yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{str(file)!r} is not a text in UTF-8 (byte {error.start}). Save it as UTF-8."
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f": line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(
            f"{str(file)!r} is not valid YAML{place}. Look there and above for a bracket or quote "
            "that is not closed, a missing space after a colon, a tab, or another indentation."
        ) from error
    roots: dict[str, Path | None] = {"package:": _PACKAGE, "recipe:": recipes_folder()}
    absent = []
    # From the end, so that places before stay.
    for token in reversed(_values(text)):
        found = _INSTALLED.match(token.value)
        if found and found[0] not in roots:
            roots[found[0]] = installed_folder(found[1])
            absent += [found[1]] if roots[found[0]] is None else []
        mark = next((mark for mark in roots if token.value.startswith(mark)), None)
        root = roots[mark] if mark else None
        if mark is None or root is None:
            continue
        path = f"{root.as_posix()}/{token.value.removeprefix(mark)}"
        written = path if token.plain and not re.search(r":\s|\s#", path) else json.dumps(path)
        text = text[: token.start_mark.index] + written + text[token.end_mark.index :]
    if absent:
        names = " ".join(sorted(absent))
        raise ConfigError(
            f"{str(file)!r} names files of packages that are not installed: {names}. Install them "
            f"(pip install --no-deps {names.replace('_', '-')}), or name other files."
        )
    return text


def _values(text: str) -> list[yaml.ScalarToken]:
    """Returns the scalars of a YAML text that are not keys, and stand on one line."""
    tokens = list(yaml.scan(text, Loader=yaml.SafeLoader))
    return [
        token
        for before, token in pairwise(tokens)
        if isinstance(token, yaml.ScalarToken)
        and not isinstance(before, yaml.KeyToken)
        and token.start_mark.line == token.end_mark.line
    ]


@contextmanager
def resolved_recipes(words: Sequence[str]) -> Iterator[list[str]]:
    """Within the body, every ``--config``, which may name a recipe, is a file for LightningCLI."""
    with TemporaryDirectory() as folder:
        yield _write_resolved(words, Path(folder))


def _write_resolved(words: Sequence[str], folder: Path) -> list[str]:
    done: list[str] = []
    for word in words:
        name = None
        if word.startswith("--config="):
            name = word.partition("=")[2]
        elif done and done[-1] == "--config":
            done.pop()
            name = word
        if name is None:
            done.append(word)
            continue
        file = folder / f"{len(done)}-{Path(name).stem}.yaml"
        file.write_text(resolved(find_recipe(name)), encoding="utf-8")
        done.append(f"--config={file}")
    return done
