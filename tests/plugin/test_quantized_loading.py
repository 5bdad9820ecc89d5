"""``from_pretrained`` in ``configure_model`` under QLoRA: no dense weight, all else the same."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from models import llama_config, saved_in_shards
from modules import ROOTS, differing, lightning, loader, saver, strategy, trainer, weights
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lightning_peft import QLoRACallback, QLoRAStrategy, engine, load_from_checkpoint
from lightning_peft.engine.backends.layers import QuantizedLayer
from lightning_peft.engine.loading import quantized_cache
from lightning_peft.errors import BaseMismatchError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sharded Llama in float32."""
    torch.manual_seed(0)
    config = llama_config(vocab_size=64, pad_token_id=0, intermediate_size=128)
    return saved_in_shards({"llama": LlamaForCausalLM(config)}, tmp_path_factory, "60KB")["llama"]


class Loaded(lightning(ROOTS[0]).LightningModule):
    """Loads what it trains in ``configure_model``, and looks at what it got."""

    def __init__(self, folder: str, labels: int = 0, dense: bool = False):
        super().__init__()
        self.save_hyperparameters()
        self.model, self.losses, self.seen = None, [], {}

    def configure_model(self):
        if self.model is not None:
            return
        auto, given = AutoModelForCausalLM, {}
        if self.hparams["labels"]:
            auto = AutoModelForSequenceClassification
            given["num_labels"] = self.hparams["labels"]
        if self.hparams["dense"]:
            given["device_map"] = {"": "cpu"}
        self.model = auto.from_pretrained(self.hparams["folder"], dtype="bfloat16", **given)
        self.before = {
            name: getattr(self.model, name).weight.clone()
            for name in ("score", "lm_head")
            if hasattr(self.model, name)
        }
        self.seen = {
            name: (type(layer), layer._parameters["weight"].dtype)
            for name, layer in self.model.named_modules()
            if isinstance(layer, nn.Linear)
        }

    def training_step(self, batch, batch_idx):
        ids = batch["ids"]
        labels = ids[:, 0] % 3 if self.hparams["labels"] else ids
        loss = self.model(input_ids=ids, labels=labels).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        ids = batch["ids"]
        labels = ids[:, 0] % 3 if self.hparams["labels"] else ids
        self.log("val_loss", self.model(input_ids=ids, labels=labels).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def data():
    return DataLoader(loader("llama").dataset, batch_size=4)


def fit(module, root, method="qlora", ckpt_path=None, callbacks=(), **given):
    ours = strategy(method, lora_dropout=0.1) if isinstance(method, str) else method[0]
    more = [] if isinstance(method, str) else [method[1]]
    torch.manual_seed(2)
    run = trainer(root, ours, max_epochs=2, callbacks=[*callbacks, *more], **given)
    torch.manual_seed(3)
    run.fit(module, data(), data(), ckpt_path=ckpt_path)
    return run


@pytest.mark.parametrize("labels", [0, 3])
@pytest.mark.parametrize("by", ["strategy", "callback"])
def test_no_dense_weight_of_a_target_ever_exists(by, labels, folder, tmp_path):
    method = PreTrainedModel.__dict__["from_pretrained"]
    module = Loaded(str(folder), labels)
    how = "qlora" if by == "strategy" else ("auto", QLoRACallback(r=4, announce=False))
    fit(module, tmp_path, how)
    head = "score" if labels else "lm_head"
    targets = {name for name in module.seen if name != head}
    assert len(targets) == 14
    for name, (kind, dtype) in module.seen.items():
        assert issubclass(kind, (QuantizedLayer, bnb.nn.Linear4bit)) is (name in targets)
        assert dtype == (torch.uint8 if name in targets else torch.bfloat16)
    adapted = set(engine.adapted_layers(module.model))
    assert adapted == targets
    assert len(module.losses) == 12
    assert module.losses[-1] < module.losses[0]
    # A fresh head trains; output embeddings are as pretrained as the rest.
    layer = module.model.get_submodule(head)
    assert torch.equal(layer.weight, module.before[head]) is not bool(labels)
    assert layer.weight.requires_grad is bool(labels)
    assert PreTrainedModel.__dict__["from_pretrained"] is method


def test_training_is_that_of_a_model_loaded_dense(folder, tmp_path):
    streamed, dense = Loaded(str(folder)), Loaded(str(folder), dense=True)
    runs = [fit(module, tmp_path) for module in (streamed, dense)]
    assert {kind for kind, _ in dense.seen.values()} == {nn.Linear}
    # The factors of the one start out rounded to the dtype of the dense weights.
    torch.testing.assert_close(streamed.losses, dense.losses, rtol=0.02, atol=0.02)
    assert streamed.losses[0] == dense.losses[0]
    a, b = weights(streamed), weights(dense)
    frozen = engine.record_of(streamed).frozen
    assert frozen == engine.record_of(dense).frozen
    assert all(torch.equal(a[name], b[name]) for name in frozen)
    values = [
        run.validate(module, data(), verbose=False)[0]
        for run, module in zip(runs, (streamed, dense), strict=True)
    ]
    assert values[0]["val_loss"] == pytest.approx(values[1]["val_loss"], abs=0.05)


def test_its_checkpoints_fit_it_and_a_model_loaded_dense(folder, tmp_path):
    points = saver(ROOTS[0], tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    expected = Loaded(str(folder))
    fit(expected, tmp_path / "root", callbacks=[points])
    files = [tmp_path / f"step={step}.ckpt" for step in (6, 12)]
    for dense in (False, True):
        resumed = Loaded(str(folder), dense=dense)
        fit(resumed, tmp_path / "root", ckpt_path=files[0])
        assert resumed.losses == expected.losses[6:]
        a, b = weights(resumed), weights(expected)
        assert not differing(a, b)
        fresh = Loaded(str(folder), dense=dense)
        run = trainer(tmp_path / "root", "qlora")
        run.validate(fresh, data(), ckpt_path=files[1], verbose=False)
        assert not differing(weights(fresh), b)
    again = load_from_checkpoint(Loaded, files[1])
    assert {dtype for _, dtype in again.seen.values()} == {torch.bfloat16}
    assert not differing(weights(again), weights(expected))


def test_another_base_is_found(folder, tmp_path):
    run = fit(Loaded(str(folder)), tmp_path)
    run.save_checkpoint(tmp_path / "one.ckpt")
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    other = trainer(tmp_path, "qlora")
    with pytest.raises(BaseMismatchError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        other.validate(Loaded(str(tmp_path / "other")), data(), ckpt_path=tmp_path / "one.ckpt")


def test_from_pretrained_is_put_back_when_building_fails(folder, tmp_path):
    method = PreTrainedModel.__dict__["from_pretrained"]

    class Failing(Loaded):
        def configure_model(self):
            super().configure_model()
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        fit(Failing(str(folder)), tmp_path)
    assert PreTrainedModel.__dict__["from_pretrained"] is method


@pytest.mark.parametrize("by", ["strategy", "callback"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_second_start_is_the_first(by, precision, folder, tmp_path, monkeypatch, capsys):
    """Lightning changes the default dtype around ``configure_model`` under ``bf16-true``."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(quantized_cache, "SMALLEST", 0)

    def run(cached):
        module = Loaded(str(folder))
        if by == "strategy":
            how = (QLoRAStrategy(r=4, announce=False, cache_quantized_base=cached), [])
        else:
            how = ("auto", [QLoRACallback(r=4, announce=False, cache_quantized_base=cached)])
        torch.manual_seed(2)
        made = trainer(tmp_path, how[0], max_epochs=1, callbacks=how[1], precision=precision)
        torch.manual_seed(3)
        made.fit(module, data(), data())
        return module

    bases = tmp_path / "cache" / "lightning-peft" / "bases"
    plain = run(False)
    assert not bases.exists()
    first = run(True)
    assert f"in {bases}" in "".join(capsys.readouterr().out.split("\n")).replace("  ", " ")
    second = run(True)
    assert len(list(bases.iterdir())) == 1
    assert "kept for the next start" not in capsys.readouterr().out
    assert plain.losses == first.losses == second.losses
    for module in (first, second):
        assert not differing(weights(plain), weights(module))
