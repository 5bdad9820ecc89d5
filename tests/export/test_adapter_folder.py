"""What is said of the base that the files of an adapter name."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_peft.export.adapter_folder import notes_on_base
from lightning_peft.export.adapters import Adapter
from lightning_peft.export.base import Base
from lightning_peft.export.request import ExportRequest


@pytest.mark.parametrize(
    ("named", "local"),
    [
        ("org/model", False),
        ("org/model:model.Q4_K_M.gguf", False),
        ("model.gguf", True),
        ("folder/model.gguf", True),
        ("here:model.gguf", True),
        ("here", True),
        ("/models/base", True),
        ("lightning_peft:base", True),
    ],
)
def test_a_base_that_others_do_not_have(
    named: str, local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    adapter = Adapter("mine", tmp_path, {"base_model_name_or_path": named}, {})
    request = ExportRequest(adapter, Base(named, tmp_path, None), tmp_path / "out", None, {})
    expected = f"the files name the base as a folder or file of this machine ({named}): give"
    assert [note[: len(expected)] for note in notes_on_base(request)] == [expected] * local
