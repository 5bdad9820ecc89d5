"""``LoRACallback`` and ``QLoRACallback`` do to the user's strategy what ours do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from modules import (
    PLACES,
    ROOTS,
    differing,
    lightning,
    loader,
    outputs,
    saver,
    task,
    task_class,
    trainer,
    weights,
)

import lightning_peft
from lightning_peft.errors import ConfigError, UnsupportedError
from lightning_peft.plugin.checkpoint_content import CHECKPOINT_KEY
from lightning_peft.plugin.namespace import bind_to_lightning

CALLBACKS = {"lora": lightning_peft.LoRACallback, "qlora": lightning_peft.QLoRACallback}


def adapting(method, root=ROOTS[0], **given):
    return bind_to_lightning(CALLBACKS[method], root)(r=4, announce=False, **given)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("method", "root"), [("lora", ROOTS[0]), ("qlora", ROOTS[1])])
def test_checkpoints_are_those_of_the_strategy(place, method, root, tmp_path):
    files = []
    for by_callback in (False, True):
        torch.manual_seed(5)
        folder = tmp_path / str(by_callback)
        callbacks = [
            saver(root, folder, filename="{step}", every_n_train_steps=4, save_top_k=-1),
            saver(root, folder, filename="weights", save_weights_only=True),
        ]
        ours = [adapting(method, root)] if by_callback else []
        run = trainer(
            folder,
            "auto" if by_callback else method,
            root,
            callbacks=callbacks + ours,
            max_epochs=2,
        )
        module = task(root, place, "llama")
        run.fit(module, loader("llama", True), loader("llama"))
        run.validate(module, loader("llama"), ckpt_path="best", verbose=False)
        assert "configure_model" not in module.__dict__
        files.append(folder)
        assert (folder / "adapters" / "weights" / "adapter_model.safetensors").is_file()
    for name in ("step=4.ckpt", "step=8.ckpt", "step=12.ckpt", "weights.ckpt"):
        first, second = (torch.load(folder / name, weights_only=True) for folder in files)
        assert not differing(first["state_dict"], second["state_dict"])
        a, b = (
            {k: str(v) for k, v in x[CHECKPOINT_KEY].items() if k != "processes"}
            for x in (first, second)
        )
        assert a == b
    # Resumed in the middle of the first epoch by a callback, as if nothing had happened.
    torch.manual_seed(1000)
    resumed = task(root, place, "llama")
    again = trainer(tmp_path, "auto", root, callbacks=[adapting(method, root)], max_epochs=2)
    again.fit(resumed, loader("llama", True), loader("llama"), ckpt_path=files[0] / "step=4.ckpt")
    assert resumed.losses == module.losses[4:]
    assert not differing(weights(resumed), weights(module))
    # And what a callback wrote loads without any.
    loaded = lightning_peft.load_from_checkpoint(task_class(root, place), files[1] / "weights.ckpt")
    assert torch.equal(outputs(loaded, "llama"), outputs(module, "llama"))


def test_the_strategy_stays_the_users(tmp_path):
    own = lightning(ROOTS[0]).strategies.SingleDeviceStrategy("cpu")
    run = trainer(tmp_path, own, accelerator="auto", callbacks=[adapting("lora")])
    run.fit(task(), loader())
    assert run.strategy is own
    assert isinstance(own, lightning(ROOTS[0]).strategies.SingleDeviceStrategy)


def test_strategy_and_callback_together_are_refused(tmp_path):
    for run in (
        trainer(tmp_path, "lora", callbacks=[adapting("lora")]),
        trainer(tmp_path, "auto", callbacks=[adapting("lora"), adapting("qlora")]),
    ):
        module = task()
        with pytest.raises(UnsupportedError, match="would add adapters twice"):
            run.fit(module, loader())
        assert "configure_model" not in module.__dict__


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("FSDPStrategy", "it shards parameters"),
        ("ModelParallelStrategy", "it shards parameters"),
        ("DeepSpeedStrategy", "its own engine"),
        ("XLAStrategy", "no kernels"),
        ("SingleDeviceXLAStrategy", "no kernels"),
    ],
)
def test_strategies_that_cannot_be_served_are_refused(name, reason, root):
    strategy = object.__new__(getattr(lightning(root).strategies, name))
    fake = SimpleNamespace(strategy=strategy)
    with pytest.raises(UnsupportedError, match=f"LoRACallback cannot serve {name}: .*{reason}"):
        adapting("lora", root).setup(fake, task(root), "fit")


@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_spawned_processes_are_refused(name, tmp_path):
    callback, module = adapting("qlora"), task()
    run = trainer(tmp_path, name, devices=2, callbacks=[callback])
    module.trainer = run
    with pytest.raises(UnsupportedError, match="start_method='.*be lost with them"):
        callback.setup(run, module, "fit")
    assert "configure_model" not in module.__dict__


def test_arguments_for_ddp_have_no_place_in_a_callback():
    with pytest.raises(ConfigError, match="a callback makes no strategy"):
        adapting("lora", ddp_kwargs={"find_unused_parameters": True})
