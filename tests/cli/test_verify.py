"""``lightning-peft verify`` on a user's own module, data and config."""

import json
import sys
from importlib import import_module

import pytest
import yaml
from trainer_fixtures import QUIET

from lightning_peft.cli import main

ROOTS = ("pytorch_lightning", "lightning.pytorch")
TASK = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
import {root} as pl


class Net(pl.LightningModule):
    def __init__(self, width: int = 16, broken: bool = False, manual: bool = False):
        super().__init__()
        self.body, self.head = nn.Linear(width, width), nn.Linear(width, 3)
        self.broken, self.automatic_optimization = broken, not manual

    def forward(self, x):
        if self.broken and not self.training:
            return self.head(F.linear(x, self.body._parameters["weight"]))
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        print("printed by the module")
        loss = self(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


class Data(pl.LightningDataModule):
    def __init__(self, rows: int = 8):
        super().__init__()
        self.rows = rows

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(self.rows, 16)), batch_size=4)
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    """Writes a module and a config into one folder, and goes there."""

    def write(root=ROOTS[0], **trainer):
        name = f"users_task_of_{root.replace('.', '_')}"
        (tmp_path / f"{name}.py").write_text(TASK.format(root=root))
        strategy = {"class_path": "lightning_peft.QLoRAStrategy", "init_args": {"r": 2}}
        config = {
            "seed_everything": 3,
            "model": {"class_path": f"{name}.Net"},
            "data": {"class_path": f"{name}.Data"},
            "trainer": {"accelerator": "cpu", "devices": 4, "strategy": strategy, **trainer},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return ["--config", "config.yaml"]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    return write


@pytest.mark.parametrize("root", ROOTS)
def test_a_healthy_config_passes_and_leaves_no_files(root, user, tmp_path, capsys):
    given = user(root)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["verify", *given, "--trainer.strategy.init_args.r=3"]) == 0
    shown = capsys.readouterr().out
    assert "LoRA r=3" in shown
    assert "nf4, double quantization" in shown
    lines = [line for line in shown.splitlines() if line.startswith(("ok", "--", "FAIL"))]
    assert len(lines) == 9
    assert all(line.startswith("ok ") for line in lines)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == before


def test_a_fault_is_an_exit_code_and_a_line_of_json(user, capsys):
    strategy = {"class_path": "lightning_peft.LoRAStrategy", "init_args": {"r": 2}}
    assert main(["verify", *user(strategy=strategy), "--json", "--model.broken=true"]) == 1
    streams = capsys.readouterr()
    found = json.loads(streams.out)
    assert found["module"] == "Net"
    assert found["passed"] is False
    assert len(found["checks"]) == 9
    (failed,) = [check for check in found["checks"] if check["passed"] is False]
    assert failed["name"] == "adapters act in evaluation as they do in training"
    assert "printed by the module" in streams.err


def test_manual_optimization_is_not_checkable_and_no_fault(user, capsys):
    assert main(["verify", *user(), "--json", "--model.manual=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum("pass step=" in check["detail"] for check in found["checks"]) == 4


def test_callbacks_that_inject_stay_and_others_go(user, capsys):
    callbacks = [
        {"class_path": "lightning_peft.LoRACallback", "init_args": {"r": 2}},
        # Without a logger, this one would stop the run.
        {"class_path": "pytorch_lightning.callbacks.LearningRateMonitor"},
    ]
    assert main(["verify", *user(strategy="auto", callbacks=callbacks)]) == 0
    assert "LoRA r=2" in capsys.readouterr().out


def test_a_refusal_is_reported_as_in_training(user, capsys, refused):
    pruning = {
        "class_path": "pytorch_lightning.callbacks.ModelPruning",
        "init_args": {"pruning_fn": "l1_unstructured"},
    }
    assert "callback ModelPruning" in refused("verify", *user(callbacks=[pruning]), code=1)
    assert main(["verify", *user(), "--trainer.strategy.init_args.target_modules=[boby]"]) == 1
    assert "boby" in capsys.readouterr().err


def test_a_checkpoint_can_be_verified(user, tmp_path):
    given = user()
    code = main(["verify", *given])
    task = import_module("users_task_of_pytorch_lightning")
    lightning = import_module(ROOTS[0])
    strategy = import_module("lightning_peft").QLoRAStrategy(r=2, announce=False)
    run = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, strategy=strategy, enable_checkpointing=False,
        **QUIET,
    )  # fmt: skip
    lightning.seed_everything(3)
    run.fit(task.Net(), task.Data())
    run.save_checkpoint(tmp_path / "one.ckpt")
    assert code == main(["verify", *given, "--ckpt_path", "one.ckpt"]) == 0


BAD = [
    ([], "--model"),
    (["--config", "absent.yaml"], "absent.yaml"),
    (["--trainer.strategy=auto"], "no adapters were asked for"),
    (["--data.rows=0"], "gave no batch"),
    (["--trainer.limit_train_batches=0"], "gave no batch"),
    (["--model=nowhere.Net"], "nowhere"),
    (["--model.depth=3"], "depth"),
    (["--trainer.strategy.init_args.r=0"], "r=0"),
    (["--trainer.strategy.init_args.verify=deep"], "deep"),
]


@pytest.mark.parametrize(("extra", "message"), BAD, ids=[" ".join(extra) for extra, _ in BAD])
def test_bad_input_is_named(extra, message, user, refused):
    given = user()
    own = given if extra and extra[0] != "--config" else ()
    assert message in refused("verify", *own, *extra)


def test_the_program_finds_modules_beside_the_config(user, new_process):
    done = new_process("verify", *user(), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True


def test_a_terminal_gets_a_table(user, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["verify", *user()]) == 0
    assert "Adapters of Net" in capsys.readouterr().out
