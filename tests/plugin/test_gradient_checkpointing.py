"""``gradient_checkpointing=``: a fit that keeps less and computes the same."""

from __future__ import annotations

import pytest
import torch
from modules import (
    ROOTS,
    build,
    differing,
    lightning,
    loader,
    strategy,
    task,
    task_class,
    trainer,
    weights,
)
from torch import nn

from lightning_peft import LoRAStrategy, QLoRAStrategy
from lightning_peft.engine.training.activation_checkpointing import CheckpointedBlock
from lightning_peft.errors import ConfigError, UnsupportedError
from lightning_peft.plugin.namespace import bind_to_lightning


def extended(module):
    return [m for m in module.modules() if isinstance(m, CheckpointedBlock)]


def recomputes(model):
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def fit(folder, method, kind, wanted, root=ROOTS[0], callbacks=(), **given):
    torch.manual_seed(3)
    module = task(root, kind=kind)
    if kind == "llama":
        module.model.config.use_cache = False
    targets = ["up", "down"] if kind == "residuals" else None
    ours = strategy(
        method,
        root,
        lora_dropout=0.2,
        target_modules=targets,
        gradient_checkpointing=wanted,
        optimizer=None,
    )
    run = trainer(folder, ours, root, val_check_interval=0.5, callbacks=list(callbacks), **given)
    run.fit(module, loader(kind, shuffle=True), loader(kind))
    return module, run


@pytest.mark.parametrize("kind", ["residuals", "llama"])
@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("lora", {"accumulate_grad_batches": 2}),
        ("qlora", {}),
        ("qlora", {"precision": "bf16-mixed"}),
        ("lora", {"precision": "bf16-true"}),
    ],
)
def test_a_fit_computes_the_same(kind, method, given, tmp_path):
    during = []

    class Watch(lightning(ROOTS[0]).Callback):
        def on_train_start(self, trainer, pl_module):
            during.append(len(extended(pl_module)) or recomputes(pl_module.model))

    kept, first = fit(tmp_path, method, kind, False, **given)
    other, second = fit(tmp_path, method, kind, True, callbacks=[Watch()], **given)
    assert during == [3 if kind == "residuals" else True]
    assert other.losses == kept.losses
    assert not differing(weights(other), weights(kept))
    assert second.callback_metrics["val_loss"] == first.callback_metrics["val_loss"]
    assert not extended(other)
    budget, third = fit(tmp_path, method, kind, 0.6, **given)
    assert budget.losses == kept.losses
    assert not differing(weights(budget), weights(kept))
    assert third.callback_metrics["val_loss"] == first.callback_metrics["val_loss"]


def test_a_budget_says_what_it_decided(tmp_path, said):
    trainer(tmp_path, strategy(gradient_checkpointing=0.6)).fit(task(kind="llama"), loader("llama"))
    first, second = [text for text in said if "gradient_checkpointing" in text]
    assert first == "gradient_checkpointing=0.6: 2 LlamaDecoderLayer of model."
    assert second.startswith("gradient_checkpointing=0.6: saved activations: ")


def test_a_budget_that_nothing_fits_into_ends_the_first_step(tmp_path):
    module = task(kind="llama")
    with pytest.raises(UnsupportedError, match=r"='1kB': the inputs of the blocks alone are"):
        trainer(tmp_path, strategy(gradient_checkpointing="1kB")).fit(module, loader("llama"))
    assert not any(getattr(m, "gradient_checkpointing", False) for m in module.modules())


def test_qlora_does_it_by_itself_and_says_so(tmp_path, said):
    found = {}
    for method, kind in (("lora", "llama"), ("qlora", "llama"), ("qlora", "linears")):
        said.clear()
        trainer(tmp_path, strategy(method)).fit(task(kind=kind), loader(kind))
        found[method, kind] = {text for text in said if "gradient_checkpointing" in text}
    assert found == {
        ("lora", "llama"): set(),
        ("qlora", "llama"): {"gradient_checkpointing='auto': 2 LlamaDecoderLayer of model."},
        ("qlora", "linears"): set(),
    }


def test_generate_after_a_fit_has_its_cache(tmp_path):
    module = task(kind="llama")
    trainer(tmp_path, "qlora").fit(module, loader("llama"))
    model = module.model.eval()
    assert model.config.use_cache is True
    assert not recomputes(model)
    ids = torch.arange(4)[None]
    assert model(input_ids=ids).past_key_values.get_seq_length() == 4
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(ids, **settings)
    assert torch.equal(with_cache, model.generate(ids, **settings, use_cache=False))


@pytest.mark.parametrize("kind", ["residuals", "llama"])
def test_everything_is_put_back_after_an_error(kind, tmp_path):
    class Failing(task_class(ROOTS[0])):
        def on_train_batch_end(self, *given):
            raise RuntimeError("stop here")

    module = Failing(kind)
    ours = strategy(gradient_checkpointing=True, target_modules="all-linear")
    with pytest.raises(RuntimeError, match="stop here"):
        trainer(tmp_path, ours).fit(module, loader(kind))
    assert not extended(module)
    assert type(module.model) is type(build(kind))
    assert not any(getattr(m, "gradient_checkpointing", False) for m in module.modules())


def test_true_needs_something_that_repeats(tmp_path):
    ours = strategy(gradient_checkpointing=True)
    with pytest.raises(UnsupportedError, match=r"no block repeats in Task.*'auto' or False"):
        trainer(tmp_path, ours).fit(task(), loader())


def test_a_compiled_module_is_left_to_the_compiler(tmp_path, said):
    module = torch.compile(task(kind="residuals"), backend="eager")
    ours = strategy(gradient_checkpointing="auto", target_modules=["up"])
    trainer(tmp_path, ours, max_steps=1).fit(module, loader("residuals"))
    assert any("off, since the module is compiled" in text for text in said)


@pytest.mark.parametrize("cls", [LoRAStrategy, QLoRAStrategy])
def test_other_values_are_refused(cls):
    with pytest.raises(ConfigError, match=r"gradient_checkpointing='yes': it is True, False, 'a"):
        bind_to_lightning(cls, ROOTS[0])(gradient_checkpointing="yes")


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path):
    """The module that a checkpoint is loaded into has other classes than the one it is from."""
    module, run = fit(tmp_path, "qlora", "residuals", True)
    run.save_checkpoint(tmp_path / "one.ckpt")
    results = []
    for wanted in (False, True):
        torch.manual_seed(3)
        fresh = task(kind="residuals")
        ours = strategy(
            "qlora",
            target_modules=["up", "down"],
            lora_dropout=0.2,
            gradient_checkpointing=wanted,
            optimizer=None,
        )
        trainer(tmp_path, ours, max_epochs=2).fit(
            fresh, loader("residuals", shuffle=True), ckpt_path=tmp_path / "one.ckpt"
        )
        results.append((fresh.losses, weights(fresh)))
    assert len(results[0][0]) == 6
    assert results[0][0] == results[1][0]
    assert not differing(results[0][1], results[1][1])
    assert isinstance(module.model, nn.Sequential)
