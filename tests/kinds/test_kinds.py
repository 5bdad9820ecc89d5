"""Every kind of module trains with LoRA and QLoRA, unedited, or is refused with a way out."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import LightningPeftError
from lightning_peft.plugin.namespace import realize, tree_of

from .kind import Kind
from .table import KINDS, PAGE, page

METHODS = {"lora": lightning_peft.LoRAStrategy, "qlora": lightning_peft.QLoRAStrategy}
BY_NAME = {kind.name: kind for kind in KINDS}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def trainer_for(kind: Kind, method: str, module: Any, folder: Any, **given: Any) -> Any:
    from importlib import import_module

    root = tree_of(type(module))
    arguments = {"r": 4, "announce": False, **kind.strategy}
    settings = {
        "strategy": realize(METHODS[method], root)(**arguments),
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "default_root_dir": folder,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return import_module(root).Trainer(**{**settings, **given})


def loader(kind: Kind) -> DataLoader:
    return DataLoader(kind.data(), batch_size=None)


def snapshot(module: Any, chosen: Any) -> dict[str, torch.Tensor]:
    named = dict(module.named_parameters())
    return {name: named[name].detach().clone() for name in chosen if name in named}


@torch.no_grad()
def losses(module: Any, kind: Kind) -> torch.Tensor:
    """Losses of all batches in eval mode."""
    module.eval()
    module.log = lambda *args, **kwargs: None
    try:
        found = [module.validation_step(batch, i) for i, batch in enumerate(kind.data())]
    finally:
        del module.log
    return torch.stack(found)


def last_names(layers: Any) -> set[str]:
    return {name.rpartition(".")[2] for name in layers}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [kind.name for kind in KINDS if not kind.refused])
def test_it_trains_unedited(name: str, method: str, tmp_path: Any) -> None:
    kind = BY_NAME[name]
    module = kind.make()
    torch.manual_seed(1)
    trainer = trainer_for(kind, method, module, tmp_path)
    seen: dict[str, dict[str, torch.Tensor]] = {}
    hook = module.on_train_start

    def note() -> None:
        record = engine.record_of(module)
        seen["base"] = snapshot(module, {n for p in record.parts.values() for n in p.frozen})
        trained = {n for n, p in module.named_parameters() if p.requires_grad}
        seen["trained"] = snapshot(module, trained)
        hook()

    module.on_train_start = note
    trainer.fit(module, loader(kind), loader(kind))
    del module.on_train_start
    record = engine.record_of(module)
    layers = {
        part.qualified(target): module.get_submodule(part.qualified(target))
        for part in record.parts.values()
        for info in part.adapters.values()
        for target in info.targets
    }
    assert last_names(layers) <= kind.adapted
    quantized = {n for part in record.parts.values() for n in part.quantized}
    expected = kind.adapted if kind.quantized is None else kind.quantized
    if method == "qlora":
        assert quantized
        assert last_names(quantized) <= expected
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
    verification = lightning_peft.verify(module, kind.data()[0])
    assert verification.passed, verification
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = kind.make()
    torch.manual_seed(1)
    trainer_for(kind, method, again, tmp_path).validate(
        again, loader(kind), ckpt_path=tmp_path / "run.ckpt", verbose=False
    )
    assert torch.equal(losses(again, kind), on)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [kind.name for kind in KINDS if kind.refused])
def test_it_is_refused_with_a_way_out(name: str, method: str, tmp_path: Any) -> None:
    kind = BY_NAME[name]
    module = kind.make()
    before = snapshot(module, dict(module.named_parameters()))
    with pytest.raises(LightningPeftError, match=kind.refused[method]):
        trainer_for(kind, method, module, tmp_path).fit(module, loader(kind), loader(kind))
    after = snapshot(module, before)
    assert all(torch.equal(after[n], value) for n, value in before.items())


def test_the_documentation_has_the_table_of_these_tests() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run PYTHONPATH=tests python -m kinds.table"
