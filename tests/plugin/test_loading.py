"""``load_from_checkpoint``: the same outputs from the file alone, or an error that says why not."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from modules import (
    PLACES,
    ROOTS,
    VOCABULARY,
    Linears,
    build,
    lightning,
    loader,
    outputs,
    saver,
    steps_class,
    strategy,
    task,
    task_class,
    trainer,
)
from torch import nn

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import BaseMismatchError, CheckpointError, ConfigError
from lightning_peft.plugin.namespace import LateBoundMeta, use_namespace


def saved(folder, module, method="lora", root=ROOTS[0]):
    points = saver(root, folder, filename="one")
    trainer(folder / "root", method, root, callbacks=[points]).fit(module, loader(module.kind))
    return folder / "one.ckpt"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("kind", "method", "root"), [("gpt2", "lora", ROOTS[1]), ("linears", "qlora", ROOTS[0])]
)
def test_outputs_are_the_same(place, kind, method, root, tmp_path):
    module = task(root, place, kind, lr=0.03)
    file = saved(tmp_path, module, method, root)
    torch.manual_seed(99)
    loaded = lightning_peft.load_from_checkpoint(task_class(root, place), file)
    assert not loaded.training
    assert loaded.lr == 0.03
    assert torch.equal(outputs(loaded, kind), outputs(module, kind))
    assert engine.record_of(loaded) is not None
    # Arguments win over the file.
    assert lightning_peft.load_from_checkpoint(task_class(root, place), file, lr=0.5).lr == 0.5
    # It goes on in a Trainer, as what it is.
    trainer(tmp_path, method, root).fit(loaded, loader(kind))


def test_other_bases_and_files_are_refused(tmp_path):
    module = task()
    file = saved(tmp_path, module)
    cls = task_class(ROOTS[0])

    class Other(cls):
        def build(self):
            super().build()
            with torch.no_grad():
                self.model.layers[0].bias.add_(1)

    class Smaller(cls):
        def build(self):
            self.model = Linears(depth=1)

    with pytest.raises(BaseMismatchError, match=r"layers\.0\.bias"):
        lightning_peft.load_from_checkpoint(Other, file)
    with pytest.raises((CheckpointError, ValueError), match="layers"):
        lightning_peft.load_from_checkpoint(Smaller, file)
    with pytest.raises(ConfigError, match="is not a LightningModule"):
        lightning_peft.load_from_checkpoint(Linears, file)
    plain = trainer(tmp_path, "auto")
    plain.fit(task(), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match=r"Load it with Task\.load_from_checkpoint"):
        lightning_peft.load_from_checkpoint(cls, tmp_path / "plain.ckpt")
    torch.save({"state_dict": module.state_dict()}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="`lightning-peft import` converts it"):
        lightning_peft.load_from_checkpoint(cls, tmp_path / "other.ckpt")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        lightning_peft.load_from_checkpoint(cls, file)


@pytest.mark.parametrize("root", ROOTS)
def test_a_model_among_the_hyperparameters_is_left_out(root, tmp_path, caplog):
    class WithModel(steps_class(root)):
        def __init__(self, model, activation=nn.ReLU, lr=0.02):
            super().__init__()
            self.save_hyperparameters()
            self.model = model

    module = WithModel(build("linears"), nn.GELU, np.float64(0.02))
    with caplog.at_level(logging.WARNING, logger="lightning_peft"):
        file = saved(tmp_path, module, root=root)
    report = [r.getMessage() for r in caplog.records if "save_hyperparameters" in r.message]
    assert len(report) == 1
    assert "ignore=['model', 'activation']" in report[0]
    assert torch.load(file, weights_only=True)["hyper_parameters"] == {"lr": 0.02}
    # Every object must be given again, also where the constructor has a default.
    with pytest.raises(ConfigError, match="Pass activation to load_from_checkpoint"):
        lightning_peft.load_from_checkpoint(WithModel, file, model=build("linears"))
    loaded = lightning_peft.load_from_checkpoint(
        WithModel, file, model=build("linears"), activation=nn.GELU
    )
    assert torch.equal(outputs(loaded), outputs(module))


def test_a_trusted_file_may_hold_objects(tmp_path):
    class Keeping(task_class(ROOTS[0])):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = Linears(2, 1)

        def on_load_checkpoint(self, checkpoint):
            self.seen = [checkpoint["mine"]]

    file = saved(tmp_path, Keeping())
    with pytest.raises(CheckpointError, match="pass weights_only=False"):
        lightning_peft.load_from_checkpoint(Keeping, file)
    loaded = lightning_peft.load_from_checkpoint(Keeping, file, weights_only=False)
    assert isinstance(loaded.seen[0], Linears)


def test_missing_arguments_are_named(tmp_path):
    class Silent(steps_class(ROOTS[0])):
        def __init__(self, model):
            super().__init__()
            self.model = model

    file = saved(tmp_path, Silent(build("linears")))
    with pytest.raises(ConfigError, match="argument: 'model'"):
        lightning_peft.load_from_checkpoint(Silent, file)
    assert lightning_peft.load_from_checkpoint(Silent, file, model=build("linears"))


def test_hyperparameters_of_the_datamodule(tmp_path):
    class Data(lightning(ROOTS[0]).LightningDataModule):
        def __init__(self, collate, size=4):
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self):
            return loader()

    points = saver(ROOTS[0], tmp_path, filename="one")
    module = task()
    trainer(tmp_path, callbacks=[points]).fit(module, datamodule=Data(Linears(2, 1)))
    file = tmp_path / "one.ckpt"
    assert torch.load(file, weights_only=True)["datamodule_hyper_parameters"] == {"size": 4}
    assert lightning_peft.load_from_checkpoint(task_class(ROOTS[0]), file)


def test_layers_built_in_a_setup_that_needs_the_trainer(tmp_path):
    class Needy(task_class(ROOTS[0], "nowhere")):
        def setup(self, stage):
            self.most = self.trainer.max_epochs
            self.build()

    file = saved(tmp_path, Needy())
    with pytest.raises(CheckpointError, match=r"trainer\.validate\(module, ckpt_path"):
        lightning_peft.load_from_checkpoint(Needy, file)
    trainer(tmp_path).validate(Needy(), loader(), ckpt_path=file, verbose=False)


def test_what_setup_ties_and_sizes_is_there(tmp_path):
    class Completed(task_class(ROOTS[0])):
        def build(self):
            torch.manual_seed(0)
            self.model = Linears(depth=3)
            self.model.layers[2] = nn.LazyLinear(32)

        def setup(self, stage):
            torch.manual_seed(1)
            self.model.layers[1].weight = self.model.layers[0].weight
            self.model.layers[2](torch.zeros(1, 32))

    module = Completed()
    loaded = lightning_peft.load_from_checkpoint(Completed, saved(tmp_path, module))
    assert torch.equal(outputs(loaded), outputs(module))


class Portable(metaclass=LateBoundMeta):
    """A LightningModule of this package's kind: without a base until an instance is made."""

    lightning_base = "core.module.LightningModule"

    def __init__(self, size: int = VOCABULARY) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(32, size), nn.ReLU(), nn.Linear(size, 3))
        self.kind = "linears"

    def forward(self, batch):
        return self.layers(batch[0])

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


@pytest.mark.parametrize("root", ROOTS)
def test_modules_of_no_tree_yet(root, tmp_path):
    use_namespace(root)
    try:
        torch.manual_seed(5)
        module = Portable(16)
        file = saved(tmp_path, module, strategy("qlora", root), root)
        torch.manual_seed(5)
        loaded = lightning_peft.load_from_checkpoint(Portable, file)
    finally:
        use_namespace(None)
    assert isinstance(loaded, lightning(root).LightningModule)
    assert torch.equal(outputs(loaded), outputs(module))
