"""Lightning's ``WeightAveraging`` over adapters: its numbers, files, resumes, and no base."""

from __future__ import annotations

import pytest
import torch
from modules import (
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
from lightning_peft import engine
from lightning_peft.errors import CheckpointError, UnsupportedError


class Recorder(task_class(ROOTS[0])):
    """Averages by itself, after each step, what the callback is to average."""

    def on_train_batch_end(self, *given):
        trained = {n: p.detach() for n, p in self.named_parameters() if p.requires_grad}
        before = self.__dict__.setdefault("average", {n: p.clone() for n, p in trained.items()})
        for name, value in trained.items():
            before[name] += (value - before[name]) * self.share


LONG = pytest.mark.long
METHODS = pytest.mark.parametrize("method", [pytest.param("lora", marks=LONG), "qlora"])


def averaging(root=ROOTS[0], decay=0.75):
    return lightning(root).callbacks.EMAWeightAveraging(decay=decay)


class WithCallback(Recorder):
    """Brings the callback by itself."""

    def configure_callbacks(self):
        return [self.own]


@pytest.mark.parametrize("cls", [Recorder, WithCallback])
@METHODS
def test_the_average_is_of_what_trains_and_ends_in_the_module(method, cls, tmp_path):
    Recorder.share = 0.25
    torch.manual_seed(5)
    module, callback = cls(), averaging()
    module.own = callback
    given = [] if cls is WithCallback else [callback]
    run = trainer(tmp_path / "root", method, callbacks=given, max_epochs=2)
    run.fit(module, loader(), loader())
    for name, param in module.named_parameters():
        if param.requires_grad:
            torch.testing.assert_close(param.detach(), module.average[name])
    held = list(callback._average_model.module.state_dict().values())
    assert sum(t.numel() for t in held) < 2000
    assert {t.dtype for t in held} <= {torch.float32, torch.int64}
    assert isinstance(callback, lightning(ROOTS[0]).callbacks.EMAWeightAveraging)


def test_without_a_function_all_steps_weigh_the_same(tmp_path):
    seen = []

    class Module(task_class(ROOTS[0])):
        def on_train_batch_end(self, *given):
            seen.append(self.model.layers[0].lora_B["default"].weight.detach().clone())

    module = Module()
    callback = lightning(ROOTS[0]).callbacks.WeightAveraging()
    trainer(tmp_path, callbacks=[callback]).fit(module, loader())
    assert len(seen) == 6
    found = module.model.layers[0].lora_B["default"].weight.detach()
    torch.testing.assert_close(found, torch.stack(seen).mean(0))


@METHODS
@pytest.mark.parametrize("root", [ROOTS[0], pytest.param(ROOTS[1], marks=LONG)])
def test_files_hold_the_average_and_resume_exactly(method, root, tmp_path):
    validated = []

    class Module(task_class(root)):
        def validation_step(self, batch, batch_idx):
            validated.append(self.model.layers[0].lora_B["default"].weight.detach().clone())
            return super().validation_step(batch, batch_idx)

    def fit(ckpt_path=None, callbacks=()):
        torch.manual_seed(5 if ckpt_path is None else 1000)
        module = Module()
        given = {"callbacks": [averaging(root), *callbacks], "max_epochs": 2}
        run = trainer(tmp_path / "root", method, root, **given)
        run.fit(module, loader(shuffle=True), loader(), ckpt_path=ckpt_path)
        return module

    first = fit(callbacks=[saver(root, tmp_path, filename="{step}", save_top_k=-1)])
    files = sorted(tmp_path.glob("step=*.ckpt"))
    assert [file.stem for file in files] == ["step=12", "step=6"]
    again = fit(ckpt_path=files[1])
    assert again.losses == first.losses[6:]
    assert not differing(weights(again), weights(first))
    # Validation saw the average of the first epoch, and the file of then has it as its weights.
    name = "model.layers.0.lora_B.default.weight"
    written = torch.load(files[1], weights_only=True)
    assert torch.equal(written["state_dict"][name], validated[0])
    assert not torch.equal(written["current_model_state"][name], validated[0])
    assert not any("weight" in n and "layers.0.weight" in n for n in written["current_model_state"])
    loaded = lightning_peft.load_from_checkpoint(task_class(root), files[1])
    assert torch.equal(engine.trainable_state_dict(loaded)[name], validated[0])
    folder = task(root)
    settings = engine.quantization_config() if method == "qlora" else None
    adapter = tmp_path / "adapters" / "step=6"
    lightning_peft.load_adapter(folder, adapter, quantization_config=settings)
    assert torch.equal(outputs(folder), outputs(loaded))


def test_after_a_fit_another_checkpoint_is_validated_and_saved_as_it_is(tmp_path):
    name = "model.layers.0.lora_B.default.weight"
    seen = []

    class Module(task_class(ROOTS[0])):
        def validation_step(self, batch, batch_idx):
            seen.append(self.model.layers[0].lora_B["default"].weight.detach().clone())
            return super().validation_step(batch, batch_idx)

    points = saver(ROOTS[0], tmp_path, filename="{epoch}", save_top_k=-1)
    run = trainer(tmp_path / "root", callbacks=[averaging(), points], max_epochs=2)
    module = Module()
    run.fit(module, loader(), loader())
    first, last = (
        torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"][name]
        for epoch in (0, 1)
    )
    assert not torch.equal(first, last)
    for file, expected in (("epoch=0.ckpt", first), (None, first), ("epoch=1.ckpt", last)):
        seen.clear()
        run.validate(module, loader(), ckpt_path=file and tmp_path / file, verbose=False)
        assert torch.equal(seen[0], expected)
        run.save_checkpoint(tmp_path / "again.ckpt")
        again = torch.load(tmp_path / "again.ckpt", weights_only=True)
        assert torch.equal(again["state_dict"][name], expected)
        folder = task()
        lightning_peft.load_adapter(folder, tmp_path / "adapters" / "again")
        assert torch.equal(engine.trainable_state_dict(folder)[name], expected)


@pytest.mark.long
def test_a_run_goes_on_in_the_weights_that_train(tmp_path):
    plain, averaged = (_losses(tmp_path, callbacks) for callbacks in ([], [averaging()]))
    assert plain == averaged


def _losses(folder, callbacks):
    torch.manual_seed(5)
    module = task()
    run = trainer(folder, callbacks=list(callbacks), max_epochs=2, val_check_interval=2)
    run.fit(module, loader(), loader())
    return module.losses


@pytest.mark.long
def test_a_callback_that_comes_before_ours_or_from_the_module(tmp_path):
    def fitted(callbacks, own=()):
        class Module(task_class(ROOTS[0])):
            def configure_callbacks(self):
                return list(own)

        torch.manual_seed(5)
        module = Module()
        lora = lightning_peft.LoRACallback(r=4, announce=False)
        given = {"callbacks": [*callbacks, lora], "max_epochs": 2}
        trainer(tmp_path, "auto", **given).fit(module, loader())
        return weights(module)

    before, inside = fitted([averaging()]), fitted([], [averaging()])
    assert not differing(before, inside)
    assert differing(before, fitted([]))


def test_it_averages_the_whole_model_without_adapters_again(tmp_path):
    callback = averaging()
    trainer(tmp_path, callbacks=[callback]).fit(task(), loader())
    module = task()
    trainer(tmp_path, "auto", callbacks=[callback]).fit(module, loader())
    expected = task()
    trainer(tmp_path, "auto", callbacks=[averaging()]).fit(expected, loader())
    assert not differing(weights(module), weights(expected))


def stochastic():
    return lightning(ROOTS[0]).callbacks.StochasticWeightAveraging(
        0.01, swa_epoch_start=1, annealing_epochs=1
    )


@pytest.mark.parametrize("average", [averaging, stochastic])
def test_a_checkpoint_of_other_tensors_is_refused(average, tmp_path):
    class Module(task_class(ROOTS[0])):
        def build(self):
            super().build()
            # SWA is for models without batch norms.
            self.model.norm = torch.nn.Identity()

    class Frozen(Module):
        def configure_optimizers(self):
            self.model.head.requires_grad_(False)
            return super().configure_optimizers()

    points = saver(ROOTS[0], tmp_path, filename="one")
    trainer(tmp_path / "root", callbacks=[points, average()]).fit(Module(), loader())
    run = trainer(tmp_path / "root", callbacks=[average()], max_epochs=2)
    with pytest.raises(CheckpointError, match=r"averages of other tensors(.|\n)*model\.head\.bias"):
        run.fit(Frozen(), loader(), ckpt_path=tmp_path / "one.ckpt")


@pytest.mark.long
def test_a_file_without_an_average_starts_one(tmp_path):
    points = saver(ROOTS[0], tmp_path, filename="one")
    trainer(tmp_path / "root", callbacks=[points]).fit(task(), loader())
    run = trainer(tmp_path / "root", callbacks=[averaging(decay=0.0)], max_epochs=2)
    module = task()
    run.fit(module, loader(), ckpt_path=tmp_path / "one.ckpt")
    assert len(module.losses) == 6


def test_stochastic_weight_averaging_over_adapters(tmp_path):
    ends = []

    class Module(task_class(ROOTS[0])):
        def on_train_epoch_start(self):
            ends.append(self.model.lm_head.weight.detach().clone())
            ends.append(self.model.model.layers[0].mlp.up_proj.lora_B["default"].weight.clone())

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def fit(ckpt_path=None, callbacks=()):
        torch.manual_seed(5 if ckpt_path is None else 1000)
        module = Module("llama")
        average = lightning(ROOTS[0]).callbacks.StochasticWeightAveraging(
            0.01, swa_epoch_start=2, annealing_epochs=1
        )
        given = {"callbacks": [average, *callbacks], "max_epochs": 3}
        run = trainer(tmp_path / "root", "qlora", **given)
        run.fit(module, loader("llama", shuffle=True), ckpt_path=ckpt_path)
        held = average.state_dict()["average_model_state"]
        trained = [p for p in module.parameters() if p.requires_grad]
        assert sum(t.numel() for t in held.values()) == sum(p.numel() for p in trained)
        return module

    first = fit(callbacks=[saver(ROOTS[0], tmp_path, filename="{epoch}", save_top_k=-1)])
    layer = first.model.model.layers[0].mlp.up_proj.lora_B["default"].weight.detach()
    # The epochs that begin after the first are averaged.
    torch.testing.assert_close(layer, torch.stack(ends[3:6:2]).mean(0))
    torch.testing.assert_close(
        first.model.lm_head.weight.detach(), torch.stack(ends[2:6:2]).mean(0)
    )
    again = fit(ckpt_path=tmp_path / "epoch=1.ckpt")
    assert not differing(weights(again), weights(first))


def test_stochastic_weight_averaging_with_batch_norms_is_refused(tmp_path):
    average = lightning(ROOTS[0]).callbacks.StochasticWeightAveraging(0.01)
    with pytest.raises(UnsupportedError, match=r"statistics of batch norms(.|\n)*model\.norm"):
        trainer(tmp_path, callbacks=[average]).fit(task(), loader())


@pytest.mark.parametrize("name", ["WeightAveraging", "StochasticWeightAveraging"])
def test_a_setup_that_would_not_be_called_is_refused(name, tmp_path):
    kind = getattr(lightning(ROOTS[0]).callbacks, name)

    class Own(kind):
        def setup(self, trainer, pl_module, stage):
            super().setup(trainer, pl_module, stage)

    given = {"swa_lrs": 0.01} if name.startswith("Stochastic") else {}
    with pytest.raises(UnsupportedError, match=r"callback Own has a `setup`.*`on_fit_start`"):
        trainer(tmp_path, callbacks=[Own(**given)]).fit(task(), loader())
