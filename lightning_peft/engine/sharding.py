"""FSDP2 sharding of the frozen base; trained parameters are replicated.

Between steps a process holds ``1/N`` of every frozen parameter. A block is gathered for its forward
pass and again for its backward pass; what is outside of the blocks, such as embeddings, is gathered
for the whole step. Frozen parameters have no gradients, so nothing is scattered: the gradients of
the adapters are averaged by DDP, as without sharding. The adapters, their gradients and optimizer
states are therefore plain tensors, which every optimizer, clipping and checkpoint takes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from functools import partial
from importlib import import_module
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel

from lightning_peft.compat.torch import is_traced
from lightning_peft.compat.torch_distributed import filled, leave_out_of_ddp, left_in_place
from lightning_peft.engine.backends.conversion import release_freed_memory
from lightning_peft.engine.backends.layers import QuantizedLayer
from lightning_peft.engine.backends.packed import Share
from lightning_peft.engine.gathering import gathered, share_group
from lightning_peft.engine.layers.adapter import AdapterLayer
from lightning_peft.engine.layers.expert_weights import weight_name
from lightning_peft.engine.layers.mixin import LayerMixin, stored_parameter, weight_key
from lightning_peft.engine.methods.lora_config import changes_base
from lightning_peft.engine.methods.registry import in_place_method
from lightning_peft.engine.record import adapted_parts, record_of, require_record
from lightning_peft.engine.training.blocks import all_blocks
from lightning_peft.errors import UnsupportedError, itemize


def early_share(peft_config: PeftConfig, share: Share) -> Share | None:
    """The part of each weight that a process keeps once it is quantized: ``share``.

    ``None`` where adapters are made of the quantized weights, or may be: these are cut up later.
    """
    method = in_place_method(peft_config)
    if method is None or method.reads_base or changes_base(peft_config):
        return None
    return share


def keep_own_part(module: nn.Module, share: Share, device: torch.device) -> dict[int, torch.Size]:
    """Leaves ``share`` of each frozen parameter, on ``device``, one parameter after the other.

    For :func:`shard_base`, which has to follow.

    Returns:
        The shapes of the whole parameters by ids; empty where the base is sharded already.
    """
    if require_record(module).shards > 1:
        return {}
    quantized = [x for x in _layers_with_frozen_weight(module) if isinstance(x, QuantizedLayer)]
    _pack([layer for layer in quantized if layer.packed is None], device, share)
    shapes = {
        id(stored_parameter(layer)): torch.Size([layer.packed.size])
        for layer in quantized
        if layer.packed is not None
    }
    for param in spread_parameters(module).values():
        if id(param) not in shapes:
            shapes[id(param)] = param.shape
            param.data = share.of(param.data, device)
    if device.type == "cpu":
        release_freed_memory()
    return shapes


def parts_left_in_place(module: nn.Module, share: Share) -> AbstractContextManager[None]:
    """Within it, parts that belong on the CPU stay where they are when ``module`` moves."""
    parts = {id(part) for part in spread_parameters(module).values()}

    def stays(tensor: Any) -> bool:
        # In later stages they are DTensors.
        return share.on_cpu and (id(tensor) in parts or hasattr(tensor, "to_local"))

    return left_in_place(module, stays)


def shard_base(
    module: nn.Module, device: torch.device, shapes: dict[int, torch.Size], share: Share
) -> None:
    """Lets FSDP gather what :func:`keep_own_part` cut up, in the processes that share a base.

    From then on the module computes only when it is called, by all processes and equally often.
    Another time nothing happens.
    """
    # Imported here, since few runs need it and it takes a second.
    distributed = import_module("torch.distributed")
    fsdp = import_module("torch.distributed.fsdp")
    record = require_record(module)
    if record.shards > 1:
        return
    group = share_group(share.count)
    mesh = distributed.device_mesh.DeviceMesh.from_group(group, device.type)
    for layer in _layers_with_frozen_weight(module):
        layer.is_sharded = True
    parts = spread_parameters(module)
    # FSDP cuts up whole parameters, which are nowhere: it gets some without values.
    frozen = _replaced(module, parts, lambda part: _outline(part, shapes[id(part)]))
    ids = {id(param) for param in frozen.values()}
    kept = {param for param in module.parameters() if id(param) not in ids}
    blocks = gathered_blocks(module)
    if distributed.get_rank() == 0:
        warn_of_few_blocks(frozen.values(), blocks.values())
    policy = fsdp.OffloadPolicy()
    if share.on_cpu:
        policy = fsdp.CPUOffloadPolicy(pin_memory=device.type != "cpu")
    # Those inside of others first.
    for block in (*reversed(blocks.values()), module):
        fsdp.fully_shard(block, mesh=mesh, ignored_params=kept, offload_policy=policy)
    values = {id(param): parts[name].data for name, param in spread_parameters(module).items()}
    _replaced(
        module, spread_parameters(module), lambda outline: filled(outline, values[id(outline)])
    )
    CalledBlocks(module, blocks, device)
    # DDP would broadcast the first process's part to the others.
    leave_out_of_ddp(module, list(frozen))
    for child in module.modules():
        if isinstance(child, PreTrainedModel):
            child.__dict__["generate"] = _refuse_generating
    record.shards = mesh.size()


def _outline(part: nn.Parameter, shape: torch.Size) -> nn.Parameter:
    whole = torch.empty(shape, dtype=part.dtype, device="meta")
    return nn.Parameter(whole, requires_grad=False)


def _replaced(
    module: nn.Module, params: dict[str, nn.Parameter], make: Callable[[Any], nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Puts others in the place of parameters, which share what these share; returns them."""
    made: dict[int, nn.Parameter] = {}
    for name, param in params.items():
        if id(param) not in made:
            made[id(param)] = make(param)
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = made[id(param)]
    return {name: made[id(param)] for name, param in params.items()}


def warn_of_few_blocks(frozen: Iterable[nn.Parameter], blocks: Iterable[nn.Module]) -> None:
    """Warns where less than half of the frozen bytes are gathered block by block."""
    inside = {id(param) for block in blocks for param in block.parameters()}
    sizes = {id(p): p.numel() * p.element_size() for p in frozen}
    share = sum(size for one, size in sizes.items() if one in inside) / max(sum(sizes.values()), 1)
    if share < 0.5:
        warnings.warn(
            f"sharding='fsdp2': {100 * share:.0f} % of the frozen bytes are inside of blocks; the "
            "rest is gathered for the whole step, which saves little memory. Blocks are "
            "children of one class in a ModuleList or Sequential, with adapters inside.",
            stacklevel=2,
        )


def _refuse_generating(*args: Any, **kwargs: Any) -> None:
    raise UnsupportedError(
        "generate() with sharding='fsdp2': each process would stop at another token, and the "
        "others would wait for its part of the weights. Leave out what generates while training "
        "(LogSamples, validation by generated text, reward tuning), or use sharding=None; "
        "afterwards load the checkpoint in one process by lightning_peft.load_from_checkpoint."
    )


def is_sharded(module: nn.Module) -> bool:
    """Whether frozen weights of ``module``, or of modules in it, are spread over processes."""
    return any(getattr(child, "is_sharded", False) for child in module.modules())


def call_inside(module: nn.Module, function: Callable[[], Any]) -> Any:
    """Calls ``function`` inside of a call of ``module``, around which FSDP gathers its weights.

    Without sharding, just calls it. All processes have to do the same.
    """
    record = record_of(module)
    if record is None or record.shards == 1:
        return function()
    attributes = module.__dict__
    before = attributes.get("forward")

    def put_back() -> None:
        attributes.pop("forward", None)
        if before is not None:
            attributes["forward"] = before

    def forward() -> Any:
        # It may call the module.
        put_back()
        return function()

    attributes["forward"] = forward
    try:
        return module()
    finally:
        put_back()


def reshard_base(module: nn.Module) -> None:
    """Gives the memory back of what a forward pass without a backward pass left gathered."""
    for child in module.modules():
        if isinstance(child, import_module("torch.distributed.fsdp").FSDPModule):
            child.reshard()


def leave_step(module: nn.Module) -> None:
    """Makes the module what it is between two steps, after an error inside of one.

    Else it could not be moved, and the error of that would hide the first one. As of torch 2.13.
    """
    reset = getattr(module, "reset_iter_state", None)
    if reset is not None:
        # Of what waits for another process that is gone, or of a module that was never called.
        with suppress(RuntimeError, AttributeError):
            reset()


def check_shardable(module: nn.Module) -> None:
    """Looks for what cannot work, or was never tried, with a sharded base."""
    record = require_record(module)
    problems = []
    if is_traced(module):
        problems.append("torch.compile, which was never tried with it: leave it out")
    for name, part in record.parts.items():
        methods = {info.config.get("peft_type") for info in part.adapters.values()}
        if not all(info.in_place for info in part.adapters.values()):
            problems.append(
                f"{name or type(module).__name__}: adapters in PEFT's own layers "
                f"({', '.join(sorted(map(str, methods)))}), which were never tried with it: use "
                "LoRA without lora_bias"
            )
    problems += [
        f"adapters on {name!r} (nn.MultiheadAttention, nn.LSTM, nn.GRU or nn.RNN), which were "
        "never tried with it: leave it out of target_modules"
        for name, layer in module.named_modules()
        if isinstance(layer, AdapterLayer) and layer.weight_name != "weight"
    ]
    whole = {
        (layer.backend.name, layer.backend.bits)
        for layer in _layers_with_frozen_weight(module)
        if isinstance(layer, QuantizedLayer) and not layer.backend.can_be_packed
    }
    problems += [
        f"{bits}-bit weights of {name}, whose scales are not sharded: use 4 bits (NF4, FP4)"
        for name, bits in sorted(whole)
    ]
    configs = {id(m.config): m.config for m in module.modules() if isinstance(m, PreTrainedModel)}
    problems += [
        f"{key}={getattr(config, key)} in the config of the model, by which each process would "
        "leave out other blocks: set it to 0"
        for config in configs.values()
        for key in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
        if getattr(config, key, None)
    ]
    if record.momentum_copies:
        copies = ", ".join(repr(pair.copy) for pair in record.momentum_copies)
        problems.append(f"momentum copies ({copies}), which were never tried with it: use DDP")
    if problems:
        raise UnsupportedError("sharding='fsdp2' does not go together with:" + itemize(problems))


def _layers_with_frozen_weight(module: nn.Module) -> list[Any]:
    frozen = require_record(module).frozen
    return [
        child
        for name, child in module.named_modules()
        if isinstance(child, LayerMixin) and weight_name(name, child.weight_name) in frozen
    ]


def spread_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the frozen parameters that are spread, by every name that one has.

    Numbers cannot be cut up, and stay whole.
    """
    frozen = require_record(module).frozen
    named = module.named_parameters(remove_duplicate=False)
    return {name: param for name, param in named if name in frozen and param.ndim}


def local_part(tensor: Any) -> torch.Tensor:
    """Returns the part of a parameter or buffer that is in this process.

    A whole one is returned as it is: what ``detach`` makes has no quantization state.
    """
    part: torch.Tensor = tensor.to_local().detach() if hasattr(tensor, "to_local") else tensor
    return part


def gathered_blocks(module: nn.Module) -> dict[str, nn.Module]:
    """Returns the blocks that are gathered one at a time; those inside of others come later."""
    found = {id(block) for _, part in adapted_parts(module) for block in all_blocks(part)}
    return {name: child for name, child in module.named_modules() if id(child) in found}


def _pack(layers: list[Any], device: torch.device, share: Share) -> None:
    """Packs the weights of layers; those that share one continue to do so."""
    sharing: dict[int, list[Any]] = {}
    for layer in layers:
        sharing.setdefault(id(stored_parameter(layer)), []).append(layer)
    for first, *others in sharing.values():
        first.pack_weight(device, share)
        for layer in others:
            layer.packed = first.packed
            layer._parameters[weight_key(layer)] = stored_parameter(first)


class CalledBlocks:
    """Refuses forward passes for which processes call different blocks.

    FSDP gathers by order: parts of two blocks of equal size would be put together to one. Numbers
    of calls that differ end in an error of torch or in the timeout of the process group.
    """

    def __init__(
        self, module: nn.Module, blocks: dict[str, nn.Module], device: torch.device
    ) -> None:
        self._names = list(blocks)
        self._group_device = device
        self._called: list[int] = []
        module.register_forward_pre_hook(self._begin)
        for number, block in enumerate(blocks.values()):
            block.register_forward_pre_hook(partial(self._note, number))
        module.register_forward_hook(self._compare)

    def _begin(self, *_: Any) -> None:
        self._called = []

    def _note(self, number: int, *_: Any) -> None:
        self._called.append(number)

    def _compare(self, *_: Any) -> None:
        if not self._called:
            # Others may be at a block, and what they exchange is of another size.
            return
        distributed = import_module("torch.distributed")
        # Integers in tuples have the same hash in each process.
        mine = torch.tensor([hash(tuple(self._called))], device=self._group_device)
        everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
        distributed.all_gather(everyone, mine)
        if len(set(torch.cat(everyone).tolist())) == 1:
            return
        rows = [
            f"process {rank}: " + ", ".join(repr(self._names[number]) for number in numbers)
            for rank, numbers in enumerate(gathered(self._called, len(everyone)))
        ]
        raise UnsupportedError(
            "The processes called different blocks in one forward pass:"
            + itemize(rows, 8)
            + "\nsharding='fsdp2' gathers the parts of a block from all processes, so they "
            "computed with a mixture of several. Call the same blocks everywhere (no LayerDrop, "
            "stochastic depth or experts chosen by each process), or use sharding=None."
        )
