"""Known silent failures of Lightning, PEFT and bitsandbytes together, each through a real Trainer.

More of them are next to the feature they belong to; docs/troubleshooting.md has the whole list.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from modules import (
    ROOTS,
    Linears,
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
from torch.utils.data import DataLoader

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.fingerprint import exact_checksum
from lightning_peft.errors import UnsupportedError
from lightning_peft.plugin.namespace import bind_to_lightning

METHODS = ("lora", "qlora")


def base_sums(module) -> dict[str, int]:
    """Returns checksums of all bits of the frozen base, and of its quantization constants."""
    frozen = engine.require_record(module).frozen
    return {n: exact_checksum(p) for n, p in module.named_parameters() if n in frozen}


# --- bitsandbytes repacks weights in evaluations ---------------------------------------------


def wide_rows() -> list:
    draw = torch.Generator().manual_seed(2)
    return [(x, x[:3].argmax()) for x in torch.randn(24, 64, generator=draw)]


class Packable(task_class(ROOTS[0])):
    """Layers of 64 by 64, which bitsandbytes would repack where the processor allows it."""

    flag = None

    def build(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = Linears(width=64, depth=3)

    def on_fit_start(self):
        self.grads, self.base = [], base_sums(self)
        for child in self.modules():
            if self.flag is not None and hasattr(child, "support_avx512bf16_for_cpu"):
                child.support_avx512bf16_for_cpu = self.flag

    def on_after_backward(self):
        params = engine.all_adapter_parameters(self)
        self.grads.append([param.grad.clone() for param in params])


def test_validation_changes_no_gradient_whatever_the_processor(tmp_path):
    """Sanity check, validation in the middle of epochs, checkpoints: the same bits as without."""
    runs = []
    for flag, validated in ((None, False), (False, True), (True, True)):
        torch.manual_seed(6)
        module = Packable()
        module.flag = flag
        data = DataLoader(wide_rows(), batch_size=4)
        points = saver(ROOTS[0], tmp_path / str(flag), every_n_train_steps=2, save_top_k=-1)
        settings = {"num_sanity_val_steps": 2, "val_check_interval": 3, "callbacks": [points]}
        run = trainer(tmp_path, "qlora", max_epochs=2, **(settings if validated else {}))
        run.fit(module, data, data if validated else None)
        assert base_sums(module) == module.base
        runs.append((module.grads, weights(module)))
    assert len(runs[0][0]) == 12
    for grads, values in runs[1:]:
        for mine, first in zip(grads, runs[0][0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, first, strict=True))
        assert not differing(values, runs[0][1])


@pytest.mark.parametrize(
    ("method", "precision"), [("lora", "32-true"), ("lora", "bf16-true"), ("qlora", "bf16-mixed")]
)
def test_the_base_is_the_same_bits_after_training(method, precision, tmp_path):
    points = saver(ROOTS[0], tmp_path, every_n_train_steps=2, save_top_k=-1)

    class Noting(task_class(ROOTS[0])):
        def on_fit_start(self):
            self.base = base_sums(self)

    module = Noting("llama")
    run = trainer(
        tmp_path,
        method,
        precision=precision,
        max_epochs=2,
        num_sanity_val_steps=2,
        callbacks=[points],
    )
    run.fit(module, loader("llama"), loader("llama"))
    assert len(module.base) > 10
    assert base_sums(module) == module.base
    assert all(p.any() for n, p in module.named_parameters() if "lora_B" in n)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_precisions_of_gpus(method, precision, tmp_path):
    module = task(kind="llama")
    run = trainer(tmp_path, method, accelerator="gpu", precision=precision, max_epochs=2)
    run.fit(module, loader("llama"), loader("llama"))
    assert sum(module.losses[6:]) < sum(module.losses[:6])
    assert {p.dtype for p in engine.all_adapter_parameters(module)} == {torch.float32}
    before = outputs(module, "llama")
    # The module is on the CPU between stages, and computes the same when it comes back.
    run.validate(module, loader("llama"), verbose=False)
    assert torch.equal(outputs(module, "llama"), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_16_bit_heads_can_be_unscaled(dtype, tmp_path):
    """A head that trains has the dtype of the file, and 16-mixed scales gradients."""
    plugins = lightning(ROOTS[0]).plugins
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    mixed = plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)

    class Halves(task_class(ROOTS[0])):
        def build(self):
            super().build()
            # Not the norm: on CPUs it takes one dtype only.
            self.model.layers.to(dtype)
            self.model.head.to(dtype)

    module = Halves("linears")
    own = strategy("lora", modules_to_save=["head"])
    run = trainer(tmp_path, own, plugins=[mixed], max_epochs=2)
    run.fit(module, loader("linears"))
    trained = {n: p.dtype for n, p in module.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32}
    assert any("head" in name for name in trained)
    assert module.model.layers[0].weight.dtype == dtype
    assert scaler.get_scale() == 8.0
    assert sum(module.losses[-3:]) < sum(module.losses[:3])


# --- devices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("device", ["mps", "xla"])
def test_devices_that_are_not_served_are_refused(device, method):
    own = strategy(method)
    own.parallel_devices = [torch.device(device)]
    message = f"device '{device}': .* Use accelerator='gpu' or 'cpu'"
    with pytest.raises(UnsupportedError, match=message):
        own.lifecycle.install(task(), own)
    callbacks = {"lora": lightning_peft.LoRACallback, "qlora": lightning_peft.QLoRACallback}
    callback = bind_to_lightning(callbacks[method], ROOTS[0])(r=2)
    theirs = lightning(ROOTS[0]).strategies.SingleDeviceStrategy(device)
    with pytest.raises(UnsupportedError, match=message):
        callback.lifecycle.install(task(), theirs)


# --- searching ----------------------------------------------------------------------------------


class Sized(task_class(ROOTS[0])):
    batch_size = 2

    def train_dataloader(self):
        return DataLoader(rows("linears", 64), batch_size=self.batch_size)

    def val_dataloader(self):
        return loader()


@pytest.mark.parametrize(("by", "method"), [("tuner", "lora"), ("callback", "qlora")])
def test_searches_leave_the_adapters_as_they_were(by, method, tmp_path):
    """The rate and the batch size are found, and training then starts from where it would have."""

    settings = {"max_epochs": 1, "enable_checkpointing": False}
    start = {}

    class Searching(Sized):
        def on_train_start(self):
            start[len(start)] = weights(self)

    torch.manual_seed(4)
    module = Searching()
    callbacks = lightning(ROOTS[0]).callbacks
    found = []
    if by == "callback":
        finders = [
            callbacks.BatchSizeFinder(max_trials=2, steps_per_trial=2),
            callbacks.LearningRateFinder(num_training_steps=14, update_attr=True),
        ]
        run = trainer(tmp_path, method, callbacks=finders, **settings)
        run.fit(module)
        found.append(finders[1].optimal_lr.suggestion())
    else:
        run = trainer(tmp_path, method, **settings)
        tuner = lightning(ROOTS[0] + ".tuner").Tuner(run)
        tuner.scale_batch_size(module, max_trials=2, steps_per_trial=2)
        found.append(tuner.lr_find(module, num_training=14).suggestion())
        run.fit(module)
    assert module.batch_size == 2 * Sized.batch_size
    assert module.lr == pytest.approx(found[0])
    # Each search began, and left, with the adapters as they were made.
    assert len(start) >= 3
    first, last = start[0], start[len(start) - 1]
    adapters = [name for name in first if ".lora_" in name]
    assert adapters
    assert not differing({n: first[n] for n in adapters}, {n: last[n] for n in adapters})
    assert not any(first[n].any() for n in adapters if "lora_B" in n)
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not list(tmp_path.rglob("*.safetensors"))
    assert all(p.any() for n, p in module.named_parameters() if "lora_B" in n)


# --- compilation ---------------------------------------------------------------------------------


def compiled_losses(method, backend, tmp_path, **given):
    torch.manual_seed(12)
    losses = []

    class Silent(task_class(ROOTS[0])):
        def training_step(self, batch, batch_idx):
            return self.loss(batch)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())

    module = Silent()
    run = trainer(tmp_path, strategy(method, **given), max_epochs=2)
    run.fit(module if backend is None else torch.compile(module, backend=backend), loader())
    return losses, weights(module)


@pytest.mark.parametrize(
    ("method", "given"),
    [("lora", {}), ("qlora", {}), ("qlora", {"load_in_8bit": True})],
    ids=["lora", "nf4", "int8"],
)
def test_a_compiled_module_trains_the_same(method, given, tmp_path):
    plain, compiled = (compiled_losses(method, b, tmp_path, **given) for b in (None, "eager"))
    assert len(plain[0]) == 12
    # Compiled, a layer and its adapter are added up apart: the same numbers, rounded elsewhere.
    assert compiled[0] == pytest.approx(plain[0], rel=1e-6)
    for name, tensor in plain[1].items():
        torch.testing.assert_close(compiled[1][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_module_compiled_to_machine_code_trains_the_same(tmp_path):
    plain, compiled = (compiled_losses("qlora", b, tmp_path) for b in (None, "inductor"))
    assert compiled[0] == pytest.approx(plain[0], rel=1e-4)


def test_a_compiled_part_of_the_module(tmp_path):
    class Inside(task_class(ROOTS[0])):
        def build(self):
            self.model = torch.compile(build("linears"), backend="eager")

    module, plain = Inside(), task()
    for each in (module, plain):
        torch.manual_seed(3)
        trainer(tmp_path, "qlora").fit(each, loader())
    assert module.losses == plain.losses
    run = trainer(tmp_path, "qlora")
    run.validate(module, loader(), verbose=False)
    run.save_checkpoint(tmp_path / "one.ckpt")
    fresh = Inside()
    trainer(tmp_path, "qlora").validate(fresh, loader(), ckpt_path=tmp_path / "one.ckpt")
    assert not differing(weights(fresh), weights(module))
