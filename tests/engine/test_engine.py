"""The engine's names load on first use, and all of them exist."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

from lightning_peft import engine


@pytest.mark.parametrize("name", engine.__all__)
def test_every_name_exists_in_its_home(name: str) -> None:
    home = import_module(f"lightning_peft.engine.{engine._HOME_OF[name]}")
    assert getattr(engine, name) is getattr(home, name)


def test_no_name_is_forgotten() -> None:
    assert sorted(engine._HOME_OF) == sorted(engine.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = engine.nothing


def test_importing_the_engine_loads_nothing_heavy() -> None:
    code = "import sys, lightning_peft.engine; print(*sorted({'torch', 'peft'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
