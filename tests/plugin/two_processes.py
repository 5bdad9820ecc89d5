"""Script of two processes: `python two_processes.py FOLDER`; each writes what it saw."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from modules import lightning, loader, rows, saver, strategy, task, trainer, weights
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler

from lightning_peft import MergeAndRestart, QLoRACallback, engine, inject
from lightning_peft.engine.layers.lora import LoraLayer
from lightning_peft.errors import BaseMismatchError, LifecycleError, LightningPeftError
from lightning_peft.plugin import automatic_checkpointing
from lightning_peft.plugin.namespace import bind_to_lightning

ROOT = "lightning.pytorch"


def fit(folder, method, callbacks=(), dropout=0.0, shuffle=False, ckpt_path=None, **given):
    """Trains a Llama in both processes, two rows each per step."""
    torch.manual_seed(7)
    module = task(ROOT, kind="llama")
    ours = method
    if method in ("lora", "qlora"):
        # The callback checks the cheap way: that both train the same shows that neither disturbs.
        ours = strategy(method, ROOT, lora_dropout=dropout, announce=dropout > 0, verify="full")
    run = trainer(folder / "root", ours, ROOT, devices=2, callbacks=list(callbacks), **given)
    torch.manual_seed(8 + run.global_rank)
    rows, order = loader("llama").dataset, None
    if not shuffle:
        # Lightning's own would shuffle, and one process could not follow.
        order = DistributedSampler(rows, run.world_size, run.global_rank, shuffle=False)
    data = DataLoader(rows, batch_size=2, shuffle=shuffle, sampler=order)
    run.fit(module, data, loader("llama"), ckpt_path=ckpt_path)
    return run, module


def fit_residuals(folder, wanted):
    """Trains blocks with batch norm and dropout in both processes, each with its own rows."""
    torch.manual_seed(7)
    module = task(ROOT, kind="residuals")
    ours = strategy("lora", ROOT, target_modules=["up", "down"], gradient_checkpointing=wanted)
    run = trainer(folder / "root", ours, ROOT, devices=2, max_epochs=2)
    torch.manual_seed(8 + run.global_rank)
    run.fit(module, DataLoader(loader("residuals").dataset, batch_size=4), loader("residuals"))
    return {"losses": module.losses, "weights": weights(module)}


class Twice(torch.optim.SGD):
    """Calls its closure once more, as sharpness-aware minimization does."""

    def step(self, closure=None):
        closure()
        return super().step(closure)


# What torchrun sets where processes that it starts again would wait for those that are gone.
STALE = {"RUN_ID": "1", "MAX_RESTARTS": "1", "USE_AGENT_STORE": "True"}


def fit_short(folder, size, most=99, where="", victim=1, count=48, kind="", **options):
    """Trains with half the rows where one process has no memory.

    Where: in ``training_step`` around a value that all processes log, in the backward pass, before
    the step, or always. ``"unserved"`` exchanges something in the step. Kinds: an optimizer that
    calls its closure ``"twice"``, and a layer of the ``"first"`` process only.
    """
    torch.manual_seed(5)
    module, seen = task(ROOT, kind="residuals"), []
    usual = module.training_step
    if kind == "twice":
        module.configure_optimizers = lambda: Twice(module.parameters(), lr=0.1)
    if kind == "first":
        module.first = torch.nn.Linear(32, 1)
        options["ddp_kwargs"] = {"find_unused_parameters": True}

    def is_short(batch):
        return module.trainer.global_rank == victim and len(batch[0]) > most

    def fail(*given):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def step(batch, batch_idx):
        seen.append(len(batch[0]))
        loss = usual(batch, batch_idx)
        module.log("loss", loss, sync_dist=True)
        if kind == "first" and module.trainer.global_rank == 0:
            loss = loss + module.first(batch[0]).square().mean()
        if where == "unserved":
            distributed.all_reduce(loss.detach())
        if is_short(batch) and where == "step":
            fail()
        if is_short(batch) and where == "backward":
            loss.register_hook(fail)
        return loss

    def start(batch, batch_idx):
        if is_short(batch) and where == "start":
            fail()

    module.training_step, module.on_train_batch_start = step, start
    ours = strategy(
        "lora", ROOT, target_modules=["up", "down"], halve_batch_on_oom=bool(where), **options
    )
    given = {"accumulate_grad_batches": 8 // size, "gradient_clip_val": 0.5}
    run = trainer(folder / "root", ours, ROOT, devices=2, **given)
    data = DataLoader(rows("residuals", count), batch_size=size, shuffle=True)
    stale = {f"TORCHELASTIC_{name}": value for name, value in STALE.items()}
    module.on_fit_start = lambda: os.environ.update(stale if kind == "stale" else {})
    try:
        run.fit(module, data)
    except LightningPeftError as error:
        return str(error)
    finally:
        for name in stale:
            os.environ.pop(name, None)
    trained = {n: t for n, t in weights(module).items() if "lora_" in n or n.startswith("first")}
    means = {name: float(value) for name, value in run.callback_metrics.items()}
    return {"rows": seen, "weights": trained, "means": means}


SHORT = {
    "asked": {"size": 2, "where": "nowhere"},
    "step": {"size": 4, "most": 2, "where": "step"},
    "backward": {"size": 4, "most": 2, "where": "backward", "victim": 0},
    "one row": {"size": 1, "most": 0, "where": "start"},
    "unserved": {"size": 4, "where": "unserved"},
    "uneven": {"size": 4, "most": 2, "where": "step", "count": 44},
    "first": {"size": 4, "most": 2, "where": "step", "kind": "first"},
    "twice": {"size": 2, "where": "nowhere", "kind": "twice"},
    "static": {"size": 4, "where": "nowhere", "ddp_kwargs": {"static_graph": True}},
    "stale": {"size": 4, "where": "nowhere", "kind": "stale", "sharding": "fsdp2"},
}
# By what DDP itself does.
DDP = {
    "ddp": {},
    "ddp uneven": {"count": 44},
    **{f"ddp {x}": {"kind": x} for x in ("first", "twice")},
}


def fit_idle(folder, **given):
    """Trains a module with a layer that its loss does not reach; returns the error."""
    torch.manual_seed(7)
    module = task(ROOT)
    module.model.spare = torch.nn.Linear(8, 8)
    ours = strategy("lora", ROOT, target_modules=["layers.0", "spare"], **given)
    data = DataLoader(loader().dataset, batch_size=4)
    try:
        trainer(folder / "root", ours, ROOT, devices=2).fit(module, data)
    except RuntimeError as error:
        return str(error), len(module.losses)
    return "", len(module.losses)


def fit_guided(folder, rank, sharding=None):
    """Trains with a frozen layer that the checkpoint leaves out, and resumes; then with others."""
    found = []
    path = folder / f"guided-{sharding}.ckpt"
    for start, seed in ((None, 0), (path, 0), (None, rank)):
        torch.manual_seed(7)
        module = task(ROOT, kind="llama")
        torch.manual_seed(seed)
        module.guide = torch.nn.Linear(4, 4).requires_grad_(False)
        ours = strategy("qlora", ROOT, exclude_from_checkpoint=["guide"], sharding=sharding)
        steps = {"max_steps": 4 if start else 2, "max_epochs": 2}
        run = trainer(folder / "root", ours, ROOT, devices=2, **steps)
        torch.manual_seed(8)
        try:
            run.fit(module, DataLoader(loader("llama").dataset, batch_size=2), ckpt_path=start)
            run.save_checkpoint(path)
            found.append((module.losses, module.guide.weight.clone()))
        except BaseMismatchError as error:
            found.append(str(error))
    return found


def made_by_inject(init, rank, counts=(3, 2)):
    """Returns the weights that ``inject`` makes from other batches, and fewer, in each process."""
    torch.manual_seed(3)
    module = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    config = {"peft_type": "LORA", "init_lora_weights": init, "r": 1, "target_modules": ["0", "2"]}
    draw = torch.Generator().manual_seed(rank)
    batches = [torch.randn(300, 6, generator=draw) for _ in range(counts[rank])]
    try:
        inject(module, config, batches=batches, step=lambda net, x: net(x).pow(2).sum())
    except LightningPeftError as error:
        return str(error)
    return module.state_dict()


def left_out(rank):
    """Returns the weights that are left out by default of a layer whose bias differs."""
    body, guide = torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.nn.Linear(4, 4)
    for param in guide.requires_grad_(False).parameters():
        torch.nn.init.zeros_(param)
    guide.bias.add_(rank)
    module = torch.nn.ModuleDict({"body": body, "guide": guide})
    inject(module, r=2, adapt="body", target_modules=["0"])
    engine.note_excluded(module, "guide")
    engine.agree_on_excluded(module, 2)
    return sorted(engine.excluded_weights(module))


def fit_alone(folder):
    """Trains in this process only, while the process group of earlier runs is there."""
    module = task(ROOT)
    path = folder / "alone.ckpt"
    for epochs, start in ((1, None), (2, path)):
        ours = strategy("lora", ROOT, verify="full")
        run = trainer(folder / "root", ours, ROOT, max_epochs=epochs)
        run.fit(module, loader(), ckpt_path=start)
        run.save_checkpoint(path)
    return module.losses


def fit_recorded(folder, rank):
    """Trains by a record that holds on the first process only; returns the decision."""
    ours = strategy("lora", ROOT, gradient_checkpointing="auto")
    ours.lifecycle.decided["gradient_checkpointing"] = {"value": True, "device_bytes": 2}
    whole = automatic_checkpointing.whole_memory
    automatic_checkpointing.whole_memory = lambda module: 2 - rank
    decisions = []

    class Watch(lightning(ROOT).Callback):
        def on_train_batch_end(self, trainer, *given):
            decisions.append(trainer.strategy._automatic.decision)

    fit(folder, ours, [Watch()], max_steps=1)
    automatic_checkpointing.whole_memory = whole
    return decisions[-1].recompute, decisions[-1].reason


def callback(**given):
    return bind_to_lightning(QLoRACallback, ROOT)(r=4, announce=False, **given)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    seen = {}
    for name, method, callbacks in (
        ("strategy", "qlora", []),
        ("callback", "ddp", [callback()]),
    ):
        run, module = fit(folder, method, callbacks)
        run.save_checkpoint(folder / f"{name}.ckpt")
        seen[name] = {
            "losses": module.losses,
            "weights": weights(module),
            "world_size": run.world_size,
            "sampler": type(run.train_dataloader.sampler).__name__,
            "hook": "configure_model" in module.__dict__,
            "validated": run.validate(module, loader("llama"), verbose=False),
        }
    rank = run.global_rank

    points = [saver(ROOT, folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)]
    again = {"dropout": 0.3, "shuffle": True, "max_epochs": 2}
    # A file of such a run has averages as its weights, and it continues from others.
    average = lightning(ROOT).callbacks.EMAWeightAveraging
    _, straight = fit(folder, "qlora", [*points, average(decay=0.75)], **again)
    path = folder / "step=4.ckpt"
    _, resumed = fit(folder, "qlora", [average(decay=0.75)], ckpt_path=path, **again)
    seen["straight"] = {"losses": straight.losses, "weights": weights(straight)}
    seen["resumed"] = {"losses": resumed.losses, "weights": weights(resumed)}

    merging = bind_to_lightning(MergeAndRestart, ROOT)(1, warmup_steps=0)
    _, restarted = fit(folder, "lora", [merging], max_steps=3)
    seen["restarted"] = {**merging.state_dict(), "weights": weights(restarted)}

    config = {"peft_type": "LORA", "init_lora_weights": "eva", "r": 2, "target_modules": ["q_proj"]}
    _, made = fit(folder, strategy("lora", ROOT, r=16, peft_config=config), max_steps=1)
    seen["made from data"] = weights(made)
    seen["made by inject"] = [made_by_inject(init, rank) for init in ("corda", "lora_ga")]
    seen["made from none"] = made_by_inject("lora_ga", rank, (3, 0))

    seen["kept"], seen["checkpointed"] = (fit_residuals(folder, on) for on in (False, True))

    seen["recorded"] = fit_recorded(folder, rank)

    seen["alone"] = fit_alone(folder) if rank == 0 else []

    seen["guided"] = [fit_guided(folder, rank, sharding) for sharding in (None, "fsdp2")]

    seen["short"] = {case: fit_short(folder, **given) for case, given in SHORT.items()}
    seen["short"] |= {case: fit_short(folder, 2, **given) for case, given in DDP.items()}

    seen["left out"] = left_out(rank)

    seen["idle"] = fit_idle(folder)
    seen["idle allowed"] = fit_idle(folder, ddp_kwargs={"find_unused_parameters": True})

    other = task(ROOT, kind="llama")
    if rank == 1:
        with torch.no_grad():
            other.model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    try:
        trainer(folder, "qlora", ROOT, devices=2).fit(other, loader("llama"))
    except BaseMismatchError as error:
        seen["other base"] = str(error)

    sound = LoraLayer.effective_adapters
    if rank == 1:
        LoraLayer.effective_adapters = lambda layer: sound(layer) if layer.training else []
    try:
        fit(folder, "qlora")
    except LifecycleError as error:
        seen["verification"] = str(error)
    LoraLayer.effective_adapters = sound

    torch.save(seen, folder / f"rank{rank}.pt")
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
