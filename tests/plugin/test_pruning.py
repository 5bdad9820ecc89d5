"""Pruning callbacks: refused on the frozen base, as they are on what trains in full."""

from __future__ import annotations

import pytest
from modules import ROOTS, lightning, loader, strategy, task, task_class, trainer
from torch import nn

from lightning_peft.errors import LifecycleError, UnsupportedError

METHODS = ("lora", "qlora")


def pruning(root=ROOTS[0], **given):
    settings = {"pruning_fn": "l1_unstructured", "amount": 0.5, **given}
    return lightning(root).callbacks.ModelPruning(**settings)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("root", ROOTS)
def test_the_base_is_not_pruned(root, method, tmp_path):
    module = task(root)
    chosen = [(module.model.layers[1], "weight"), (module.model.head, "weight")]
    cases = [
        (pruning(root), r"base: model\.layers\.0\.weight, .* and \d more\. No checkpoint holds"),
        (pruning(root, parameters_to_prune=chosen), r"base: model\.layers\.1\.weight\. No check"),
    ]
    for callback, message in cases:
        with pytest.raises(UnsupportedError, match=message):
            trainer(tmp_path, method, root, callbacks=[callback]).fit(module, loader())
    assert module.losses == []
    trainer(tmp_path, method, root).fit(module, loader())
    assert len(module.losses) == 6


@pytest.mark.parametrize("method", METHODS)
def test_a_head_is_pruned(method, tmp_path):
    module = task()
    callback = pruning(parameters_to_prune=[(module.model.head, "weight")])
    trainer(tmp_path, method, callbacks=[callback]).fit(module, loader())
    # Half of 96 weights, made permanent at the end.
    assert int((module.model.head.weight == 0).sum()) == 48


def test_callbacks_for_quantization_are_refused(tmp_path):
    class QuantizationAwareTraining(lightning(ROOTS[0]).Callback):
        """As Lightning had one until 2.0, and others still have."""

    with pytest.raises(UnsupportedError, match="it replaces layers of the frozen base"):
        trainer(tmp_path, callbacks=[QuantizationAwareTraining()]).fit(task(), loader())


def test_a_base_that_changes_inside_wrappers_is_found(tmp_path):
    """PEFT's own wrappers hold plain layers, which anyone can change."""

    class Late(task_class(ROOTS[0])):
        def on_train_start(self):
            layer = self.model.layers[0]
            nn.utils.prune.l1_unstructured(layer.base_layer, "weight", 0.5)

    config = {"peft_type": "LOHA", "r": 2, "target_modules": ["layers.0"]}
    run = trainer(tmp_path, strategy("lora", r=16, peft_config=config), enable_checkpointing=False)
    run.fit(Late(), loader())
    with pytest.raises(LifecycleError, match=r"taken away .*\n  - model\.layers\.0\.base_layer\.w"):
        run.save_checkpoint(tmp_path / "one.ckpt")
    assert not (tmp_path / "one.ckpt").exists()
