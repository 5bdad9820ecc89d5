"""A torchvision for another torch: what is said instead of transformers' error."""

import importlib
import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from lightning_peft.doctor.results import Check
from lightning_peft.torchvision_errors import loading_problem

RAISED = "operator torchvision::nms does not exist"


@pytest.fixture
def broken(tmp_path):
    """A folder with a torchvision that raises what one for another torch does."""
    (tmp_path / "torchvision").mkdir()
    code = f"raise RuntimeError({RAISED!r})"
    (tmp_path / "torchvision" / "__init__.py").write_text(code)
    about = tmp_path / "torchvision-0.29.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.29.0\n")
    return tmp_path


@pytest.fixture
def imported(broken, monkeypatch):
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(broken)
    yield broken
    sys.modules.pop("torchvision", None)


def load():
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        raise ModuleNotFoundError("Could not import module 'AutoProcessor'.") from error


def test_what_does_not_load_is_named_with_a_command_that_keeps_torch(imported):
    found = Check("bitsandbytes", load, "Install bitsandbytes.").result()
    assert found.detail == "transformers does not load"
    torch = version("torch")
    assert f"torchvision 0.29.0 does not load with torch {torch} ({RAISED})" in found.remedy
    assert found.remedy.endswith(f'pip install torchvision "torch=={torch}"')
    with pytest.raises(ModuleNotFoundError) as caught:
        load()
    assert loading_problem(caught.value) == found.remedy
    assert loading_problem(ModuleNotFoundError("No module named 'x'")) is None
    # Where it loads, an error about it is another one.
    (imported / "torchvision" / "__init__.py").write_text("")
    assert loading_problem(caught.value) is None


@pytest.mark.long
@pytest.mark.parametrize("code", ["", "from lightning_peft import LoRAStrategy"])
def test_commands_and_names_of_the_package_say_so(code, broken, program):
    words = [] if code else ["chat", "--base", "x"]
    path = os.pathsep.join([str(broken), str(Path(__file__).parents[1])])
    status, _, err = program.run(broken, *words, code=code, fresh=True, PYTHONPATH=path)
    assert status == (1 if code else 2)
    last = err.splitlines()[-1]
    start = "lightning_peft.errors.ConfigError" if code else "lightning-peft"
    assert last.startswith(f"{start}: torchvision 0.29.0 does not load with torch ")
