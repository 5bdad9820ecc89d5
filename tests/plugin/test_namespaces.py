"""Two Lightning packages, imported in any order, and both at once."""

from __future__ import annotations

import subprocess
import sys

import pytest
from modules import ROOTS, lightning, loader, outputs, strategy, task, task_class, trainer

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import ConfigError
from lightning_peft.plugin.callbacks import LoRACallback
from lightning_peft.plugin.namespace import (
    bind_to_lightning,
    namespace,
    namespace_in_use,
    namespace_of,
    use_namespace,
)

TRAIN = """
import torch

class Task({root}.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 3))
    def training_step(self, batch, batch_idx):
        return self.layers(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def train(strategy, **given):
    trainer = {root}.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **given
    )
    module = Task()
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(8, 32), batch_size=4))
    from lightning_peft import engine
    assert engine.record_of(module) is not None
    assert isinstance(trainer.strategy, {root}.strategies.SingleDeviceStrategy)
    return trainer
"""

BY_NAME = """
train("qlora")
train(lightning_peft.LoRAStrategy(r=2))
train("auto", callbacks=[lightning_peft.LoRACallback(r=2)])
from lightning_peft import QLoRACallback
assert issubclass(QLoRACallback, {root}.Callback)
import sys
assert "{other}" not in sys.modules
"""

JOINS = """
assert train(made).strategy is made
train("lora")
{root}.Trainer(strategy="lora", accelerator="cpu", logger=False)
"""


def scenarios(root: str) -> dict[str, str]:
    other = next(name for name in ROOTS if name != root)
    by_name = TRAIN.format(root=root) + BY_NAME.format(root=root, other=other.partition(".")[0])
    made = f"made = lightning_peft.QLoRAStrategy(r=2)\nimport {other}\n"
    joins = made + TRAIN.format(root=other) + JOINS.format(root=root)
    return {
        f"{root}: lightning_peft first": f"import lightning_peft, {root}\n{by_name}",
        f"{root}: Lightning first": f"import {root}, lightning_peft\n{by_name}",
        f"{root}: the other one later": f"import lightning_peft, {root}\n{joins}",
    }


SCENARIOS = scenarios(ROOTS[0]) | scenarios(ROOTS[1])


@pytest.mark.parametrize("name", SCENARIOS)
def test_whichever_is_imported_first(name, program, tmp_path):
    code, out, err = program.run(tmp_path, code=SCENARIOS[name])
    assert code == 0, out + err


def test_importing_loads_nothing_that_only_a_strategy_needs():
    code = (
        "import sys, pytorch_lightning, lightning_peft\n"
        "print({'peft', 'bitsandbytes'} & set(sys.modules))"
    )
    # Not `program`, whose processes have imported them.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("made_for", ROOTS)
def test_a_strategy_joins_the_tree_of_its_trainer(root, made_for, tmp_path):
    made = strategy("qlora", made_for, r=2, ddp_kwargs={"find_unused_parameters": True})
    run = trainer(tmp_path, made, root)
    module = task(root)
    run.fit(module, loader())
    assert run.strategy is made
    assert isinstance(made, lightning(root).strategies.SingleDeviceStrategy)
    assert isinstance(made, lightning_peft.QLoRAStrategy)
    assert namespace_of(made) == namespace_of(made.accelerator) == root
    assert isinstance(made.checkpoint_io, lightning(root).plugins.io.TorchCheckpointIO)
    assert made.ddp_kwargs == {"find_unused_parameters": True}
    (part,) = engine.require_record(module).parts.values()
    assert part.adapters["default"].config["r"] == 2


@pytest.mark.parametrize("root", ROOTS)
def test_a_module_of_the_other_tree_is_refused(root, tmp_path):
    other = next(name for name in ROOTS if name != root)
    with pytest.raises(TypeError, match="`model` must be a `LightningModule`"):
        trainer(tmp_path, "lora", root).fit(task(other), loader())


def test_attributes_are_absent_while_two_packages_leave_the_choice_open(monkeypatch):
    assert all(lightning(each) for each in ROOTS)
    use_namespace(None)
    # A test before may have imported the LightningCLI of one, which would be a choice.
    for each in ROOTS:
        monkeypatch.delitem(sys.modules, f"{each}.cli", raising=False)
    assert not hasattr(LoRACallback, "nothing")
    assert not hasattr(lightning_peft.LoRAStrategy, "nothing")
    with pytest.raises(AttributeError, match=r"do not mix\. Call lightning_peft\.use_namespace"):
        lightning_peft.SupervisedData.load_from_checkpoint("a.ckpt")
    # A strategy goes with its Trainer, so it has what strategies of both have.
    assert lightning_peft.LoRAStrategy.broadcast is not None


@pytest.mark.parametrize("root", ROOTS)
def test_strategies_and_functions_need_no_choice(root, tmp_path):
    """Other tests are run with a choice made, which would hide that one is needed."""
    use_namespace(None)
    module = task(root)
    run = trainer(tmp_path, lightning_peft.QLoRAStrategy(r=2, announce=False), root)
    run.fit(module, loader(), loader())
    assert isinstance(run.strategy, lightning(root).strategies.SingleDeviceStrategy)
    run.save_checkpoint(tmp_path / "one.ckpt")
    loaded = lightning_peft.load_from_checkpoint(task_class(root), tmp_path / "one.ckpt")
    assert outputs(loaded).equal(outputs(module))
    assert lightning_peft.verify(loaded, next(iter(loader()))).passed
    trainer(tmp_path, "lora", root, max_steps=1).fit(task(root), loader())
    lightning_peft.merge(loaded)
    plain = lightning_peft.unload(loaded)
    trainer(tmp_path, "auto", root).validate(plain, loader(), verbose=False)


def test_two_packages_need_a_choice_for_all_but_strategies():
    assert all(lightning(each) for each in ROOTS)
    use_namespace(None)
    assert isinstance(lightning_peft.LoRAStrategy(r=2), lightning_peft.LoRAStrategy)
    with pytest.raises(ConfigError, match=r"Call lightning_peft\.use_namespace with the one whose"):
        LoRACallback()


@pytest.mark.parametrize("root", ROOTS)
def test_the_choice_can_be_made_by_hand(root):
    with namespace(root):
        assert namespace_in_use() == root
        assert issubclass(lightning_peft.QLoRACallback, lightning(root).Callback)
        assert namespace_of(lightning_peft.QLoRAStrategy()) == root
    with pytest.raises(ConfigError, match="the packages are lightning.pytorch and pytorch_lightn"):
        use_namespace("torch")


@pytest.mark.parametrize("root", ROOTS)
def test_subclasses_by_the_user(root, tmp_path):
    class Mine(lightning_peft.QLoRAStrategy):
        """A default of one's own."""

        def __init__(self, r: int = 2) -> None:
            super().__init__(r=r, announce=False)

    module = task(root)
    run = trainer(tmp_path, bind_to_lightning(Mine, root)(), root)
    run.fit(module, loader())
    assert isinstance(run.strategy, Mine)
    fresh = task(root)
    assert outputs(fresh).shape == outputs(module).shape
