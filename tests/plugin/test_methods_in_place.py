"""A Trainer over a method in place that lives in one file of the tests."""

from __future__ import annotations

import pytest
import torch
from modules import ROOTS, differing, loader, outputs, saver, task, weights
from modules import trainer as make_trainer
from peft import IA3Config
from toy_method import SCALING, ScaledLinear

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.methods.registry import METHODS
from lightning_peft.errors import CheckpointError


@pytest.fixture(autouse=True)
def _scaling(monkeypatch):
    monkeypatch.setitem(METHODS, "IA3", METHODS["IA3"])
    engine.register_method(SCALING)


def fit(folder, module, epochs, feedforward=("down_proj",), ckpt_path=None):
    config = IA3Config(
        target_modules=["v_proj", "down_proj"], feedforward_modules=list(feedforward)
    )
    quantizing = lightning_peft.QLoRAStrategy(peft_config=config, verify="full", announce=False)
    callbacks = [saver(ROOTS[0], folder, save_top_k=-1)]
    trainer = make_trainer(folder, quantizing, ROOTS[0], max_epochs=epochs, callbacks=callbacks)
    trainer.fit(module, loader("llama"), loader("llama"), ckpt_path=ckpt_path)


def llama():
    return task(ROOTS[0], kind="llama")


def test_another_method_in_place_trains_resumes_and_merges(tmp_path):
    torch.manual_seed(0)
    straight = llama()
    fit(tmp_path / "straight", straight, 2)
    scaled = [layer for layer in straight.modules() if isinstance(layer, ScaledLinear)]
    assert len(scaled) == 4
    assert all((layer.ia3_l["default"] != 1).all() for layer in scaled)

    torch.manual_seed(0)
    fit(tmp_path / "first", llama(), 1)
    (checkpoint,) = (tmp_path / "first").glob("*.ckpt")
    resumed = llama()
    fit(tmp_path / "second", resumed, 2, ckpt_path=checkpoint)
    assert not differing(weights(resumed), weights(straight))
    with pytest.raises(CheckpointError, match="feedforward_modules"):
        fit(tmp_path / "other", llama(), 2, feedforward=(), ckpt_path=checkpoint)

    expected = outputs(straight, "llama")
    lightning_peft.merge(straight)
    torch.testing.assert_close(outputs(straight, "llama"), expected, rtol=1e-4, atol=1e-5)
