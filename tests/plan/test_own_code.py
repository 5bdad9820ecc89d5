"""Code that comes with a model is never run unasked, and nobody is asked in passing."""

import os

import own_code
import pytest

from lightning_peft.data.tokenized import load_tokenizer
from lightning_peft.errors import ConfigError
from lightning_peft.export.base import find_base
from lightning_peft.plan.sources import from_name


@pytest.mark.parametrize("read", [from_name, find_base], ids=lambda read: read.__name__)
def test_it_is_refused_without_a_question(read, tmp_path, monkeypatch):
    marker, asked = tmp_path / "ran", []
    own_code.write(tmp_path / "our", marker)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    with pytest.raises(ConfigError, match="our"):
        read(str(tmp_path / "our"))
    assert asked == []
    assert not marker.exists()
    assert os.listdir(tmp_path) == ["our"]


def test_its_tokenizer_needs_none(tmp_path):
    own_code.write(tmp_path / "our", tmp_path / "ran")
    assert len(load_tokenizer(str(tmp_path / "our"))) == 4096
    assert not (tmp_path / "ran").exists()
