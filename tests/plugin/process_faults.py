"""Faults of runs in several processes that happened to others, each put into a small run.

``python process_faults.py FOLDER COUNT CASE...`` trains with each fault, and keeps what every
process answers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from modules import loader, strategy, task, trainer
from torch import distributed

from lightning_peft.engine.adapters import all_adapter_parameters
from lightning_peft.engine.backends.packed import Share
from lightning_peft.errors import LightningPeftError

ROOT = "lightning.pytorch"


def own_rank() -> int:
    return distributed.get_rank()


def fit(folder, count, prepare=None, method="qlora", kind="llama", ckpt_path=None, **given):
    """Trains a few steps in all processes; ``prepare`` gets the module. Returns the error."""
    torch.manual_seed(7)
    module = task(ROOT, kind=kind)
    given = {"sharding": "fsdp2", **given}
    epochs = 1 if ckpt_path is None else 2
    run = trainer(folder, strategy(method, ROOT, **given), ROOT, devices=count, max_epochs=epochs)
    if prepare is not None:
        prepare(module)
    try:
        run.fit(module, loader(kind), ckpt_path=ckpt_path)
        if ckpt_path is None:
            run.save_checkpoint(folder / "sound.ckpt")
    except LightningPeftError as error:
        return str(error)
    return "trained"


def before_step(module: Any, change: Any) -> None:
    """Arranges for ``change`` of the module between its gradients and the optimizer's step."""
    module.on_before_optimizer_step = lambda optimizer: change(module)


def at_start(module: Any, change: Any) -> None:
    module.on_train_start = lambda: change(module)


def adapters(module: Any) -> list[Any]:
    return [p for p in all_adapter_parameters(module) if p.requires_grad]


@torch.no_grad()
def forget(module: Any) -> None:
    """Puts most adapters of one process back to what they were."""
    if own_rank() == 1:
        for param in adapters(module)[2:]:
            param.zero_()


def normalize_bits(module: Any) -> None:
    """What gathering as floating-point numbers did: patterns of NaN become another one."""

    def change(block: Any, args: Any) -> None:
        octets = block.mlp.up_proj._parameters["weight"].data
        halves = octets[: octets.numel() // 2 * 2].view(torch.int16)
        halves[:3] = 0x7FFF

    module.model.model.layers[1].register_forward_pre_hook(change)


def not_finite(module: Any) -> None:
    """A loss of zero, whose gradients are not numbers."""

    def training_step(batch: Any, batch_idx: int) -> Any:
        value = module.loss(batch)
        nothing = value - value.detach()
        nothing.register_hook(lambda gradient: gradient * float("nan"))
        return nothing

    module.training_step = training_step


def keep_one_layer(module: Any) -> None:
    def drop(module: Any) -> None:
        for param in adapters(module)[:-2]:
            param.grad = None

    before_step(module, drop)


def drop_in_one_process(module: Any) -> None:
    def drop(module: Any) -> None:
        if own_rank() == 1:
            for param in adapters(module)[:2]:
                param.grad = None

    before_step(module, drop)


def diverge(module: Any) -> None:
    def scale(module: Any) -> None:
        if own_rank() == 1:
            for param in adapters(module)[:2]:
                param.grad.neg_()

    before_step(module, scale)


def drop_states(module: Any) -> None:
    """The optimizer comes back without the states of most parameters."""

    def drop(module: Any) -> None:
        optimizer = module.optimizers(use_pl_optimizer=False)
        for param in adapters(module)[3:]:
            optimizer.state.pop(param, None)

    at_start(module, drop)


def rename_keys(module: Any) -> None:
    """A prefix that a wrapper left in the names."""

    def rename(checkpoint: Any) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {f"_checkpoint_wrapped_module.{n}": t for n, t in state.items()}

    module.on_load_checkpoint = rename


def replicate(folder: Path, count: int) -> str:
    """Parts are views of whole weights, which stay in each process for them."""
    usual = Share.of
    Share.of = lambda self, tensor, device: tensor.detach().chunk(self.count)[self.rank]
    try:
        return fit(folder, count)
    finally:
        Share.of = usual


def another_parameter(module: Any) -> None:
    """An optimizer that holds copies of some adapters."""

    def replace(module: Any) -> None:
        group = module.optimizers(use_pl_optimizer=False).param_groups[0]
        group["params"] = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]

    at_start(module, replace)


CASES: dict[str, Any] = {
    "gathered bits": normalize_bits,
    "not finite": not_finite,
    "one layer": keep_one_layer,
    "layers of one process": drop_in_one_process,
    "other adapters": diverge,
    "optimizer": another_parameter,
}
RESUMED: dict[str, Any] = {
    "resumed": None,
    "forgotten": lambda module: at_start(module, forget),
    "states": drop_states,
    "renamed": rename_keys,
}


FOUND = {
    "gathered bits": "process 0: gathering changed bits of the frozen base: "
    "model.model.layers.1.mlp.up_proj.weight",
    "replicated": "and its share is",
    "other adapters": "process 1 has other adapters after a step than process 0: model.",
    "not finite": "processes 0, 1: gradients are not finite: model.",
    "one layer": "processes 0, 1: 1 of 14 adapted layers got a gradient, none at model.",
    "layers of one process": "process 1 has other layers with gradients than process 0: model.",
    "optimizer": "processes 0, 1: no optimizer holds model.",
    "forgotten": "process 1: 26 of 28 adapter tensors are not those of the checkpoint: model.",
    "states": "has states of 3 parameters, and the checkpoint of 28",
    "renamed": "_checkpoint_wrapped_module.model.",
}


def check_answers(ranks: list[dict[str, str]], cases: Iterable[str]) -> None:
    """All processes end with the same words."""
    for case in cases:
        for rank in ranks:
            assert FOUND[case] in rank[case], (case, rank[case])


def answer(folder: Path, count: int, case: str) -> str:
    """Returns the words that a case ends with."""
    if case == "replicated":
        return replicate(folder, count)
    if case in RESUMED:
        return fit(folder, count, RESUMED[case], ckpt_path=folder / "sound.ckpt")
    return fit(folder, count, CASES.get(case))


def main(folder: Path, count: int, cases: list[str]) -> None:
    torch.set_num_threads(1)
    seen = {case: answer(folder, count, case) for case in ["sound", *cases]}
    torch.save(seen, folder / f"rank{own_rank()}.pt")
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
