"""Every kind of module trains with LoRA and QLoRA, unedited, or is refused with a way out."""

from __future__ import annotations

from typing import Any

import pytest

from . import classic, language, sequence, vision
from .training import METHODS, check_refused, check_training

KINDS = [*language.KINDS, *vision.KINDS, *sequence.KINDS, *classic.KINDS]
BY_NAME = {kind.name: kind for kind in KINDS}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [kind.name for kind in KINDS if not kind.refused])
def test_it_trains_unedited(name: str, method: str, tmp_path: Any) -> None:
    check_training(BY_NAME[name], method, tmp_path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [kind.name for kind in KINDS if kind.refused])
def test_it_is_refused_with_a_way_out(name: str, method: str, tmp_path: Any) -> None:
    check_refused(BY_NAME[name], method, tmp_path)
