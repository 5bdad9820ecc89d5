"""``optimizer=``: bitsandbytes' optimizers in place of the user's, resumed bit for bit."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from modules import (
    ROOTS,
    Linears,
    loader,
    resumed,
    steps_class,
    strategy,
    task_class,
    weights,
)
from modules import trainer as make_trainer
from torch.utils.data import DataLoader

from lightning_peft import LoRACallback, LoRAStrategy, QLoRACallback, QLoRAStrategy, engine
from lightning_peft.errors import CheckpointError, ConfigError
from lightning_peft.plugin.namespace import bind_to_lightning

WIDTH = 1024  # times r=4: the least that 8-bit optimizers quantize
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


class Broad(steps_class(ROOTS[0])):
    """One wide layer; two groups of parameters, a schedule for each."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = Linears(WIDTH, depth=1)
        self.rates = []

    def configure_optimizers(self):
        groups = [
            {"params": self.model.layers.parameters(), "lr": 0.01},
            {"params": self.model.head.parameters(), "weight_decay": 0.2, "name": "head"},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.02)
        factors = [lambda n: 1 / (n + 1), lambda n: 0.9**n]
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factors)
        return [self.optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_batch_start(self, batch, batch_idx):
        self.rates.append([group["lr"] for group in self.optimizers().param_groups])


def data():
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(24, WIDTH, generator=draw)
    return DataLoader([(row, row[:3].argmax()) for row in x], batch_size=4, shuffle=True)


def fit(folder, method, module, ckpt_path=None, callbacks=(), **given):
    torch.manual_seed(9)
    ours = strategy(method, ROOTS[0], lora_dropout=0.3, **given)
    run = make_trainer(
        folder / "root",
        ours,
        max_epochs=2,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
    )
    run.fit(module, data(), ckpt_path=ckpt_path)
    return run, module


@pytest.mark.parametrize(
    ("method", "name", "states"),
    [
        ("qlora", "adamw_8bit", torch.uint8),
        ("lora", "paged_adamw_32bit", torch.float32),
        ("qlora", "auto", torch.float32),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_run(method, name, states, tmp_path):
    def run(**more):
        return fit(tmp_path, method, Broad(), optimizer=name, **more)[1]

    expected, found = resumed(run, tmp_path, 4, steps=(4,))
    # The object that the module made, which its schedule and its own attribute refer to.
    assert expected.trainer.optimizers[0] is expected.optimizer
    factor = expected.model.layers[0].lora_A["default"].weight
    moment = "exp_avg" if name == "auto" else "state1"
    assert expected.optimizer.state[factor][moment].dtype == states
    assert len(found[4].losses) == 8
    assert found[4].rates == expected.rates[4:]


def test_training_is_that_of_torchs_adamw_on_a_frozen_base(tmp_path):
    _, torchs = fit(tmp_path, "qlora", Broad(), optimizer=None)
    before = {}

    class Watched(Broad):
        def on_train_start(self):
            before.update(weights(self))

    run, ours = fit(tmp_path, "qlora", Watched(), optimizer="paged_adamw_32bit")
    assert type(torchs.optimizer) is torch.optim.AdamW
    assert type(ours.optimizer) is bnb.optim.PagedAdamW32bit
    assert isinstance(ours.optimizers(), bnb.optim.PagedAdamW32bit)
    assert ours.rates == torchs.rates
    assert ours.rates == [[0.01 * (1 / (n + 1)), 0.02 * 0.9**n] for n in range(12)]
    assert [group.get("name") for group in ours.optimizer.param_groups] == [None, "head"]
    torch.testing.assert_close(ours.losses, torchs.losses, rtol=0, atol=1e-4)
    after, theirs = weights(ours), weights(torchs)
    frozen = engine.record_of(ours).frozen
    held = [p for group in ours.optimizer.param_groups for p in group["params"]]
    named = dict(ours.named_parameters())
    assert frozen
    assert not {id(named[name]) for name in frozen} & {id(p) for p in held}
    for name, value in after.items():
        if name in frozen:
            assert torch.equal(value, before[name])
        elif value.is_floating_point():
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-4)
    assert not torch.equal(after["model.head.weight"], before["model.head.weight"])


def test_the_defaults_and_what_is_said(tmp_path, said):
    class Mixed(task_class(ROOTS[0])):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            first = torch.optim.AdamW(self.model.layers.parameters(), lr=0.02)
            return first, torch.optim.SGD(self.model.head.parameters(), lr=0.1)

    classes = {}
    for method in ("lora", "qlora"):
        said.clear()
        run = make_trainer(tmp_path, method)
        run.fit(Mixed(), loader())
        classes[method] = [type(o) for o in run.optimizers]
    assert classes["lora"] == [torch.optim.AdamW, torch.optim.SGD]
    assert classes["qlora"] == [torch.optim.AdamW, torch.optim.SGD]
    assert run.optimizers[0].param_groups[0]["fused"]
    assert {text for text in said if "optimizer=" in text} == {
        "optimizer='auto': AdamW takes torch's fused step; SGD is kept: it is not torch's own Adam "
        "or AdamW."
    }


def test_what_cannot_be_done_stops_the_fit(tmp_path):
    class Two(task_class(ROOTS[0])):
        automatic_optimization = False

        def configure_optimizers(self):
            first = torch.optim.AdamW(self.parameters(), lr=0.1, amsgrad=True)
            return first, torch.optim.SGD(self.parameters(), lr=0.1, maximize=True)

    with pytest.raises(ConfigError, match=r"AdamW: amsgrad(.|\n)*SGD: maximize"):
        make_trainer(tmp_path, strategy(optimizer="lion_8bit")).fit(Two(), loader())


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    run = make_trainer(tmp_path, strategy(optimizer="adamw_8bit"))
    run.fit(task_class(ROOTS[0])(), loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    other = make_trainer(tmp_path, strategy(optimizer="paged_adamw_32bit"), max_epochs=2)
    with pytest.raises(CheckpointError, match="states of AdamW8bit, and this run has PagedAdamW32"):
        other.fit(task_class(ROOTS[0])(), loader(), ckpt_path=tmp_path / "one.ckpt")


@pytest.mark.parametrize("cls", [LoRAStrategy, QLoRAStrategy, LoRACallback, QLoRACallback])
def test_unknown_names_are_refused_at_once(cls):
    with pytest.raises(ConfigError, match=r"optimizer='adamw8bit'.*near names: .*adamw_8bit"):
        bind_to_lightning(cls, ROOTS[0])(optimizer="adamw8bit")
