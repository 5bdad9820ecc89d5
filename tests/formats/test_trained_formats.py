"""Bases that other libraries quantized, trained from start to end.

`make test-formats` installs the libraries.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import peft
import pytest
import torch
from models import llama_config
from packed_bases import CASES as PACKED
from torch.utils.data import DataLoader
from trainer_fixtures import QUIET
from transformers import AutoModelForCausalLM, LlamaForCausalLM, QuantoConfig, TorchAoConfig

import lightning_peft
from lightning_peft import LoRAStrategy, QLoRAStrategy
from lightning_peft.engine.backends.registry import backend_of, is_quantized, storage_bytes
from lightning_peft.errors import CheckpointError, LifecycleError, UnsupportedError
from lightning_peft.plan.prediction import plan_memory

ROUNDING = {torch.float32: 1e-5, torch.float16: 0.003, torch.bfloat16: 0.025}
PLANNED_BY_NAME = ("TorchAoConfig", "CompressedTensorsConfig", "AwqConfig", "AqlmConfig")
IDS = torch.arange(7, 19).repeat(8, 1)
Load = Callable[[], Any]


def dense(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = llama_config(hidden_size=128, intermediate_size=160, tie_word_embeddings=False)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def torchao(config: str, **arguments: Any) -> Callable[[Path], Load]:
    def make(folder: Path) -> Load:
        pytest.importorskip("torchao")
        import torchao.quantization as library

        given = TorchAoConfig(getattr(library, config)(**arguments))
        model = AutoModelForCausalLM.from_pretrained(
            dense(folder / "dense", torch.bfloat16), quantization_config=given
        )
        model.save_pretrained(folder / "stored")
        return lambda: AutoModelForCausalLM.from_pretrained(folder / "stored")

    return make


def quanto(weights: str) -> Callable[[Path], Load]:
    def make(folder: Path) -> Load:
        pytest.importorskip("optimum.quanto")
        saved, config = dense(folder), QuantoConfig(weights=weights)
        return lambda: AutoModelForCausalLM.from_pretrained(saved, quantization_config=config)

    return make


def compressed(
    layout: str, inputs: dict[str, Any] | None = None, **weights: Any
) -> Callable[[Path], Load]:
    def make(folder: Path) -> Load:
        pytest.importorskip("compressed_tensors")
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            apply_quantization_config,
        )
        from compressed_tensors.quantization.utils import calculate_qparams

        model = LlamaForCausalLM.from_pretrained(dense(folder / "dense", torch.bfloat16))
        args = QuantizationArgs(symmetric=True, **weights)
        acts = QuantizationArgs(**inputs) if inputs else None
        scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=acts)
        groups = {"config_groups": {"all": scheme}, "ignore": ["lm_head"]}
        config = QuantizationConfig(**groups, quantization_status="frozen", format=layout)
        apply_quantization_config(model, config)
        for layer in model.modules():
            if getattr(layer, "quantization_scheme", None) is None:
                continue
            scale = layer.weight_scale
            rows, columns = scale.shape if scale.ndim == 2 else (1, 1)
            blocks = layer.weight.float().unflatten(1, (columns, -1)).unflatten(0, (rows, -1))
            ends = (blocks.amin((1, 3)), blocks.amax((1, 3)))
            scale.data.copy_(calculate_qparams(*(e.view(scale.shape) for e in ends), args)[0])
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(folder / "stored")
        compressor.update_config(folder / "stored")
        return lambda: AutoModelForCausalLM.from_pretrained(folder / "stored")

    return make


TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
BLOCKS = {"strategy": "block", "block_structure": [32, 32]}
# By format, with bytes per weight including scales.
CASES: dict[str, tuple[Callable[[Path], Load], float]] = {
    "torchao-int8": (torchao("Int8WeightOnlyConfig"), 1.1),
    "torchao-float8": (torchao("Float8WeightOnlyConfig"), 1.1),
    "torchao-intx": (torchao("IntxWeightOnlyConfig"), 1.3),
    "quanto-int8": (quanto("int8"), 1.1),
    "quanto-float8": (quanto("float8"), 1.1),
    "quanto-int4": (quanto("int4"), 0.8),
    "quanto-int2": (quanto("int2"), 0.55),
    "compressed-w4": (
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
        0.6,
    ),
    "compressed-w3": (
        compressed("pack-quantized", num_bits=3, type="int", strategy="channel"),
        0.45,
    ),
    "compressed-w8": (
        compressed("pack-quantized", num_bits=8, type="int", strategy="channel"),
        1.1,
    ),
    "compressed-int8": (
        compressed("naive-quantized", num_bits=8, type="int", strategy="channel"),
        1.1,
    ),
    "compressed-float8": (
        compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
        1.1,
    ),
    "compressed-blocks": (compressed("float-quantized", num_bits=8, type="float", **BLOCKS), 1.1),
    # With inputs that are rounded too.
    "torchao-w8a8": (torchao("Int8DynamicActivationInt8WeightConfig"), 1.1),
    "torchao-intx-a8": (torchao("Int8DynamicActivationIntxWeightConfig"), 1.3),
    "compressed-w8a8": (
        compressed("int-quantized", TOKENS, num_bits=8, type="int", strategy="channel"),
        1.1,
    ),
}
CASES |= PACKED


@pytest.fixture(scope="module", params=CASES)
def base(request: Any, tmp_path_factory: Any) -> tuple[Load, float]:
    make, size = CASES[request.param]
    return make(tmp_path_factory.mktemp("base")), size


class Module(L.LightningModule):
    """A causal language model that fits eight rows."""

    def __init__(self, load: Load) -> None:
        super().__init__()
        self.load, self.losses = load, []
        self.model = load()

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


def fit(load: Load, folder: Path, strategy: Any, steps: int = 8, **given: Any) -> Any:
    torch.manual_seed(0)
    module, start = Module(load), given.pop("ckpt_path", None)
    if given.pop("checkpointing", False):
        module.model.activation_checkpointing_enable()
    # A checkpoint after each step: small ones, which hold adapters and optimizer.
    saver = L.callbacks.ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = L.Trainer(
        max_steps=steps,
        strategy=strategy,
        callbacks=[saver],
        accelerator="cpu",
        **{**QUIET, **given},
    )
    trainer.fit(module, DataLoader(IDS, 4), ckpt_path=start)
    return module


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits.float()


def test_output_and_gradient_are_those_of_the_stored_weights(base: Any) -> None:
    load, size = base
    theirs, mine = logits(load()), load()
    lightning_peft.inject(mine, r=4)
    difference = (logits(mine) - theirs).abs().max() / theirs.abs().max()
    # In bfloat16 the libraries compute scales of inputs in that dtype.
    assert difference < ROUNDING[mine.dtype]
    for layer in (one for one in mine.model.modules() if is_quantized(one)):
        stored = layer._parameters["weight"]
        backend = backend_of(stored)
        weight = backend.dequantize(stored, torch.float32)
        assert storage_bytes(stored) < size * weight.numel()
        x = torch.randn(3, weight.shape[1], requires_grad=True)
        wanted = torch.randn(3, weight.shape[0])
        backend.matmul(layer, x, stored, None).backward(wanted)
        assert x.grad.allclose(wanted @ weight, atol=1e-5)
    loss = mine.train()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    found = [p for p in mine.parameters() if p.requires_grad]
    assert found
    assert all(p.grad is not None for p in found)


def test_a_run_is_resumed_exactly_verified_and_merged(base: Any, tmp_path: Path) -> None:
    load, _ = base
    straight = fit(load, tmp_path / "all", LoRAStrategy(r=4), checkpointing=True)
    assert straight.losses[-1] < straight.losses[0] - 0.3
    saved = tmp_path / "all" / "step=4.ckpt"
    kept = torch.load(saved, weights_only=True)["state_dict"]
    adapters = sum(p.numel() for p in straight.parameters() if p.requires_grad)
    # Besides two that stop a load without this package.
    assert adapters <= sum(torch.as_tensor(one).numel() for one in kept.values()) <= adapters + 2
    resumed = fit(load, tmp_path / "rest", LoRAStrategy(r=4), ckpt_path=saved)
    assert resumed.losses == straight.losses[4:]
    expected = logits(straight.model)
    lightning_peft.save_adapter(straight, tmp_path / "adapter")
    # The same base and no other.
    again = Module(load)
    lightning_peft.load_adapter(again, tmp_path / "adapter")
    assert logits(again.model).equal(expected)
    other = Module(lambda: LlamaForCausalLM(load().config).to(load().dtype))
    with pytest.raises(CheckpointError):
        lightning_peft.load_adapter(other, tmp_path / "adapter")
    result = lightning_peft.verify(straight, IDS[:2], step=lambda m, b: m.training_step(b, 0))
    result.raise_if_failed()
    lightning_peft.merge(straight)
    rounding = 1.5 * ROUNDING[straight.model.dtype]
    merged = logits(straight.model)
    assert (merged - expected).abs().max() < rounding * expected.abs().max()
    lightning_peft.unload(straight)
    straight.model.save_pretrained(tmp_path / "merged")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=straight.model.dtype)
    assert not is_quantized(read.model.layers[0].mlp.up_proj)
    assert logits(read).equal(merged)
    lightning_peft.unload(again)
    with pytest.raises(LifecycleError, match="stand in for those of the library"):
        again.model.save_pretrained(tmp_path / "base")


def test_a_plan_counts_what_is_stored(base: Any) -> None:
    load, size = base
    model, batch = load(), {"input_ids": IDS, "labels": IDS}
    planned = plan_memory(model, batch, method="lora", lora={"r": 4}).breakdown
    config = getattr(model.config, "quantization_config", None)
    # In files of the others, the config does not say which layers hold the weights once loaded.
    if type(config).__name__ in PLANNED_BY_NAME:
        sizes = {"batch_size": len(IDS), "seq_len": IDS.shape[1]}
        name = str(model.config.name_or_path)
        named = plan_memory(name, method="lora", lora={"r": 4}, **sizes).breakdown
        assert named["weights_quantized"] == planned["weights_quantized"]
        assert named["weights_dense"] == planned["weights_dense"]
    lightning_peft.inject(model, r=4)
    stored = [layer._parameters["weight"] for layer in model.modules() if is_quantized(layer)]
    assert planned["weights_quantized"] == sum(map(storage_bytes, stored))
    assert plan_memory(model, batch, method="lora").breakdown == planned


def test_qlora_keeps_what_is_quantized_in_bf16(base: Any, tmp_path: Path) -> None:
    load, _ = base
    module = fit(load, tmp_path, QLoRAStrategy(r=4), precision="bf16-mixed")
    assert module.losses[-1] < module.losses[0] - 0.3
    layer = module.model.model.layers[0].mlp.up_proj
    assert backend_of(layer._parameters["weight"]).name != "bitsandbytes"


def test_peft_reads_the_adapter_on_the_same_base(base: Any, tmp_path: Path) -> None:
    load, _ = base
    model = load()
    module = torch.nn.ModuleDict({"model": model})
    lightning_peft.inject(module, r=4)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.05)
    expected = logits(model)
    lightning_peft.save_adapter(module, tmp_path / "adapter")
    folder = next((tmp_path / "adapter").rglob("adapter_config.json")).parent
    again = load()
    # compressed-tensors makes packed weights dense in the first pass: PEFT reads a `weight`.
    logits(again)
    if "auto_round" in type(again.model.layers[0].mlp.up_proj).__module__:
        with pytest.raises(ValueError, match="QuantLinear.. is not supported"):
            peft.PeftModel.from_pretrained(again, folder)
        return
    theirs = peft.PeftModel.from_pretrained(again, folder)
    assert (logits(theirs) - expected).abs().max() < 0.05 * expected.abs().max()
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_layout_that_cannot_be_read_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model = torchao("Int8WeightOnlyConfig")(tmp_path)()
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.act_pre_scale = torch.ones(1)
    classes = [type(layer) for layer in model.modules()]
    with pytest.raises(UnsupportedError, match=r"layers.1.mlp.up_proj: torchao's .* by fixed"):
        lightning_peft.inject(model, r=4)
    assert [type(layer) for layer in model.modules()] == classes
    weight.act_pre_scale = None
    lightning_peft.inject(model, r=4)


def test_torchao_int4_is_read_as_its_kernels_read_it() -> None:
    library = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    codes, scale, zero = torch.randint(-8, 8, (6, 64)), torch.rand(2, 6), torch.randn(2, 6)
    packed = (codes[:, 1::2] << 4 | codes[:, ::2] & 15).to(torch.int8)
    bf16 = [one.to(torch.bfloat16) for one in (scale, zero)]
    weight = library.Int4Tensor(packed, *bf16, block_size=[1, 32], shape=torch.Size((6, 64)))
    model = torch.nn.Sequential(torch.nn.Linear(64, 6, device="meta"))
    model[0].weight = torch.nn.Parameter(weight, requires_grad=False)
    model[0].bias = torch.nn.Parameter(torch.zeros(6))
    lightning_peft.inject(model, r=2, target_modules=["0"])
    # mslk, which has the kernels: 4-bit values in two's complement, zeros in units of the weight.
    groups = torch.arange(64) // 32
    meant = codes * bf16[0].float()[groups].t() + bf16[1].float()[groups].t()
    stored = model[0]._parameters["weight"]
    assert backend_of(stored).dequantize(stored, torch.float32).allclose(meant, atol=1e-6)
