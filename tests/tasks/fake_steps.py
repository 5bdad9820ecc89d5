"""Training steps without values, in which nothing can be waited for.

As a script, on a GPU that does not exist, it prints what waits for it, as JSON. That is a process
of its own: the name of the device stays registered.
"""

import itertools
import json
import sys

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import engine
from lightning_peft.arguments import LoRAFields
from lightning_peft.compat.torch import FakeTensor, FakeTensorMode
from lightning_peft.plan.meta_copy import make_fake
from lightning_peft.runs.throughput import Throughput
from lightning_peft.tasks.causal_lm import CausalLM
from lightning_peft.tasks.token_loss import label_places

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Refuses copies from and to the CPU; what needs a number, fake tensors refuse."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        for one, other in ((given, made), (made, given)) if self.device.type != "cpu" else ():
            if any(t.device == self.device for t in one) and any(_is_on_host(t) for t in other):
                raise RuntimeError(f"{func} copies from or to the CPU")
        return out


class Moves(TorchFunctionMode):
    """Moves tensors to a device as fake ones."""

    def __init__(self, device, mode):
        super().__init__()
        self.device, self.mode = device, mode

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and args[1] == self.device:
            return FakeTensor(self.mode, args[0].to("meta"), self.device)
        return func(*args, **(kwargs or {}))


def _is_on_host(tensor):
    return tensor.device.type == "cpu" and tensor.ndim > 0


def model(device, mode, quantized, checkpointed, dropout):
    """Returns a model with the real layers, in bfloat16."""
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**SIZES, use_cache=False)).bfloat16()
    config = engine.quantization_config() if quantized else None
    fields = LoRAFields(r=4, lora_dropout=dropout)
    names = engine.inject_on_meta(llama, engine.lora_config(fields), config)
    if checkpointed:
        engine.checkpoint_activations(llama, True)
    make_fake(llama.train(), mode, device)
    for name in names if quantized else ():
        engine.quantize_on_meta(llama.get_submodule(name), config)
    return llama


def step(device, mode, llama, padded=True):
    """Takes steps of the task of the recipes; returns where, and the tokens without a label."""
    task = CausalLM("random", config={"model_type": "llama", **SIZES})
    task.model = llama
    # As Lightning's `to` does, which would copy no fake tensors.
    task._device = device
    with torch.no_grad():
        # On the host, with real numbers: how many labels there are is known.
        ids = torch.arange(24).view(2, 12)
        labels = ids.masked_fill(ids % 3 == 0, -100)
        host = {"input_ids": ids, "labels": labels}
        host |= {"attention_mask": (ids < 20).long()} if padded else {}
        with Moves(device, mode):
            batch = task.transfer_batch_to_device(host, device, 0)
            if device.type == "cpu":
                # Where nobody waits, the task does not look for them.
                task.token_loss.keep_places(batch["labels"], label_places(host).to(device))
    *_, places = task.token_loss._kept
    optimizer = torch.optim.AdamW(engine.all_adapter_parameters(llama), fused=True)
    pace = Throughput()
    with mode, Waits(device):
        for _ in range(2):
            loss = task.training_step(batch, 0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type != "cpu":
                # On CPUs the tokens are a number at once.
                pace.add(batch)
                pace.step(1)
    return [str(loss.device), batch["labels"].numel() - len(places)]


FAULTS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "truth": lambda x: bool((x > 0).any()),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
}


def steps(device, cases, faults):
    """Returns the outcome of each step, by its case or its fault."""
    mode, found = FakeTensorMode(allow_non_fake_inputs=True), {}
    for case in cases:
        llama = model(device, mode, *case)
        found[str(case)] = step(device, mode, llama, padded=case[-1] > 0)
    for name in faults:
        llama, fault = model(device, mode, True, False, 0.0), FAULTS[name]
        norm: nn.Module = llama.model.norm
        norm.register_forward_hook(lambda module, args, out, fault=fault: fault(out) and None)
        try:
            found[name] = step(device, mode, llama)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def register_fake_gpu():
    """Makes a device of torch's place for other makers' that is not the CPU."""

    class Device(backend_registration._DummyBackendModule):
        """Answers autocast, and checkpointing, which keeps random states."""

        def get_amp_supported_dtype(self):
            return [torch.bfloat16]

        def get_rng_state(self, device=None):
            return torch.get_rng_state()

        def set_rng_state(self, state, device=None):
            torch.set_rng_state(state)

    backend_registration._setup_privateuseone_for_python_backend("fakegpu", backend_module=Device())


if __name__ == "__main__":
    register_fake_gpu()
    every = itertools.product((False, True), (False, True), (0.0, 0.1))
    print(json.dumps(steps(torch.device("fakegpu:0"), every, FAULTS)), file=sys.__stdout__)
