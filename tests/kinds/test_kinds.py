"""Every kind of module trains with LoRA and QLoRA, unedited, or is refused with a fix."""

from __future__ import annotations

from typing import Any

import pytest

import lightning_peft

from .table import KINDS, PAGE, page
from .training import METHODS, check_refused, check_training

BY_NAME = {kind.name: kind for kind in KINDS}
ROWS = [(kind.name, method) for kind in KINDS for method in METHODS]


@pytest.mark.parametrize(("name", "method"), [r for r in ROWS if r[1] not in BY_NAME[r[0]].refused])
def test_it_trains_unedited(name: str, method: str, tmp_path: Any) -> None:
    kind = BY_NAME[name]
    module = check_training(kind, method, tmp_path)
    verification = lightning_peft.verify(module, kind.data()[0])
    assert verification.passed, verification


@pytest.mark.parametrize(("name", "method"), [r for r in ROWS if r[1] in BY_NAME[r[0]].refused])
def test_it_is_refused_with_a_fix(name: str, method: str, tmp_path: Any) -> None:
    check_refused(BY_NAME[name], method, tmp_path)


def test_the_documentation_has_the_table_of_these_tests() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run PYTHONPATH=tests python -m kinds.table"
