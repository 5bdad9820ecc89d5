"""The order of things, what is refused, and what is left alone."""

from __future__ import annotations

import signal

import pytest
import torch
from modules import (
    ROOTS,
    Linears,
    build,
    differing,
    lightning,
    llama,
    loader,
    rows,
    steps_class,
    strategy,
    task,
    task_class,
    trainer,
    weights,
)
from torch import nn
from torch.utils.data import DataLoader

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import ConfigError, LifecycleError, UnsupportedError

METHODS = ("lora", "qlora")


def is_packed(param) -> bool:
    return param.dtype == torch.uint8


def packed(module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if is_packed(p)}


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ROOTS)
def test_callbacks_that_would_corrupt_are_refused(root, tmp_path):
    class QuantizationAwareTraining(lightning(root).Callback):
        """Called as that of older Lightnings."""

    run = trainer(tmp_path, "qlora", root, callbacks=[QuantizationAwareTraining()])
    module = task(root, "configure_model")
    with pytest.raises(UnsupportedError, match=r"callback QuantizationAware.*: .* Remove it"):
        run.fit(module, loader())
    assert "configure_model" not in module.__dict__


def test_callbacks_of_the_module_are_looked_at_too(tmp_path):
    class Unfreezing(task_class(ROOTS[0])):
        backbone = property(lambda self: self.model)

        def configure_callbacks(self):
            callbacks = lightning(ROOTS[0]).callbacks
            return [callbacks.BackboneFinetuning(), callbacks.WeightAveraging()]

    with pytest.raises(UnsupportedError, match="BackboneFinetuning with WeightAveraging"):
        trainer(tmp_path).fit(Unfreezing(), loader())


@pytest.mark.parametrize("root", ROOTS)
def test_bitsandbytes_precision_is_refused(root, tmp_path):
    run = trainer(tmp_path, "qlora", root)
    precision = lightning(root).plugins.precision.BitsandbytesPrecision
    run.strategy.precision_plugin = object.__new__(precision)
    with pytest.raises(UnsupportedError, match="BitsandbytesPrecision: it would quantize the adap"):
        run.fit(task(root), loader())


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_start_methods_that_lose_the_adapters_are_refused(method):
    with pytest.raises(ConfigError, match=f"'start_method': '{method}'.* be lost"):
        strategy("lora", ddp_kwargs={"start_method": method})


def test_merged_adapters_are_not_trained(tmp_path):
    module = task()
    trainer(tmp_path).fit(module, loader())
    lightning_peft.merge(module)
    with pytest.raises(LifecycleError, match=r"model\.layers\.0\n(.|\n)*unmerge"):
        trainer(tmp_path).fit(module, loader())
    trainer(tmp_path).validate(module, loader(), verbose=False)
    lightning_peft.unmerge(module)
    trainer(tmp_path).fit(module, loader())


def test_wrong_arguments_name_every_problem():
    with pytest.raises(ConfigError, match=r"r=0(.|\n)*lora_dropout=2(.|\n)*bias='some'"):
        strategy("lora", r=0, lora_dropout=2, bias="some")
    with pytest.raises(ConfigError, match=r"Both `peft_config` and \['r'\]"):
        strategy("lora", peft_config={"peft_type": "LORA"}, r=8)
    quantized = {"load_in_4bit": True}
    with pytest.raises(ConfigError, match=r"Both `quantization_config` and \['bnb_4bit_quant_type"):
        strategy("qlora", quantization_config=quantized, bnb_4bit_quant_type="fp4")


# --- the wrapped hook ------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("setup", Stop),
        ("configure_model", KeyboardInterrupt),
        ("training_step", Stop),
        ("on_fit_start", KeyboardInterrupt),
    ],
)
def test_the_hook_is_unwrapped_after_errors(where, error, tmp_path):
    class Failing(task_class(ROOTS[0])):
        failing = True

    def fail(self, *args, **kwargs):
        if self.failing:
            raise error("stopped")
        return self.loss(args[0]) if where == "training_step" else None

    setattr(Failing, where, fail)
    module = Failing()
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(Stop if error is Stop else SystemExit):
            trainer(tmp_path).fit(module, loader())
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "configure_model" not in module.__dict__
    # And it can be trained afterwards, even by a strategy that knows nothing of adapters.
    module.failing = False
    trainer(tmp_path).fit(module, loader())
    trainer(tmp_path, "auto").validate(module, loader(), verbose=False)


def test_a_hook_on_the_instance_comes_back(tmp_path):
    module, calls = task(), []
    own = module.__dict__["configure_model"] = lambda: calls.append("own")
    trainer(tmp_path).fit(module, loader())
    assert calls == ["own"]
    assert module.__dict__["configure_model"] is own
    assert engine.record_of(module) is not None


def test_the_strategy_serves_the_module_it_was_last_given(tmp_path):
    run, first, second = trainer(tmp_path), task(), task()
    run.strategy.connect(first)
    run.fit(second, loader())
    assert engine.record_of(second) is not None
    assert "configure_model" not in first.__dict__


def test_the_table_is_printed_once(tmp_path, capsys):
    run = trainer(tmp_path, strategy("qlora", announce=True))
    module = task()
    run.validate(module, loader(), verbose=False)
    assert "trainable" not in capsys.readouterr().out
    run.fit(module, loader())
    run.fit(module, loader())
    shown = capsys.readouterr().out
    assert shown.count("trainable 611 of 2,787 parameters") == 1
    assert "nf4" in shown


# --- train mode ------------------------------------------------------------------------------


class WithNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = llama()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, input_ids):
        outputs = self.body(input_ids=input_ids)
        outputs.logits = self.norm(outputs.logits)
        return outputs


def test_an_adapted_part_is_in_train_mode_while_fitting(tmp_path):
    seen = []

    class Watching(task_class(ROOTS[0])):
        def build(self):
            self.model = WithNorm().eval()

        def training_step(self, batch, batch_idx):
            others = [m for m in self.model.modules() if not isinstance(m, nn.BatchNorm1d)]
            seen.append([m.training for m in others])
            assert not self.model.norm.training
            return self.loss(batch)

    module = Watching("llama")
    run = trainer(tmp_path, strategy(lora_dropout=0.1, adapt="model"))
    run.validate(module, loader("llama"), verbose=False)
    assert not any(child.training for child in module.model.modules())
    statistics = module.model.norm.running_mean.clone()
    run.fit(module, loader("llama"), loader("llama"))
    assert seen
    assert all(all(modes) for modes in seen)
    assert torch.equal(module.model.norm.running_mean, statistics)


def test_a_batch_norm_in_train_mode_goes_on(tmp_path):
    module = task()
    statistics = module.model.norm.running_mean.clone()
    trainer(tmp_path).fit(module, loader())
    assert not torch.equal(module.model.norm.running_mean, statistics)
    assert module.model.norm.training


# --- what is left alone ----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_heads_and_other_submodules_stay_as_they_are(method, tmp_path):
    class Composed(steps_class(ROOTS[0])):
        def __init__(self):
            super().__init__()
            self.backbone = build("llama").model
            self.head = nn.Linear(32, 3)
            self.teacher = Linears().requires_grad_(False)
            self.critic = Linears()

        def forward(self, batch):
            hidden = self.backbone(input_ids=batch["ids"]).last_hidden_state
            return self.head(hidden.mean(1))

        def loss(self, batch):
            x = torch.ones(4, 32)
            return self(batch).square().mean() + self.critic(x).mean() + self.teacher(x).mean()

    module = Composed()
    before = weights(module)
    trainer(tmp_path, method).fit(module, loader("llama"))
    names = {name for name, param in module.named_parameters() if param.requires_grad}
    trained = {name.split(".")[0] for name in names}
    assert trained == {"backbone", "head", "critic"}
    assert all(".lora_" in name for name in names if name.startswith("backbone"))
    now = weights(module)
    assert not differing(*({n: v[n] for n in before if "teacher.l" in n} for v in (before, now)))
    for part in ("head", "critic.layers"):
        mine = [name for name in before if name.startswith(part)]
        assert sorted(differing(*({n: v[n] for n in mine} for v in (before, now)))) == sorted(mine)
    assert type(module.head) is nn.Linear


@pytest.mark.parametrize("method", METHODS)
def test_a_sanity_check_changes_nothing(method, tmp_path):
    """bitsandbytes would repack weights in it, and no gradient would pass them any more."""
    losses = []
    for steps in (0, 2):
        torch.manual_seed(3)
        module = task(kind="llama")
        run = trainer(tmp_path, method, num_sanity_val_steps=steps)
        run.fit(module, loader("llama"), loader("llama"))
        losses.append(module.losses)
    assert losses[0] == losses[1]
    assert losses[0][-1] != losses[0][0]


# --- precision -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "place"),
    [
        ("32-true", "configure_model"),
        ("bf16-mixed", "init"),
        ("bf16-true", "init"),
        ("bf16-true", "configure_model"),
        ("16-true", "init"),
    ],
)
def test_master_weights_stay_float32(precision, place, tmp_path):
    reference = task(place=place, kind="llama")
    torch.manual_seed(5)
    trainer(tmp_path, "qlora").validate(reference, loader("llama"), verbose=False)
    module = task(place=place, kind="llama")
    torch.manual_seed(5)
    run = trainer(tmp_path, "qlora", precision=precision, max_epochs=2)
    run.validate(module, loader("llama"), verbose=False)
    # The same base and the same adapters, whatever dtype Lightning makes the user's layers in.
    bytes_before = packed(module)
    assert bytes_before
    codes = {param.quant_state.code.dtype for param in module.parameters() if is_packed(param)}
    assert codes == {torch.float32}
    if place == "init":
        both = [engine.all_adapter_parameters(m) for m in (module, reference)]
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
        assert not differing(bytes_before, packed(reference))
    run.fit(module, loader("llama"), loader("llama"))
    assert {param.dtype for param in engine.all_adapter_parameters(module)} == {torch.float32}
    assert not differing(packed(module), bytes_before)
    assert sum(module.losses[6:]) < sum(module.losses[:6])


def test_float64_is_for_lora_alone(tmp_path):
    with pytest.raises(UnsupportedError, match="precision='64-true': products with quantized"):
        trainer(tmp_path, "qlora", precision="64-true").fit(task(), loader())
    module = task(kind="llama")
    trainer(tmp_path, "lora", precision="64-true", max_epochs=2).fit(module, loader("llama"))
    assert {p.dtype for p in engine.all_adapter_parameters(module)} == {torch.float64}
    assert sum(module.losses[6:]) < sum(module.losses[:6])


def test_masters_are_not_rounded_by_a_restore(tmp_path):
    run = trainer(tmp_path, precision="bf16-true")
    module = task(kind="llama")
    run.fit(module, loader("llama"))
    run.save_checkpoint(tmp_path / "one.ckpt")
    expected = [p.detach().clone() for p in engine.all_adapter_parameters(module)]
    assert any(not torch.equal(p, p.bfloat16().float()) for p in expected)
    fresh = task(kind="llama")
    other = trainer(tmp_path, precision="bf16-true")
    other.validate(fresh, loader("llama"), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    for mine, theirs in zip(engine.all_adapter_parameters(fresh), expected, strict=True):
        assert torch.equal(mine, theirs)


# --- one device ------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("method", METHODS)
def test_one_device_needs_no_ceremony(method, root, tmp_path):
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * 24, 24)
    data = DataLoader(rows("linears"), batch_size=4, sampler=sampler)
    run = trainer(tmp_path, method, root)
    module = task(root)
    run.fit(module, data)
    assert run.strategy.launcher is None
    assert not torch.distributed.is_initialized()
    assert run.train_dataloader.sampler is sampler
    assert type(data) is DataLoader
    assert run.world_size == run.num_devices == 1
    assert run.strategy.model is module
    assert isinstance(run.strategy, lightning(root).strategies.SingleDeviceStrategy)


SLURM = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize("more", [{}, {"SLURM_LOCALID": "3", "SLURM_PROCID": "5"}])
@pytest.mark.parametrize("method", METHODS)
def test_one_device_asks_no_scheduler_for_ranks(method, more, tmp_path, monkeypatch):
    """A job may set part of the variables only, or those of a step that started this process."""
    for name in ("SLURM_NODEID", "SLURM_LOCALID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**SLURM, **more}.items():
        monkeypatch.setenv(name, value)
    run = trainer(tmp_path, method)
    module = task()
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    assert (tmp_path / "one.ckpt").is_file()
    assert len(module.losses) == 6
    ours = run.strategy
    assert (ours.global_rank, ours.local_rank, run.node_rank, ours.world_size) == (0, 0, 0, 1)
    assert run.is_global_zero


@pytest.mark.parametrize("root", ROOTS)
def test_devices_are_those_of_the_trainer(root, tmp_path):
    run = trainer(tmp_path, "lora", root, devices=2)
    assert run.world_size == run.num_devices == run.strategy.num_processes == 2
    assert type(run.strategy.launcher).__name__ == "_SubprocessScriptLauncher"
    assert run.strategy.root_device == torch.device("cpu")
    several = trainer(tmp_path, "lora", root, num_nodes=2)
    assert several.world_size == 2
    assert several.strategy.launcher is not None
    ours = strategy("lora", root, ddp_kwargs={"find_unused_parameters": True})
    passed = trainer(tmp_path, ours, root)
    assert passed.strategy.ddp_kwargs == {"find_unused_parameters": True}


def test_a_compiled_module(tmp_path):
    class Silent(task_class(ROOTS[0])):
        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    module = Silent()
    run = trainer(tmp_path, "qlora")
    run.fit(torch.compile(module, backend="eager"), loader(), loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    fresh = task()
    trainer(tmp_path, "qlora").validate(fresh, loader(), ckpt_path=tmp_path / "one.ckpt")
    assert not differing(weights(fresh), weights(module))
    assert all(p.any() for n, p in fresh.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize(
    ("method", "depth", "shown"), [("qlora", 1, False), ("qlora", 2, True), ("lora", 1, True)]
)
def test_a_summary_that_counts_bytes_as_parameters_gives_way_to_the_report(
    method, depth, shown, tmp_path, said
):
    summary = lightning(ROOTS[0]).callbacks.ModelSummary(max_depth=depth)
    ours = strategy(method, announce=True)
    given = {"callbacks": [summary], "enable_model_summary": True, "max_steps": 1}
    trainer(tmp_path, ours, **given).fit(task(), loader())
    assert any("Total params" in text for text in said) is shown
