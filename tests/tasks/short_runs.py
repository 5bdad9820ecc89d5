"""What the tests of tasks share: short runs on a CPU, on tiny models."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lightning_peft.demo.run import BASE
from lightning_peft.plugin.loading import load_from_checkpoint
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.plugin.strategies import LoRAStrategy, QLoRAStrategy

STRATEGIES = {"lora": LoRAStrategy, "qlora": QLoRAStrategy}
# An encoder with random weights for the demo's tokenizer.
ENCODER = {
    "model_type": "modernbert",
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "cls_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "mlp_dropout": 0.0,
}
MODELS = {
    "decoder": {"model": str(BASE), "dtype": "float32"},
    "encoder": {"model": "from a config", "config": ENCODER},
}


def trainer(method: Any = None, root: str = ROOTS[1], **options: Any) -> Any:
    """Returns a Trainer for a few steps, with adapters if a method is named, or a strategy."""
    if isinstance(method, str):
        strategy = bind_to_lightning(STRATEGIES[method], root)
        method = strategy(r=4, announce=False, optimizer=None)
    if method is not None:
        options["strategy"] = method
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    here = {"accelerator": "cpu", "devices": 1, **dict.fromkeys(quiet, False)}
    return import_module(root).Trainer(**(here | options))


def make(cls: type, *arguments: Any, **options: Any) -> Any:
    """Returns a task or a data module for the Lightning of :func:`trainer`."""
    return bind_to_lightning(cls, ROOTS[1])(*arguments, **options)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> set[str]:
    """Returns the names of parameters that are not what they were."""
    after = dict(module.named_parameters())
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


class Values:
    """Mixed into a callback: the parameters at the beginning of training."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = {n: p.detach().clone() for n, p in pl_module.named_parameters()}


def values() -> Any:
    base = import_module(ROOTS[1]).Callback
    return type("ValuesAtTheBeginning", (Values, base), {})()


# The layers of a new head; that of the decoder may have a bias.
HEADS = {
    "decoder": {"model.score.weight"},
    "encoder": {f"model.head.{name}.weight" for name in ("dense", "norm")}
    | {f"model.classifier.{name}" for name in ("weight", "bias")},
}


def fit_and_reload(
    made: Any, data: Any, method: str, heads: set[str], folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]], Any, list[dict[str, Any]]]:
    """Trains a task, and asserts that its adapters and heads alone moved and are in its files.

    Returns:
        The metrics, the predictions, and the task of the checkpoint with its predictions.
    """
    before = values()
    runner = trainer(method, max_epochs=2, callbacks=[before], num_sanity_val_steps=-1)
    runner.fit(made, data)
    metrics = dict(runner.callback_metrics)
    moved = changed(before.before, made)
    assert moved == heads | {n for n, p in made.named_parameters() if "lora_" in n}
    assert moved == {n for n, p in made.named_parameters() if p.requires_grad}
    predictions = [row for batch in runner.predict(made, data) for row in batch]
    assert json.loads(json.dumps(predictions)) == predictions
    runner.save_checkpoint(folder / "one.ckpt")
    saved = torch.load(folder / "one.ckpt", weights_only=True)["state_dict"]
    assert heads <= saved.keys()
    (adapter,) = (folder / "adapters" / "one").rglob("adapter_model.safetensors")
    stored = load_file(adapter)
    for name in heads:
        (same,) = (k for k in stored if k.endswith(name.removeprefix("model.")))
        assert torch.equal(stored[same], dict(made.named_parameters())[name])
    again = load_from_checkpoint(type(made), folder / "one.ckpt")
    with torch.no_grad():
        batches = [again.predict_step(b, i) for i, b in enumerate(data.predict_dataloader())]
    return metrics, predictions, again, [row for batch in batches for row in batch]


def line(root: str, losses: Iterable[float] | None = None, scheduler: Any = None) -> Any:
    """Returns a module that trains a line; with ``losses``, one of them for each validation."""
    given = None if losses is None else iter(losses)

    class Module(import_module(root).LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.line = torch.nn.Linear(1, 1)
            # The steps at which it was validated.
            self.validated: list[int] = []

        def training_step(self, batch: Any, index: int) -> Any:
            return self.line(batch).square().mean()

        def validation_step(self, batch: Any, index: int) -> None:
            if self.trainer.sanity_checking:
                self.log("val_loss", 9.0)
            else:
                self.validated.append(self.trainer.global_step)
                own = self.line(batch).square().mean()
                loss = own if given is None else next(given, None)
                # Lightning takes a StopIteration for the end of its rows.
                assert loss is not None, "validated more often than there are losses"
                self.log("val_loss", loss)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 1e-4)
            return optimizer if scheduler is None else scheduler(optimizer)

    return Module()
