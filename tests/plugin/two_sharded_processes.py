"""Script of processes that share a base: `python two_sharded_processes.py FOLDER COUNT KIND...`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from modules import loader, strategy, task, trainer
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler

import lightning_peft
from lightning_peft.errors import LightningPeftError

ROOT = "lightning.pytorch"
# Settings that have to go together with sharding, one set for each model.
SETTINGS = {
    "llama": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "val_check_interval": 2},
    "llama_tied": {"precision": "bf16-mixed", "val_check_interval": 3},
}


def fit(folder, count, kind, method="qlora", sharding="fsdp2", ckpt_path=None, ours=None, **given):
    """Trains in all processes, four rows each step or more; returns Trainer and module."""
    torch.manual_seed(7)
    module = task(ROOT, kind=kind)
    if kind == "llama":
        # Of transposed strides, as some loaders leave weights.
        embedding = module.model.model.embed_tokens.weight
        embedding.data = embedding.data.t().contiguous().t()
    chosen = strategy(method, ROOT, sharding=sharding, **(ours or {}))
    run = trainer(
        folder / "root", chosen, ROOT, devices=count, **{**SETTINGS.get(kind, {}), **given}
    )
    torch.manual_seed(8 + run.global_rank)
    rows = loader(kind).dataset
    order = DistributedSampler(rows, count, run.global_rank, shuffle=False)
    # Batch norm needs two rows.
    data = DataLoader(
        rows, batch_size=max(4 // count, 2 if kind == "residuals" else 1), sampler=order
    )
    run.fit(module, data, loader(kind), ckpt_path=ckpt_path)
    return run, module


def trained(module):
    """Losses, and copies of what trains."""
    values = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    return {"losses": module.losses, "weights": values}


def local_bytes(module):
    """Bytes of the frozen parameters in this process; storages are counted once."""
    frozen = [p for p in module.parameters() if not p.requires_grad]
    parts = [p.to_local() if hasattr(p, "to_local") else p.data for p in frozen]
    constants = [
        one
        for layer in module.modules()
        if hasattr(layer, "quantization_keys") and layer.packed is None
        for one in layer.backend.constants(layer.stored_weight())
    ]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in parts + constants)}
    return sum(storages.values())


def refusals(module):
    """What cannot be asked of a sharded module, and the message of each."""
    found = {}
    adapted = next(m for m in module.modules() if hasattr(m, "adapter_settings"))
    asked = {
        "merge": lambda: lightning_peft.merge(module),
        "report": lambda: lightning_peft.report(module),
        "weight": adapted.effective_weight,
        "values": lambda: adapted.weight.float(),
    }
    if hasattr(module.model, "generate"):
        asked["generate"] = lambda: module.model.generate(torch.zeros(1, 1, dtype=torch.long))
    for name, ask in asked.items():
        try:
            ask()
        except LightningPeftError as error:
            found[name] = str(error)
    return found


def stages(run, module, folder):
    """Validates and predicts with a checkpoint, without a fit, in a fresh module."""
    fresh = task(ROOT, kind=module.kind)
    path = folder / "sharded.ckpt"
    again = trainer(
        folder / "root", strategy("qlora", ROOT, sharding="fsdp2"), ROOT, devices=run.world_size
    )
    data = loader(module.kind)
    predicted = again.predict(fresh, data, ckpt_path=path)
    # Lightning repeats no row for predictions.
    odd = DataLoader([data.dataset[i] for i in range(again.world_size + 1)], batch_size=1)
    try:
        again.predict(fresh, odd)
    except LightningPeftError as error:
        unequal = str(error)
    return {
        "unequal": unequal,
        "after fit": run.validate(module, loader(module.kind), verbose=False)[0]["val_loss"],
        "fresh": again.validate(fresh, data, ckpt_path=path, verbose=False)[0]["val_loss"],
        "predicted": predicted[0],
    }


def compare(folder, count, kind, method):
    """Trains with a whole base in each process and with a part of it."""
    whole_run, whole = fit(folder, count, kind, method, sharding=None)
    whole_run.save_checkpoint(folder / f"{kind} {method}" / "whole.ckpt")
    seen = {"whole": trained(whole), "whole bytes": local_bytes(whole)}
    run, module = fit(folder, count, kind, method)
    run.save_checkpoint(folder / f"{kind} {method}" / "sharded.ckpt")
    seen |= {"sharded": trained(module), "bytes": local_bytes(module)}
    if method == "qlora" and kind == "llama":
        seen["stages"] = stages(run, module, folder / f"{kind} {method}")
    seen["refusals"] = refusals(module)
    adapted = next(m for m in module.modules() if hasattr(m, "adapter_settings"))
    seen["read"] = tuple(adapted.weight.shape), adapted.weight.dtype
    return seen


def other_base(folder, count):
    """Gives the Trainer a module with adapters, and with another base on each rank."""
    module = task(ROOT, kind="llama")
    with torch.no_grad():
        module.model.model.layers[1].mlp.up_proj.weight[0, 0] += distributed.get_rank()
    lightning_peft.engine.inject(module, r=4, lora_alpha=8)
    ours = strategy("lora", ROOT, sharding="fsdp2")
    try:
        trainer(folder, ours, ROOT, devices=count).fit(module, loader("llama"))
    except LightningPeftError as error:
        return str(error)


def other_blocks(folder, count):
    """Fits with blocks whose choice depends on the process, as that of experts may."""
    module = task(ROOT, kind="residuals")
    first, second, *others = module.model
    blocks = [first, second]

    def forward(rows):
        rows = blocks[distributed.get_rank() % 2](rows)
        for block in others:
            rows = block(rows)
        return rows

    module.model.forward = forward
    ours = strategy("lora", ROOT, sharding="fsdp2")
    try:
        trainer(folder, ours, ROOT, devices=count).fit(module, loader("residuals"))
    except LightningPeftError as error:
        return str(error)


def main(folder: Path, count: int, cases: list[str]) -> None:
    torch.set_num_threads(1)
    seen = {}
    for case in cases:
        kind, method = case.split(":")
        seen[case] = compare(folder, count, kind, method)
    kind, method = cases[0].split(":")
    place, more = folder / f"{kind} {method}", {"max_epochs": 2}
    for name in ("whole", "sharded"):
        # Each goes on from the other's.
        other = {"whole": "sharded", "sharded": "whole"}[name]
        _, module = fit(
            folder, count, kind, method, None if name == "whole" else "fsdp2",
            ckpt_path=place / f"{other}.ckpt", **more,
        )  # fmt: skip
        seen[f"resumed {name}"] = trained(module)
    seen["other base"] = other_base(folder / "other", count)
    seen["other blocks"] = other_blocks(folder / "other", count)
    torch.save(seen, folder / f"rank{distributed.get_rank()}.pt")
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
