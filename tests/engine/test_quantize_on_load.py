"""A model that is quantized as it is read is the model that is loaded dense and then quantized."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from models import Holder, llama_config, saved_in_shards
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_peft import engine
from lightning_peft.arguments import LoRAFields
from lightning_peft.engine.backends.registry import is_quantized
from lightning_peft.errors import UnsupportedError

CPU = torch.device("cpu")
DORA = LoRAFields(r=4, use_dora=True)
DENSE: dict[str, Any] = {"device_map": {"": "cpu"}}


def llama(tied: bool = False) -> LlamaConfig:
    sizes = {"vocab_size": 96, "intermediate_size": 128}
    return llama_config(**sizes, attention_bias=True, tie_word_embeddings=tied)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sharded models in float32."""
    torch.manual_seed(0)
    # T5 keeps some of its layers in float32 whatever dtype is asked for.
    t5 = T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    models = {
        "llama": LlamaForCausalLM(llama()),
        "tied": LlamaForCausalLM(llama(tied=True)),
        "backbone": LlamaModel(llama()),
        "t5": T5ForConditionalGeneration(t5),
    }
    return saved_in_shards(models, tmp_path_factory, "60KB")


def load(
    auto: Any, folder: Path, settings: Any = None, config: Any = None, **given: Any
) -> tuple[Holder, bool]:
    """Loads in bfloat16 and injects; also says whether layers came quantized out of the load."""
    holder = Holder()
    settings = settings or engine.quantization_config()
    config = config or engine.lora_config(LoRAFields(r=4))
    torch.manual_seed(5)
    with engine.loading_for_injection(holder, config, settings, None, CPU):
        holder.model = auto.from_pretrained(folder, **{"dtype": torch.bfloat16, **given})
    streamed = any(is_quantized(layer) for layer in holder.modules())
    torch.manual_seed(6)
    engine.inject(holder, config, quantization_config=settings)
    return holder, streamed


def test_the_name_of_the_model_may_be_given_by_keyword(folders: dict[str, Path]) -> None:
    config, settings = engine.lora_config(LoRAFields(r=4)), engine.quantization_config()
    holder = Holder()
    with engine.loading_for_injection(holder, config, settings, None, CPU):
        holder.model = LlamaForCausalLM.from_pretrained(
            pretrained_model_name_or_path=folders["llama"], dtype=torch.bfloat16
        )
    assert is_quantized(holder.model.model.layers[0].mlp.up_proj)


CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama": ("llama", AutoModelForCausalLM, {}),
    "dora": ("llama", AutoModelForCausalLM, {"config": engine.lora_config(DORA)}),
    "class": ("llama", LlamaForCausalLM, {"dtype": "bfloat16"}),
    "tied": ("tied", AutoModelForCausalLM, {}),
    "fresh head": ("backbone", AutoModelForSequenceClassification, {"num_labels": 3}),
    "t5": ("t5", T5ForConditionalGeneration, {"dtype": torch.float16}),
}


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_model_that_was_loaded_dense(
    case: str, double: bool, folders: dict[str, Path]
) -> None:
    name, auto, given = CASES[case]
    settings = engine.quantization_config(
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    )
    dense, before = load(auto, folders[name], settings, **given, **DENSE)
    streamed, after = load(auto, folders[name], settings, **given)
    assert (before, after) == (False, True)
    assert [type(m) for m in streamed.modules()] == [type(m) for m in dense.modules()]
    a, b = dense.state_dict(), streamed.state_dict()
    assert list(a) == list(b)
    for key, value in a.items():
        assert value.dtype == b[key].dtype, key
        if "lora_A" in key:
            # PEFT makes factors in the dtype of a dense weight, and these never were in it.
            assert torch.equal(value, b[key].to(a_dtype(dense, key)).float()), key
        else:
            assert torch.equal(value, b[key]), key
    assert {n: p.requires_grad for n, p in dense.named_parameters()} == {
        n: p.requires_grad for n, p in streamed.named_parameters()
    }
    assert streamed.model.config.to_dict() == dense.model.config.to_dict()
    old, new = (engine.require_record(m).parts["model"] for m in (dense, streamed))
    assert (new.base, new.heads, new.quantized) == (old.base, old.heads, old.quantized)
    assert new.quantization == old.quantization
    assert str(engine.report(streamed)) == str(engine.report(dense))
    switches = ("is_quantized", "hf_quantizer", "quantization_method", "is_loaded_in_4bit")
    for switch in switches:
        assert getattr(streamed.model, switch, None) == getattr(dense.model, switch, None)


def a_dtype(module: nn.Module, key: str) -> torch.dtype:
    layer: Any = module.get_submodule(key.partition(".lora_A")[0])
    return layer._parameters["weight"].quant_state.dtype


def test_heads_skipped_and_saved_modules_stay_dense(folders: dict[str, Path]) -> None:
    settings = engine.quantization_config(
        {"load_in_4bit": True, "llm_int8_skip_modules": ["down_proj"]}
    )
    config = engine.lora_config(LoRAFields(r=4, modules_to_save=["o_proj"]))
    holder = Holder()
    with engine.loading_for_injection(holder, config, settings, None, CPU):
        holder.model = AutoModelForSequenceClassification.from_pretrained(
            folders["backbone"], num_labels=3, dtype="bfloat16"
        )
    kinds = {
        name.rpartition(".")[2]: is_quantized(layer)
        for name, layer in holder.model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    dense = {"down_proj", "o_proj", "score"}
    assert {name for name, quantized in kinds.items() if not quantized} == dense
    assert len(kinds) == 8
    assert holder.model.score.weight.requires_grad
    assert holder.model.score.weight.any()


CONFIGS = {
    "pissa": {"config": {"init_lora_weights": "pissa"}},
    "8 bits": {"settings": {"load_in_8bit": True}},
    "adapt": {"adapt": ["model"]},
    "dtype of the file": {"given": {"dtype": "auto"}},
    "no dtype": {"given": {"dtype": None}},
    "own device": {"given": {"device_map": "cpu"}},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_where_the_weights_are_loaded_dense(case: str, folders: dict[str, Path]) -> None:
    wanted: dict[str, Any] = CONFIGS[case]
    config = engine.lora_config(LoRAFields(r=4, **wanted.get("config", {})))
    settings = engine.quantization_config(**wanted.get("settings", {}))
    holder = Holder()
    with engine.loading_for_injection(holder, config, settings, wanted.get("adapt"), CPU):
        given = {"dtype": "bfloat16", **wanted.get("given", {})}
        holder.model = AutoModelForCausalLM.from_pretrained(folders["llama"], **given)
    assert not any(is_quantized(layer) for layer in holder.modules())


def test_the_users_own_quantization_is_theirs(folders: dict[str, Path]) -> None:
    own = engine.quantization_config(bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype="float32")
    holder = Holder()
    with engine.loading_for_injection(
        holder, engine.lora_config(), engine.quantization_config(), None, CPU
    ):
        holder.model = AutoModelForCausalLM.from_pretrained(
            folders["llama"], dtype="bfloat16", quantization_config=own
        )
    layer = holder.model.model.layers[0].mlp.up_proj
    assert type(layer) is bnb.nn.Linear4bit
    assert layer.weight.quant_state.quant_type == "fp4"
    assert holder.model.config.quantization_config.bnb_4bit_quant_type == "fp4"


def test_from_pretrained_is_put_back(folders: dict[str, Path]) -> None:
    method = PreTrainedModel.__dict__["from_pretrained"]
    other: list[bool] = []

    def elsewhere() -> None:
        model = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype="bfloat16")
        other.append(any(is_quantized(layer) for layer in model.modules()))

    settings = (engine.lora_config(), engine.quantization_config(), None, CPU)

    def failing() -> None:
        with engine.loading_for_injection(Holder(), *settings):
            assert PreTrainedModel.__dict__["from_pretrained"] is not method
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            with engine.loading_for_injection(Holder(), *settings):
                pass
            assert PreTrainedModel.__dict__["from_pretrained"] is not method
            AutoModelForCausalLM.from_pretrained(folders["llama"] / "nowhere")

    with pytest.raises(OSError, match="nowhere"):
        failing()
    assert PreTrainedModel.__dict__["from_pretrained"] is method
    assert other == [False]


def test_a_model_that_is_no_part_is_refused(folders: dict[str, Path]) -> None:
    """It would have been left dense."""
    holder = Holder()

    def build() -> None:
        settings = (engine.lora_config(), engine.quantization_config(), None, CPU)
        given = {"dtype": "bfloat16"}
        with engine.loading_for_injection(holder, *settings):
            holder.model = AutoModelForCausalLM.from_pretrained(folders["llama"], **given)
            holder.__dict__["teacher"] = AutoModel.from_pretrained(folders["llama"], **given)

    with pytest.raises(UnsupportedError, match=r"layers\.0\.(.|\n)*device_map=\{'': 'cpu'\}"):
        build()


def test_copies_are_what_they_copy(folders: dict[str, Path]) -> None:
    streamed, _ = load(AutoModelForCausalLM, folders["llama"])
    other = copy.deepcopy(streamed)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(other.model(ids).logits, streamed.model(ids).logits)


def test_a_weight_that_is_not_in_the_file_is_quantized_afterwards(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(folders["llama"])
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.up_proj" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    dense, _ = load(AutoModelForCausalLM, tmp_path, **DENSE)
    streamed, _ = load(AutoModelForCausalLM, tmp_path)
    for holder in (dense, streamed):
        assert is_quantized(holder.model.model.layers[1].mlp.up_proj)
    layers = [h.model.model.layers[1].mlp.up_proj._parameters["weight"] for h in (dense, streamed)]
    assert torch.equal(layers[0], layers[1])
