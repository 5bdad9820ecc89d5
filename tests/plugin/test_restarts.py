"""ReLoRA: adapters that are merged and begin again while they train."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from expert_models import model_of
from models import tiny_llama
from modules import (
    ROOTS,
    lightning,
    loader,
    outputs,
    resumed,
    rows,
    saver,
    strategy,
    task,
    task_class,
    weights,
)
from modules import trainer as make_trainer
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import BaseMismatchError, CheckpointError, ConfigError, UnsupportedError
from lightning_peft.plugin.namespace import bind_to_lightning


def restarts(every: int = 3, **given: Any) -> Any:
    return bind_to_lightning(lightning_peft.MergeAndRestart, ROOTS[0])(every, **given)


def fitted(folder: Any, *callbacks: Any, kind: str = "linears", **given: Any) -> Any:
    method, steps = strategy(**{"lora_alpha": 16, **given.pop("settings", {})}), {"max_epochs": 2}
    torch.manual_seed(5)
    module = task(kind=kind)
    run = make_trainer(folder / "root", method, callbacks=list(callbacks), **steps)
    run.fit(module, loader(kind, shuffle=True), **given)
    return module


def factors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return engine.adapter_parameters(module)


class Watch:
    """Keeps what the module computes before and after a merge, its base and its adapters."""

    def __init__(self) -> None:
        self.before: list[Any] = []
        self.merge = engine.merge_and_restart

    def __call__(self, module: torch.nn.Module, *given) -> Any:
        base = {n: p.clone() for n, p in module.named_parameters() if n.endswith("weight")}
        expected = outputs(module)
        report = self.merge(module, *given)
        self.before.append((expected, outputs(module), base, copy.deepcopy(factors(module))))
        return report


def test_a_merge_changes_no_output_and_adapters_begin_as_at_first(tmp_path, monkeypatch):
    watch = Watch()
    monkeypatch.setattr(engine, "merge_and_restart", watch)
    module = fitted(tmp_path, restarts(3))
    # 12 steps; the last one ends the fit.
    assert len(watch.before) == 3
    for expected, after, _, adapter in watch.before:
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
        assert all(not tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
        bound = 1 / module.model.layers[0].in_features ** 0.5
        for name, tensor in adapter.items():
            if "lora_A" in name:
                assert bound / 2 < tensor.abs().max() <= bound
    drawn = [adapter["model.layers.0.lora_A.default.weight"] for *_, adapter in watch.before]
    assert not torch.equal(drawn[0], drawn[1])
    first, last = watch.before[0][2], module.model.layers[0].stored_weight()
    change = (last - first["model.layers.0.weight"]).float()
    # More than one adapter of rank 4 can hold, and no step out of bounds.
    assert torch.linalg.matrix_rank(change, rtol=1e-3) > 4
    assert change.abs().max() < 1


IDS = torch.arange(14).view(2, 7) % 61
STATES = torch.linspace(-2, 2, 42).view(2, 3, 7)
ATTENTION = {"nhead": 1, "dim_feedforward": 9, "batch_first": True, "dropout": 0.0}
KINDS = {
    "embedding": (tiny_llama, IDS, {"target_modules": ["embed_tokens", "q_proj"]}),
    "experts": (lambda: model_of("mixtral"), IDS, {"target_modules": ["q_proj"]}),
    "recurrent": (lambda: nn.Sequential(nn.LSTM(7, 5)), STATES, {"target_modules": ["0"]}),
    "attention": (lambda: nn.TransformerEncoderLayer(7, **ATTENTION), STATES, {}),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(3, 5, 2)), STATES, {"target_modules": ["0"]}),
    "dora": (tiny_llama, IDS, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_layer_begins_again(kind):
    torch.manual_seed(0)
    make, inputs, settings = KINDS[kind]
    module = make().eval()
    lightning_peft.inject(module, r=2, **settings)
    engine.check_restartable(module)
    first = {name: tensor.detach().clone() for name, tensor in factors(module).items()}
    with torch.no_grad():
        for tensor in factors(module).values():
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    expected = output_of(module, inputs)
    report = engine.merge_and_restart(module, 3)
    assert report.layers
    torch.testing.assert_close(output_of(module, inputs), expected, rtol=1e-4, atol=1e-5)
    assert all(layer.has_no_effect() for layer in engine.adapted_layers(module).values())
    for name, tensor in factors(module).items():
        assert bool(tensor.any()) == bool(first[name].any())
        if tensor.any() and "magnitude" not in name:
            # Other numbers of the same distribution.
            assert not torch.equal(tensor, first[name])
            assert 0.5 < tensor.std() / first[name].std() < 2


def output_of(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = module(inputs)
    return found[0] if isinstance(found, tuple) else getattr(found, "logits", found)


@pytest.mark.parametrize("steps", [1, 2])
def test_it_merges_until_the_fit_ends(steps, tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(rows("linears"))

    class Steps(task_class(ROOTS[0])):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = steps == 1

        def training_step(self, batch, batch_idx):
            for _ in range(0 if self.automatic_optimization else steps):
                self.optimizers().zero_grad()
                self.manual_backward(self.loss(batch))
                self.optimizers().step()
            return self.loss(batch)

    callback = restarts(4)
    run = make_trainer(tmp_path, strategy(), callbacks=[callback], max_epochs=2)
    # Of a length that is not known, or more steps than batches.
    run.fit(Steps(), DataLoader(Stream(), batch_size=4) if steps == 1 else loader())
    assert run.global_step == 12 * steps
    assert callback.state_dict()["last"] == 12 * steps - 4
    assert callback.state_dict()["restarts"] == 3 * steps - 1


@pytest.mark.parametrize(
    "given",
    [
        {"warmup_steps": 2, "settings": {"method": "qlora"}},
        pytest.param({"warmup_steps": 2}, marks=pytest.mark.long),
        pytest.param({"prune_states": 1.0}, marks=pytest.mark.long),
        pytest.param({"settings": {"use_dora": True}}, marks=pytest.mark.long),
    ],
)
def test_a_resumed_run_is_the_same_bit_for_bit(given, tmp_path):
    settings = given.pop("settings", {})

    def fit(ckpt_path=None, callbacks=()):
        both = [restarts(3, **given), *callbacks]
        return fitted(tmp_path, *both, settings=settings, ckpt_path=ckpt_path)

    module, _ = resumed(fit, tmp_path, 2, steps=(2, 6, 8))
    loaded = lightning_peft.load_from_checkpoint(task_class(ROOTS[0]), tmp_path / "step=12.ckpt")
    assert torch.equal(outputs(loaded), outputs(module))
    state = torch.load(tmp_path / "step=6.ckpt", weights_only=True)["state_dict"]
    shape = (512, 1) if settings.get("method") == "qlora" else (32, 32)
    assert state["model.layers.0.weight"].shape == shape
    state = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    # What stops others from loading the file.
    assert state["model.layers.0.weight"].numel() == 0


def test_a_checkpoint_from_before_a_merge_goes_onto_a_new_module(tmp_path):
    points = saver(ROOTS[0], tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    module = fitted(tmp_path, restarts(3), points)
    run = make_trainer(tmp_path, strategy(lora_alpha=16), max_epochs=2)
    with pytest.raises(BaseMismatchError, match=r"merged or loaded since(.|\n)*layers.0.weight"):
        run.fit(module, loader(), ckpt_path=tmp_path / "step=2.ckpt")
    assert lightning_peft.load_from_checkpoint(task_class(ROOTS[0]), tmp_path / "step=2.ckpt")


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.long), "qlora"])
def test_folders_hold_the_merged_weights_and_peft_reads_them(method, tmp_path):
    points = saver(ROOTS[0], tmp_path, filename="one")
    settings = {"method": method, "target_modules": "all-linear"}
    module = fitted(tmp_path, restarts(3), points, kind="llama", settings=settings)
    if method == "qlora":
        quantized = task(kind="llama")
        lightning_peft.inject(quantized, r=2, quantization_config=NF4)
        with pytest.raises(CheckpointError, match="onto the dense base"):
            lightning_peft.load_adapter(
                quantized, tmp_path / "adapters" / "one", adapter_name="second"
            )
    loaded = task(kind="llama")
    lightning_peft.load_adapter(loaded, tmp_path / "adapters" / "one")
    if method == "lora":
        assert torch.equal(outputs(loaded, "llama"), outputs(module, "llama"))
    else:
        torch.testing.assert_close(outputs(loaded, "llama"), outputs(module, "llama"))
    plain = task(kind="llama")
    plain.model = PeftModel.from_pretrained(plain.model, tmp_path / "adapters" / "one")
    error = (outputs(plain, "llama") - outputs(module, "llama")).norm()
    assert error < 1e-5 * outputs(module, "llama").norm()
    lightning_peft.merge(module)
    lightning_peft.unload(module)
    assert torch.allclose(outputs(module, "llama"), outputs(loaded, "llama"), atol=1e-5)


@pytest.mark.long
def test_a_folder_over_codes_trains_on_and_its_checkpoints_load(tmp_path):
    points = saver(ROOTS[0], tmp_path, filename="one")
    settings = {"method": "qlora", "target_modules": ["0"]}
    fitted(tmp_path, restarts(3), points, settings=settings)
    module = task()
    folder = tmp_path / "adapters" / "one"
    lightning_peft.load_adapter(module, folder, quantization_config=NF4, is_trainable=True)
    (entry,) = engine.require_record(module).parts.values()
    assert entry.quantized
    assert module.model.layers[0].weight.shape == (32, 32)
    same = {"method": "qlora", "lora_alpha": 16, "target_modules": ["0"]}
    same["modules_to_save"] = ["model.head"]
    run = make_trainer(tmp_path, strategy(**same), max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "two.ckpt")
    loaded = lightning_peft.load_from_checkpoint(task_class(ROOTS[0]), tmp_path / "two.ckpt")
    assert torch.equal(outputs(loaded), outputs(module))
    other = make_trainer(tmp_path, strategy(**same), max_epochs=2)
    with pytest.raises(CheckpointError, match=r"model.layers.0.weight: \(32, 32\) in the check"):
        other.fit(task(), loader(), ckpt_path=tmp_path / "two.ckpt")


def test_states_of_the_optimizer_are_pruned_by_magnitude():
    param, whole = torch.nn.Parameter(torch.randn(10, 10)), torch.nn.Parameter(torch.randn(4))
    optimizer = torch.optim.AdamW([param, whole])
    (param.sum() * torch.randn(()) + (param**2).sum() + whole.sum()).backward()
    optimizer.step()
    before = optimizer.state[param]["exp_avg"].clone()
    engine.prune_states([optimizer], [param], 0.9)
    kept = optimizer.state[param]["exp_avg"]
    assert int((kept != 0).sum()) == 10
    least = before.abs().flatten().sort().values[-10]
    assert torch.equal(kept, torch.where(before.abs() >= least, before, 0))
    assert torch.equal(optimizer.state[param]["exp_avg_sq"] != 0, kept != 0)
    assert optimizer.state[whole]["exp_avg"].all()
    engine.prune_states([optimizer], [param], 1.0)
    assert param not in optimizer.state
    optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.ASGD, torch.optim.Rprop])
def test_what_optimizers_keep_besides_moments_begins_again(kind):
    param, other = torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.ones(8))
    optimizer = kind([param, other])
    (param + other).sum().backward()
    optimizer.step()
    engine.prune_states([optimizer], [param], 0.9)
    assert list(optimizer.state) == [other]
    optimizer.step()


def test_sums_that_an_optimizer_makes_at_first_begin_again():
    param = torch.nn.Parameter(torch.ones(8))
    optimizer = torch.optim.Adagrad([param], initial_accumulator_value=0.5)
    first = copy.deepcopy(optimizer.state[param])
    for _ in range(2):
        param.grad = torch.ones(8)
        optimizer.step()
        engine.prune_states([optimizer], [param], 1.0)
        assert optimizer.state[param].keys() == first.keys() == {"step", "sum"}
        assert all(torch.equal(value, first[key]) for key, value in optimizer.state[param].items())


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError, RuntimeError])
def test_learning_rates_rise_after_a_merge_and_the_schedule_stays(error, tmp_path):
    used: list[float] = []

    class Noted(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            used.append(self.param_groups[0]["lr"])
            return super().step(closure)

    class Task(task_class(ROOTS[0])):
        def configure_optimizers(self):
            optimizer = Noted(self.parameters(), lr=1.0)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        def training_step(self, batch, batch_idx):
            if error is not None and self.global_step == 5 and len(batch[0]) == 4:
                raise error("within the optimizer's step")
            return super().training_step(batch, batch_idx)

    callback = restarts(4, warmup_steps=2)
    ours = strategy(halve_batch_on_oom=error is torch.OutOfMemoryError)
    run = make_trainer(tmp_path, ours, callbacks=[callback], max_epochs=2)
    with pytest.raises(RuntimeError) if error is RuntimeError else nullcontext():
        run.fit(Task("linears"), loader())
    shares = [1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1, 1 / 3, 2 / 3, 1, 1]
    rates = [share * 0.9**step for step, share in enumerate(shares)]
    if error is not None:
        # That step is tried again, or is the last one.
        rates = rates[:6] + (rates[5:] if error is torch.OutOfMemoryError else [])
    assert used == pytest.approx(rates)
    reached = 5 if error is RuntimeError else 12
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.9**reached)
    assert not run.optimizers[0]._optimizer_step_pre_hooks


NF4 = engine.quantization_config()
INT8 = engine.quantization_config(load_in_8bit=True)
QUANTIZED = {
    "nf4": (tiny_llama, IDS, NF4, {}),
    "nf4 dora": (tiny_llama, IDS, NF4, {"use_dora": True}),
    "nf4 rows": (tiny_llama, IDS, NF4, {"target_modules": ["q_proj[0:4]"]}),
    "int8": (tiny_llama, IDS, INT8, {}),
    "convolution": (KINDS["convolution"][0], STATES, NF4, {"target_modules": ["0"]}),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_weights_move_and_new_adapters_start_at_what_is_lost(case):
    make, inputs, quantization, settings = QUANTIZED[case]
    torch.manual_seed(0)
    module = make().eval()
    lightning_peft.inject(module, r=2, quantization_config=quantization, **settings)
    engine.check_restartable(module)
    layers = engine.adapted_layers(module)
    codes = {name: layer._parameters["weight"].clone() for name, layer in layers.items()}
    # As nothing was learnt, no code moves and nothing is lost.
    plain = output_of(module, inputs)
    engine.merge_and_restart(module, 3)
    torch.testing.assert_close(output_of(module, inputs), plain)
    assert all(torch.equal(codes[n], layer._parameters["weight"]) for n, layer in layers.items())
    with torch.no_grad():
        for tensor in factors(module).values():
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    report = engine.merge_and_restart(module, 3)
    assert any(not torch.equal(codes[n], x._parameters["weight"]) for n, x in layers.items())
    assert len(report.layers) == len(layers)
    for merged in report.layers:
        assert 0 < merged.error < merged.requantized_error
    drawn = [x for name, x in factors(module).items() if "lora_A" in name]
    assert all(tensor.flatten(1).norm(dim=1).min() > 0.1 for tensor in drawn)


def test_codes_that_stay_lose_nothing_of_an_adapter():
    torch.manual_seed(0)
    module = tiny_llama().eval()
    lightning_peft.inject(module, r=2, quantization_config=NF4)
    with torch.no_grad():
        for name, tensor in factors(module).items():
            if "lora_B" in name:
                tensor.normal_(std=1e-6)
    before = output_of(module, IDS)
    report = engine.merge_and_restart(module, 3)
    # All of it would be lost if the sum were rounded.
    assert min(layer.requantized_error for layer in report.layers) > 0.9
    assert report.worst_error < 1e-2
    torch.testing.assert_close(output_of(module, IDS), before, rtol=1e-5, atol=1e-6)


REFUSED = {
    "pissa": ({"init_lora_weights": "pissa"}, "lora", "init_lora_weights='pissa'"),
    "method": ({"r": 16, "peft_config": {"peft_type": "LOHA", "r": 4}}, "lora", "only LoRA and"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_begin_again_is_refused_before_the_first_step(case, tmp_path):
    settings, method, message = REFUSED[case]
    module = task()
    run = make_trainer(tmp_path, strategy(method, **settings), callbacks=[restarts()])
    with pytest.raises(UnsupportedError, match=message):
        run.fit(module, loader())
    assert module.losses == []


def test_quantized_experts_do_not_begin_again():
    module = model_of("mixtral")
    lightning_peft.inject(module, r=2, quantization_config=NF4)
    with pytest.raises(UnsupportedError, match="llm_int8_skip_modules"):
        engine.check_restartable(module)


def test_other_callbacks_and_references_are_refused(tmp_path):

    module = task()
    module.has_reference = True
    average = lightning(ROOTS[0]).callbacks.WeightAveraging()
    run = make_trainer(tmp_path, "lora", callbacks=[restarts(), average])
    with pytest.raises(UnsupportedError, match=r"WeightAveraging: its average(.|\n)*its reference"):
        run.fit(module, loader())
    with pytest.raises(UnsupportedError, match="adds no adapters"):
        make_trainer(tmp_path, "auto", callbacks=[restarts()]).fit(task(), loader())
    with pytest.raises(ConfigError, match=r"every_n_steps=0(.|\n)*prune_states=2(.|\n)*warmup"):
        restarts(0, prune_states=2, warmup_steps=1)


def test_a_base_in_16_bits_says_what_it_loses(tmp_path, caplog):
    module = task().bfloat16()
    ours = strategy(lora_alpha=0.01)
    run = make_trainer(tmp_path, ours, callbacks=[restarts(1)], precision="bf16-true")
    run.fit(module, loader())
    assert "of the effect of an adapter to the rounding of 16-bit weights" in caplog.text
    assert caplog.text.count("Merging lost up to") == 1


def test_a_second_fit_begins_anew(tmp_path):
    callback = restarts(4)
    for _ in range(2):
        module = task()
        make_trainer(tmp_path, strategy(), callbacks=[callback]).fit(module, loader())
        assert callback.state_dict()["restarts"] == 1
    before = weights(module)
    make_trainer(tmp_path, strategy(), callbacks=[callback]).fit(module, loader())
    assert callback.state_dict()["restarts"] == 1
    assert not torch.equal(before["model.layers.0.weight"], module.model.layers[0].stored_weight())
