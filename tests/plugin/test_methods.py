"""Methods besides LoRA and NF4, through a Trainer and back."""

from __future__ import annotations

import pytest
import torch
from modules import ROOTS, loader, outputs, resumed, saver, strategy, task, task_class
from modules import trainer as make_trainer
from peft import IA3Config, LoraConfig
from toy_backend import ToyConfig, ToyLayer
from toy_method import SCALING, ScaledLinear
from transformers import BitsAndBytesConfig

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.methods import registry
from lightning_peft.errors import CheckpointError, ConfigError, LifecycleError

SCALED = ["v_proj", "down_proj"]
METHODS = {
    "rslora": ("lora", {"use_rslora": True}),
    "dora": ("lora", {"use_dora": True}),
    "dora on nf4": ("qlora", {"use_dora": True}),
    "pissa": ("lora", {"init_lora_weights": "pissa"}),
    "pissa on nf4": ("qlora", {"init_lora_weights": "pissa"}),
    "int8": ("qlora", {"load_in_8bit": True}),
    "fp4": ("qlora", {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}),
    "in full besides": ("lora", {"modules_to_save": ["norm", "head"], "bias": "all"}),
    "loha": ("lora", {"r": 16, "peft_config": {"peft_type": "LOHA", "r": 4}}),
    "vera on nf4": ("qlora", {"r": 16, "peft_config": {"peft_type": "VERA", "r": 4}}),
    "ready config": ("lora", {"r": 16, "peft_config": LoraConfig(r=3, lora_dropout=0.0)}),
    "third backend": (
        "qlora",
        {"quantization_config": {"quant_method": "toy_int8", "levels": 127}, "verify": "full"},
    ),
    "method in place": (
        "qlora",
        {
            "r": 16,
            "peft_config": IA3Config(target_modules=SCALED, feedforward_modules=SCALED[1:]),
            "verify": "full",
        },
    ),
    "ready quantization": (
        "qlora",
        {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")},
    ),
}


# What the layers are extended by in the rows whose backend or method lives in the tests.
OWN = {"third backend": ToyLayer, "method in place": ScaledLinear}


@pytest.fixture(autouse=True)
def _scaling(monkeypatch):
    monkeypatch.setitem(registry.METHODS, "IA3", SCALING)


@pytest.mark.parametrize("name", METHODS)
def test_there_and_back(name, tmp_path):
    method, settings = METHODS[name]
    kind = "llama" if name in ("int8", "method in place") else "linears"

    def fit(ckpt_path=None, callbacks=()):
        torch.manual_seed(5 if ckpt_path is None else 1000)
        module = task(kind=kind)
        ours = strategy(method, **settings)
        run = make_trainer(tmp_path / "root", ours, max_epochs=2, callbacks=list(callbacks))
        run.fit(module, loader(kind, shuffle=True), ckpt_path=ckpt_path)
        return module

    module, found = resumed(fit, tmp_path, 4, steps=(4,))
    assert len(found[4].losses) == 8
    assert any(isinstance(child, OWN.get(name, torch.nn.Module)) for child in module.modules())
    assert not torch.equal(outputs(module, kind), outputs(task(kind=kind), kind))
    loaded = lightning_peft.load_from_checkpoint(task_class(ROOTS[0]), tmp_path / "step=12.ckpt")
    assert torch.equal(outputs(loaded, kind), outputs(module, kind))
    module.trainer.validate(loaded, loader(kind), verbose=False)


def test_random_projections_stay_in_float32(tmp_path):
    module = task()
    ours = strategy("lora", r=16, peft_config={"peft_type": "VERA", "r": 4})
    make_trainer(tmp_path, ours, precision="bf16-true").fit(module, loader())
    layer = module.model.layers[0]
    assert layer.vera_A["default"].dtype == layer.vera_lambda_b["default"].dtype == torch.float32
    assert bool(layer.vera_lambda_b["default"].any())


def test_an_adapter_from_a_folder_is_trained_on(tmp_path):
    module = task(kind="llama")
    points = saver(ROOTS[0], tmp_path, filename="one")
    make_trainer(tmp_path / "root", callbacks=[points]).fit(module, loader("llama"))
    folder = tmp_path / "adapters" / "one"
    loaded = task(kind="llama")
    lightning_peft.load_adapter(loaded, folder, is_trainable=True)
    assert torch.equal(outputs(loaded, "llama"), outputs(module, "llama"))
    make_trainer(tmp_path / "root").fit(loaded, loader("llama"))
    assert not torch.equal(outputs(loaded, "llama"), outputs(module, "llama"))
    frozen = task(kind="llama")
    lightning_peft.load_adapter(frozen, folder)
    make_trainer(tmp_path / "root").validate(frozen, loader("llama"), verbose=False)
    with pytest.raises(LifecycleError, match="is_trainable=True"):
        make_trainer(tmp_path / "root").fit(frozen, loader("llama"))


def test_a_second_adapter_is_not_in_the_file_of_one(tmp_path):
    module = task()
    run = make_trainer(tmp_path)
    run.fit(module, loader())
    lightning_peft.inject(module, adapter_name="second", r=2)
    run.save_checkpoint(tmp_path / "two.ckpt")
    assert (tmp_path / "adapters" / "two" / "second" / "adapter_config.json").is_file()
    with pytest.raises(CheckpointError, match="adapter 'second' is in the checkpoint only"):
        make_trainer(tmp_path).validate(task(), loader(), ckpt_path=tmp_path / "two.ckpt")
    loaded = lightning_peft.load_from_checkpoint(task_class(ROOTS[0]), tmp_path / "two.ckpt")
    assert engine.require_record(loaded).adapter_names == ["default", "second"]
    assert torch.equal(outputs(loaded), outputs(module))


def test_a_config_of_no_backend_is_refused():
    with pytest.raises(ConfigError, match="quant_method='higgs'"):
        strategy("qlora", quantization_config={"quant_method": "higgs"})
    with pytest.raises(ConfigError, match="Both `quantization_config` and"):
        strategy("qlora", quantization_config=ToyConfig(), load_in_8bit=True)
