"""Script of processes that share a base: `python two_sharded_processes.py FOLDER COUNT KIND...`."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import torch
from modules import LENGTH, build, lightning, loader, steps_class, strategy, task, trainer
from process_faults import answer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaForCausalLM

import lightning_peft
from lightning_peft.data import packing
from lightning_peft.data.batching import pad
from lightning_peft.engine.loading import quantized_cache
from lightning_peft.errors import LightningPeftError
from lightning_peft.tasks.token_loss import TokenLoss

ROOT = "lightning.pytorch"
# Found in all processes; the others are in a test of their own.
FAULTS = ("gathered bits", "replicated", "other adapters")
# Settings that have to go together with sharding, one set for each model.
SETTINGS = {
    "llama": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "val_check_interval": 2},
    "llama_tied": {"precision": "bf16-mixed", "val_check_interval": 3},
}


# Names of methods with further arguments.
VARIANTS = {
    "dora": ("qlora", {"use_dora": True}),
    "saved": ("qlora", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "tokens": ("qlora", {"trainable_token_indices": [3, 7, 11]}),
    "embeddings": ("lora", {"target_modules": ["embed_tokens", "q_proj"]}),
    "fp4": ("qlora", {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}),
}


def fit(folder, count, kind, method="qlora", sharding="fsdp2", ckpt_path=None, ours=None, **given):
    """Trains in all processes, four rows each step or more; returns Trainer and module."""
    torch.manual_seed(7)
    module = task(ROOT, kind=kind)
    if kind == "llama":
        # Of transposed strides, as some loaders leave weights.
        embedding = module.model.model.embed_tokens.weight
        embedding.data = embedding.data.t().contiguous().t()
    method, more = VARIANTS.get(method, (method, {}))
    chosen = strategy(method, ROOT, sharding=sharding, **more, **(ours or {}))
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
    whole = trainer(
        folder / "root", strategy("qlora", ROOT, sharding="fsdp2"), ROOT,
        devices=run.world_size, use_distributed_sampler=False,
    )  # fmt: skip
    odd = DataLoader([data.dataset[i] for i in range(2 + whole.global_rank)], batch_size=1)
    try:
        whole.fit(task(ROOT, kind=module.kind), odd)
    except LightningPeftError as error:
        unequal_training = str(error)
    return {
        "unequal": unequal,
        "unequal training": unequal_training,
        "after fit": run.validate(module, loader(module.kind), verbose=False)[0]["val_loss"],
        "fresh": again.validate(fresh, data, ckpt_path=path, verbose=False)[0]["val_loss"],
        "predicted": predicted[0],
    }


def again(run, module, folder, method, **ours):
    """Validates what was trained, trains it on and validates again, each as a stage of its own."""
    data, losses = loader(module.kind), []
    losses.append(run.validate(module, data, verbose=False)[0]["val_loss"])
    method, given = VARIANTS.get(method, (method, {}))
    chosen = strategy(method, ROOT, **given, **ours)
    more = trainer(folder / "root", chosen, ROOT, devices=run.world_size)
    more.fit(module, data)
    losses.append(more.validate(module, data, verbose=False)[0]["val_loss"])
    return losses


def verified(module):
    """What a check says where the step of one process gives no loss."""

    def training_step(batch, batch_idx):
        loss = module.loss(batch)
        return loss if distributed.get_rank() == 0 else None

    module.training_step = training_step
    try:
        return str(lightning_peft.verify(module, next(iter(loader(module.kind)))))
    finally:
        del module.training_step


def compare(folder, count, kind, method):
    """Trains with a whole base in each process and with a part of it."""
    whole_run, whole = fit(folder, count, kind, method, sharding=None)
    whole_run.save_checkpoint(folder / f"{kind} {method}" / "whole.ckpt")
    seen = {"whole": trained(whole), "whole bytes": local_bytes(whole)}
    # Which changes nothing.
    checked = {"verify": "full"} if kind == "llama" else {"offload": kind == "llama_tied"}
    run, module = fit(folder, count, kind, method, ours=checked)
    run.save_checkpoint(folder / f"{kind} {method}" / "sharded.ckpt")
    seen |= {"sharded": trained(module), "bytes": local_bytes(module)}
    if method == "qlora" and kind == "llama":
        seen["stages"] = stages(run, module, folder / f"{kind} {method}")
        seen["verified"] = verified(module)
    if "offload" in checked and kind == "llama_tied":
        seen["whole again"] = again(whole_run, whole, folder, method, sharding=None)
        seen["again"] = again(run, module, folder, method, sharding="fsdp2", **checked)
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


class Loaded(steps_class(ROOT)):
    """Loads what it trains in `configure_model`, and notes how many layers came quantized."""

    kind = "llama"

    def __init__(self, folder, dtype):
        super().__init__()
        self.folder, self.dtype_of_base, self.read = folder, dtype, None

    def configure_model(self):
        self.model = LlamaForCausalLM.from_pretrained(self.folder, dtype=self.dtype_of_base)
        layers = quantized_layers(self)
        self.on_load = len(layers)
        if layers and layers[0].packed is not None:
            try:
                layers[0].effective_weight()
            except LightningPeftError as error:
                self.read = str(error)


class Noting(lightning(ROOT).plugins.Precision):
    """Notes what is here of quantized weights as soon as there are adapters."""

    def convert_module(self, module):
        layers = quantized_layers(module)
        self.whole = sum(layer.packed.size for layer in layers if layer.packed is not None)
        self.mine = sum(layer._parameters["weight"].numel() for layer in layers)
        self.report = str(lightning_peft.report(module))
        return super().convert_module(module)


def quantized_layers(module):
    return [layer for layer in module.modules() if hasattr(layer, "quantization_keys")]


def no_room(*given, **named):
    raise SafetensorError("no room")


def loading(folder, count):
    """Loads a model from a file, casts it, and takes it out of the cache; each also whole."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    quantized_cache.SMALLEST = 1
    ways = {
        "whole": (None, torch.float32, False),
        "full disk": ("fsdp2", torch.float32, True),
        "file": ("fsdp2", torch.float32, True),
        "cache": ("fsdp2", torch.float32, True),
        "whole, cache": (None, torch.float32, True),
        "whole, cast": (None, torch.bfloat16, False),
        "cast": ("fsdp2", torch.bfloat16, False),
    }
    seen = {}
    for name, (sharding, dtype, cached) in ways.items():
        module, noting = Loaded(str(folder / "base"), dtype), Noting()
        ours = strategy("qlora", ROOT, sharding=sharding, cache_quantized_base=cached)
        torch.manual_seed(7)
        run = trainer(folder / "root", ours, ROOT, devices=count, plugins=[noting], max_steps=3)
        quantized_cache.save_file = no_room if name == "full disk" else save_file
        run.fit(module, loader("llama"))
        seen[name] = {**trained(module), **vars(noting), "read": module.read}
        seen[name]["on load"] = module.on_load
    return seen


class Tokens(steps_class(ROOT)):
    """Its loss is taken in chunks, and padding is left out where the model can; or rows of it."""

    kind = "llama"

    def __init__(self):
        super().__init__()
        self.model, self.token_loss, self.tried = build("llama"), TokenLoss(), False

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if isinstance(batch["attention_mask"], lightning_peft.engine.PackedMask) and not self.tried:
            trial = functools.partial(packing.check_model, self.model, LENGTH)
            lightning_peft.engine.call_inside(self, trial)
            self.tried = True
        return batch

    def loss(self, batch):
        return self.token_loss.train(self.model, self.model, batch)


def tokens(folder, count):
    """Trains on rows of several examples, and on padded ones, which not every process has first."""
    found = {}
    for sharding in (None, "fsdp2"):
        torch.manual_seed(7)
        module = Tokens()
        ours = strategy("qlora", ROOT, sharding=sharding, offload=sharding is not None)
        run = trainer(folder / "root", ours, ROOT, devices=count, use_distributed_sampler=False)
        rank, ids = run.global_rank, torch.arange(4 * LENGTH).view(4, LENGTH)
        examples = [
            {"input_ids": row[: 3 + i], "labels": row[: 3 + i]} for i, row in enumerate(ids)
        ]
        packed = packing.collate([examples[rank : rank + 2]], 0)
        whole = {"input_ids": ids[:2], "labels": ids[:2], "attention_mask": ids[:2] * 0 + 1}
        padded = pad(examples[:2], 0)
        batches = [whole, padded] if rank else [padded, whole]
        run.fit(module, DataLoader([*batches, packed, packed], batch_size=None))
        found[str(sharding)] = {
            **trained(module),
            "chunked": module.token_loss._chunked,
            "padding free": module.token_loss.padding_free._tried,
        }
    return found


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
    if (folder / "resume.ckpt").is_file():
        # Of another number of processes.
        _, module = fit(folder, count, kind, method, ckpt_path=folder / "resume.ckpt", **more)
        seen["resumed other"] = trained(module)
    if (folder / "base").is_dir():
        seen["loading"] = loading(folder, count)
        seen["tokens"] = tokens(folder, count)
    seen["other base"] = other_base(folder / "other", count)
    seen["other blocks"] = other_blocks(folder / "other", count)
    for case in FAULTS:
        seen[case] = answer(folder / "faults", count, case)
    torch.save(seen, folder / f"rank{distributed.get_rank()}.pt")
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
