"""Every kind of model, built in every place, through every stage."""

from __future__ import annotations

import pytest
import torch
from modules import (
    PLACES,
    ROOTS,
    build,
    differing,
    lightning,
    loader,
    outputs,
    rows,
    saver,
    strategy,
    task,
    task_class,
    trainer,
    weights,
)
from peft import LoHaConfig

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import LifecycleError

KINDS = ("llama", "llama_tied", "gpt2", "linears")
# Each method and each Lightning meets each kind and each place; not all products.
MATRIX = [
    pytest.param(kind, place, ("lora", "qlora")[(i + j) % 2], ROOTS[(i + j // 2) % 2])
    for i, kind in enumerate(KINDS)
    for j, place in enumerate(PLACES)
]


def adapters(module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if ".lora_" in n}


@pytest.mark.parametrize(("kind", "place", "method", "root"), MATRIX)
def test_all_stages(kind, place, method, root, tmp_path):
    best = saver(root, tmp_path / "best", monitor="val_loss", save_last=True)
    small = saver(root, tmp_path / "small", save_weights_only=True)
    module = task(root, place, kind)
    run = trainer(tmp_path, method, root, callbacks=[best, small], max_epochs=3)
    run.fit(module, loader(kind, shuffle=True), loader(kind))
    assert sum(module.losses[-6:]) < sum(module.losses[:6])
    trained = adapters(module)
    assert trained
    assert all(value.any() for name, value in trained.items() if "lora_B" in name)
    expected = outputs(module, kind)
    score, files = float(best.best_model_score), (best.best_model_path, small.best_model_path)

    # The same trainer: where the module is, and from files.
    for ckpt_path in (None, "best", "last"):
        results = run.validate(module, loader(kind), ckpt_path=ckpt_path, verbose=False)
        assert results[0]["val_loss"] == pytest.approx(score, abs=1e-6)
    assert run.test(module, loader(kind), ckpt_path="best", verbose=False)
    assert not differing(adapters(module), trained)
    predictions = run.predict(module, loader(kind))
    assert torch.equal(predictions[0], expected)

    # A fresh trainer and a fresh module, from the best and from a file of weights only.
    for path in files:
        fresh = task(root, place, kind)
        other = trainer(tmp_path, method, root)
        other.validate(fresh, loader(kind), ckpt_path=path, verbose=False)
        assert not differing(adapters(fresh), trained)
        assert torch.equal(outputs(fresh, kind), expected)
        assert "configure_model" not in fresh.__dict__
    assert "configure_model" not in module.__dict__


@pytest.mark.parametrize("place", PLACES)
def test_fits_follow_each_other(place, tmp_path):
    module = task(place=place)
    run = trainer(tmp_path, "qlora")
    run.fit(module, loader())
    first = adapters(module)
    frozen = {n: v for n, v in weights(module).items() if "layers" in n and ".lora_" not in n}
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())
    assert len(module.losses) == 12
    second = adapters(module)
    assert len(differing(first, second)) == len(first)
    trainer(tmp_path, "qlora").fit(module, loader())
    assert len(module.losses) == 18
    assert len(differing(second, adapters(module))) == len(first)
    assert frozen
    assert not differing(frozen, {name: weights(module)[name] for name in frozen})


OTHER_SETTINGS = [
    ("lora", {"r": 8}, "r=4, asked for 8"),
    ("lora", {"lora_dropout": 0.5}, r"lora_dropout=0\.0, asked for 0\.5"),
    ("lora", {"target_modules": ["layers.0"]}, r"model\.layers\.1: has an adapter, not asked for"),
    ("lora", {"target_modules": ["head", "layers.0", "layers.1"]}, r"model\.head: no adapter, as"),
    ("lora", {"adapt": "model"}, r"adapt=\[''\], asked for \['model'\]"),
    ("qlora", {}, r"quantization is None, asked for {"),
]


@pytest.mark.parametrize(("method", "settings", "message"), OTHER_SETTINGS)
def test_other_settings_for_the_same_module_are_refused(method, settings, message, tmp_path):
    module = task()
    trainer(tmp_path, strategy("lora")).fit(module, loader())
    with pytest.raises(LifecycleError, match=message):
        trainer(tmp_path, strategy(method, **settings)).fit(module, loader())
    # The same layers in other words are the same.
    trainer(tmp_path, strategy("lora", target_modules=["layers.1", "layers.0"])).fit(
        module, loader()
    )


def test_merged_wrappers_and_other_settings_of_another_method_are_refused(tmp_path):
    def loha(**settings):
        config = LoHaConfig(target_modules=["layers.0"], r=4, **settings)
        return trainer(tmp_path, lightning_peft.LoRAStrategy(peft_config=config, announce=False))

    module = task()
    loha().fit(module, loader())
    with pytest.raises(LifecycleError, match=r"alpha_pattern=\{\}, asked for \{'layers.0': 2\}"):
        loha(alpha_pattern={"layers.0": 2}).fit(module, loader())
    lightning_peft.merge(module)
    with pytest.raises(LifecycleError, match=r"have their adapters merged(.|\n)*layers\.0"):
        loha().fit(module, loader())


def rebuilding_class(place: str):
    """A module that rebuilds its layers in every stage."""
    base = task_class(ROOTS[0], "nowhere")

    def rebuild(self, stage=None):
        self.model = build(self.kind)

    return type("Rebuilding", (base,), {place: rebuild})


@pytest.mark.parametrize("place", ["setup", "configure_model"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_module_rebuilt_without_a_checkpoint_is_refused(place, method, tmp_path):
    callback = saver(ROOTS[0], tmp_path)
    module = rebuilding_class(place)()
    run = trainer(tmp_path, method, callbacks=[callback], max_epochs=2)
    run.fit(module, loader())
    trained, expected = adapters(module), outputs(module)
    with pytest.raises(LifecycleError, match=r"model\.layers\.0\n.*\n.*if self.model is None"):
        run.validate(module, loader(), verbose=False)
    with pytest.raises(LifecycleError, match="threw the trained adapters away"):
        run.fit(module, loader())
    run.validate(module, loader(), ckpt_path="best", verbose=False)
    assert not differing(adapters(module), trained)
    assert torch.equal(outputs(module), expected)


def test_several_loaders_and_the_datamodule(tmp_path):
    root = ROOTS[0]

    class Data(lightning(root).LightningDataModule):
        def train_dataloader(self):
            return {"a": loader(shuffle=True), "b": loader(shuffle=True)}

        def val_dataloader(self):
            return [loader(), loader()]

    class Task(task_class(root)):
        def training_step(self, batch, batch_idx):
            return self.loss(batch["a"]) + self.loss(batch["b"])

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val_loss", self.loss(batch))

    module = Task()
    run = trainer(tmp_path, "lora", root)
    run.fit(module, datamodule=Data())
    assert run.global_step == len(rows("linears")) // 4
    assert engine.record_of(module) is not None
