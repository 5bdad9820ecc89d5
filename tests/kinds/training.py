"""What is asserted of a LightningModule that trains, and of one that is refused."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import LightningPeftError
from lightning_peft.plugin.namespace import bind_to_lightning, namespace_of_class

from .kind import Kind

METHODS = {"lora": lightning_peft.LoRAStrategy, "qlora": lightning_peft.QLoRAStrategy}


def trainer_for(kind: Kind, method: str, module: Any, folder: Any) -> Any:
    root = namespace_of_class(type(module))
    arguments = {"r": 4, "announce": False, **kind.strategy}
    return import_module(root).Trainer(
        strategy=bind_to_lightning(METHODS[method], root)(**arguments),
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def snapshot(module: Any, chosen: Any) -> dict[str, torch.Tensor]:
    named = dict(module.named_parameters())
    return {name: named[name].detach().clone() for name in chosen if name in named}


@torch.no_grad()
def losses(module: Any, kind: Kind) -> torch.Tensor:
    """Losses of all batches in eval mode."""
    module.eval()
    with torch.random.fork_rng():
        torch.manual_seed(13)
        return torch.stack([kind.loss(module, batch, i) for i, batch in enumerate(kind.data())])


def check_training(kind: Kind, method: str, folder: Any) -> Any:
    """Trains a module with validation in between and asserts everything; returns the module."""
    module = kind.make()
    torch.manual_seed(1)
    trainer = trainer_for(kind, method, module, folder)
    seen: dict[str, dict[str, torch.Tensor]] = {}
    hook = module.on_train_start

    def note() -> None:
        record = engine.record_of(module)
        seen["base"] = snapshot(module, {n for p in record.parts.values() for n in p.frozen})
        trained = {n for n, p in module.named_parameters() if p.requires_grad}
        seen["trained"] = snapshot(module, trained)
        hook()

    module.on_train_start = note
    trainer.fit(module, *kind.loaders())
    del module.on_train_start
    record = engine.record_of(module)
    adapted = {
        part.qualified(target)
        for part in record.parts.values()
        for info in part.adapters.values()
        for target in info.targets
    }
    quantized = {n for part in record.parts.values() for n in part.quantized}
    assert quantized or method == "lora"
    kind.check_layers(adapted, quantized if method == "qlora" else set())
    # The base is the same bit for bit, although it was validated on before and in between.
    after = snapshot(module, seen["base"])
    assert after.keys() == seen["base"].keys()
    assert [n for n in after if not torch.equal(after[n], seen["base"][n])] == []
    # Everything that trains has moved, but for layers that the loss does not depend on.
    now = snapshot(module, seen["trained"])
    stuck = [n for n in now if torch.equal(now[n], seen["trained"][n])]
    assert {n for n in stuck if not any(f".{idle}." in f".{n}" for idle in kind.idle)} == set()
    # What was trained is in effect when the model is evaluated.
    on = losses(module, kind)
    assert on.isfinite().all()
    with lightning_peft.disable_adapters(module):
        off = losses(module, kind)
    assert (on - off).abs().max() > 1e-4
    trainer.save_checkpoint(folder / "run.ckpt")
    again = kind.make()
    torch.manual_seed(1)
    trainer_for(kind, method, again, folder).validate(
        again,
        kind.loaders()[1],
        ckpt_path=folder / "run.ckpt",
        verbose=False,
        weights_only=False if kind.trusted else None,
    )
    assert torch.equal(losses(again, kind), on)
    return module


def check_refused(kind: Kind, method: str, folder: Any) -> None:
    """Asserts the error, and that the module is as it was before."""
    module = kind.make()
    before = snapshot(module, dict(module.named_parameters()))
    with pytest.raises(LightningPeftError, match=kind.refused[method]):
        trainer_for(kind, method, module, folder).fit(module, *kind.loaders())
    after = snapshot(module, before)
    assert all(torch.equal(after[n], value) for n, value in before.items())
