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
from lightning_peft.plan import activation_decision
from lightning_peft.plan.activation_decision import ActivationDecision
from lightning_peft.plan.device_memory import DeviceMemory
from lightning_peft.plugin import automatic_checkpointing
from lightning_peft.plugin.automatic_checkpointing import whole_memory
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


@pytest.fixture
def little_memory(monkeypatch):
    """A device that no run fits into, and a planner that is asked."""
    monkeypatch.setattr(activation_decision, "NEGLIGIBLE", 0)
    little = DeviceMemory("a small device", 1_000_000, "cpu")
    monkeypatch.setattr(automatic_checkpointing, "memory_of", lambda *given: little)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_auto_keeps_everything_where_it_fits(method, tmp_path, said):
    ours = strategy(method, gradient_checkpointing="auto")
    trainer(tmp_path, ours).fit(task(kind="llama"), loader("llama"))
    (line,) = [text for text in said if "gradient_checkpointing" in text]
    assert line.startswith("gradient_checkpointing='auto': off: all activations take less than")
    assert line.endswith("gradient_checkpointing=True switches it on.")
    decided = ours.lifecycle.decided["gradient_checkpointing"]
    assert decided["value"] is False
    assert decided["reason"] in line


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_auto_checkpoints_where_it_does_not_fit(method, tmp_path, said, little_memory):
    ours = strategy(method, gradient_checkpointing="auto")
    trainer(tmp_path, ours).fit(task(kind="llama"), loader("llama"))
    (line,) = [text for text in said if "gradient_checkpointing" in text]
    assert line.startswith(
        "gradient_checkpointing='auto': on (2 LlamaDecoderLayer of model): with all activations "
        "kept the step takes up to "
    )
    assert "more than 85% of the 1.0 MB of a small device" in line
    assert line.endswith("gradient_checkpointing=False switches it off.")


def test_auto_has_nothing_to_decide_where_nothing_repeats(tmp_path, said, little_memory):
    trainer(tmp_path, "qlora").fit(task(kind="linears"), loader("linears"))
    assert not [text for text in said if "gradient_checkpointing" in text]


@pytest.mark.parametrize("kind", ["residuals", "llama"])
def test_auto_computes_the_same_both_ways(kind, tmp_path, monkeypatch):
    kept, _ = fit(tmp_path, "qlora", kind, "auto")
    monkeypatch.setattr(activation_decision, "NEGLIGIBLE", 0)
    little = DeviceMemory("a small device", 1_000_000, "cpu")
    monkeypatch.setattr(automatic_checkpointing, "memory_of", lambda *given: little)
    during = []

    class Watch(lightning(ROOTS[0]).Callback):
        def on_train_batch_end(self, trainer, pl_module, *given):
            during.append(bool(extended(pl_module) or recomputes(pl_module.model)))

    other, _ = fit(tmp_path, "qlora", kind, "auto", callbacks=[Watch()])
    assert all(during)
    assert other.losses == kept.losses
    assert not differing(weights(other), weights(kept))


def test_a_larger_batch_is_decided_for_again(tmp_path, said, monkeypatch):
    sizes = []

    def decide(module, batch, settings, device):
        sizes.append(tuple(batch["ids"].shape))
        large = batch["ids"].shape[0] > 8
        return ActivationDecision(large, "it is large" if large else "it is small", room=4.0)

    monkeypatch.setattr(automatic_checkpointing, "decide_activations", decide)
    rows = [{"ids": torch.randint(0, 16, (n, 6))} for n in (2, 4, 3, 16, 32)]
    ours = strategy(gradient_checkpointing="auto")
    run = trainer(tmp_path, ours, max_epochs=1)
    run.fit(task(kind="llama"), torch.utils.data.DataLoader(rows, batch_size=None))
    # Up to twice the elements the room of four is enough, since attention grows with the square.
    assert sizes == [(2, 6), (16, 6)]
    lines = [text.split(". ")[0] for text in said if "gradient_checkpointing" in text]
    assert lines == [
        "gradient_checkpointing='auto': off: it is small",
        "gradient_checkpointing='auto': on (2 LlamaDecoderLayer of model): it is large",
    ]


@pytest.mark.parametrize(("share", "begins"), [(1, "on (2"), (2, "off: all activations")])
def test_what_a_run_decided_is_taken_where_the_memory_is_there(share, begins, tmp_path, said):
    ours = strategy(gradient_checkpointing="auto")
    module = task(kind="llama")
    known = {"value": True, "up_to": [], "device_bytes": share * whole_memory(module)}
    ours.lifecycle.decided["gradient_checkpointing"] = known
    trainer(tmp_path, ours).fit(module, loader("llama"))
    (line,) = [text for text in said if "gradient_checkpointing" in text]
    assert line.startswith(f"gradient_checkpointing='auto': {begins}")
    assert ("as when the run began" in line) is (share == 1)


@pytest.mark.parametrize(("integers", "taken"), [(1000, True), (9, False)])
def test_what_a_run_decided_is_taken_for_batches_as_large(integers, taken, tmp_path, said):
    ours = strategy(gradient_checkpointing="auto")
    module = task(kind="llama")
    up_to = [{"integers": integers, "floats": 0, "characters": 0, "longest": 99}]
    known = {"value": False, "up_to": up_to, "device_bytes": whole_memory(module)}
    ours.lifecycle.decided["gradient_checkpointing"] = known
    trainer(tmp_path, ours, max_steps=1).fit(module, loader("llama"))
    (line,) = [text for text in said if "gradient_checkpointing" in text]
    assert ("as when the run began" in line) is taken


def test_a_longer_batch_of_as_many_tokens_is_decided_for_once(tmp_path, monkeypatch):
    sizes = []

    def decide(module, batch, settings, device):
        sizes.append(tuple(batch["ids"].shape))
        return ActivationDecision(False, "it is small", room=1.0)

    monkeypatch.setattr(automatic_checkpointing, "decide_activations", decide)
    shapes = ((4, 4), (2, 8), (4, 4), (1, 8), (2, 8))
    rows = [{"ids": torch.randint(0, 16, shape)} for shape in shapes]
    ours = strategy(gradient_checkpointing="auto")
    run = trainer(tmp_path, ours, max_epochs=1)
    run.fit(task(kind="llama"), torch.utils.data.DataLoader(rows, batch_size=None))
    assert sizes == [(4, 4), (2, 8)]
    up_to = ours.lifecycle.decided["gradient_checkpointing"]["up_to"]
    assert [bounds["longest"] for bounds in up_to] == [4, 8]


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
