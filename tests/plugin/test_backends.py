"""A Trainer over a quantization backend that lives in one file of the tests."""

from __future__ import annotations

import pytest
import torch
from modules import ROOTS, differing, loader, outputs, saver, strategy, task, weights
from modules import trainer as make_trainer
from toy_backend import ToyConfig, ToyLayer

import lightning_peft
from lightning_peft.errors import ConfigError


def fit(folder, module, config, root, epochs, ckpt_path=None):
    quantizing = strategy("qlora", root, quantization_config=config, verify="full")
    callbacks = [saver(root, folder, save_top_k=-1)]
    trainer = make_trainer(folder, quantizing, root, max_epochs=epochs, callbacks=callbacks)
    trainer.fit(module, loader("llama"), loader("llama"), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(
    ("config", "root"),
    [(ToyConfig(), ROOTS[0]), ({"quant_method": "toy_int8", "levels": 127}, ROOTS[1])],
    ids=["config", "mapping"],
)
def test_a_third_backend_trains_resumes_and_merges(config, root, tmp_path):
    torch.manual_seed(0)
    straight = task(root, kind="llama")
    fit(tmp_path / "straight", straight, config, root, 2)
    assert straight.losses[-1] < straight.losses[0]
    assert sum(isinstance(layer, ToyLayer) for layer in straight.modules()) == 14

    torch.manual_seed(0)
    fit(tmp_path / "first", task(root, kind="llama"), config, root, 1)
    (checkpoint,) = (tmp_path / "first").glob("*.ckpt")
    resumed = task(root, kind="llama")
    fit(tmp_path / "second", resumed, config, root, 2, ckpt_path=checkpoint)
    assert not differing(weights(resumed), weights(straight))
    with pytest.raises(lightning_peft.errors.CheckpointError, match="levels"):
        fit(tmp_path / "other", task(root, kind="llama"), ToyConfig(63), root, 2, checkpoint)

    expected = outputs(straight, "llama")
    lightning_peft.merge(straight)
    torch.testing.assert_close(outputs(straight, "llama"), expected, rtol=1e-4, atol=1e-5)


def test_a_config_of_no_backend_is_refused():
    with pytest.raises(ConfigError, match="quant_method='hqq'"):
        strategy("qlora", quantization_config={"quant_method": "hqq"})
    with pytest.raises(ConfigError, match="Both `quantization_config` and"):
        strategy("qlora", quantization_config=ToyConfig(), load_in_8bit=True)
