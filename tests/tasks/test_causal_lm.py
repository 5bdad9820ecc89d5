import importlib

import pytest
import torch
from short_runs import trainer

from lightning_peft.data.supervised import SupervisedData
from lightning_peft.demo.run import BASE, INSTRUCTIONS
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.tasks.causal_lm import CausalLM


@pytest.mark.parametrize("root", ROOTS)
def test_it_is_a_lightning_module_of_either_tree(root):
    lightning = importlib.import_module(root)
    task = bind_to_lightning(CausalLM, root)(str(BASE))
    assert isinstance(task, lightning.LightningModule)
    assert isinstance(task, CausalLM)
    assert task.hparams["model"] == str(BASE)


@pytest.fixture
def batches(tmp_path):
    data = bind_to_lightning(SupervisedData, ROOTS[1])(
        str(INSTRUCTIONS),
        str(BASE),
        chat_template="plain",
        batch_size=2,
        limit=64,
        cache_dir=str(tmp_path),
    )
    return data.loader("train")


def test_the_loss_is_the_mean_over_answer_tokens(batches):
    task = CausalLM(str(BASE), dtype="float32")
    task.configure_model()
    batch = next(iter(batches))
    with torch.no_grad():
        logits = task(**batch).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        expected = -picked[labels != -100].mean()
        torch.testing.assert_close(task(**batch).loss, expected)


def test_the_model_is_loaded_once():
    task = CausalLM(str(BASE))
    task.configure_model()
    model = task.model
    task.configure_model()
    assert task.model is model


def test_the_rate_rises_and_falls_as_a_cosine(batches):
    lightning = importlib.import_module(ROOTS[1])
    task = bind_to_lightning(CausalLM, ROOTS[1])(str(BASE), learning_rate=1.0, warmup=0.1)
    rates = []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer(max_steps=20, callbacks=[Watch()]).fit(task, batches)
    assert rates[0] == pytest.approx(0.5)
    assert rates[1] == pytest.approx(1.0)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[11] == pytest.approx(0.5, abs=0.01)
    assert rates[-1] < 0.02
