"""Arguments of LoRA and QLoRA, each defined once: name, type, default and description.

Strategies and callbacks derive from these dataclasses; the command line, YAML, the page's form and
the reference read them. Annotations are objects, not text: jsonargparse would look text up in the
module of the class that derives from these, and accept any value where it finds nothing there.
"""

from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal


@dataclass(kw_only=True, eq=False, repr=False)
class LoRAFields:
    """The fields of PEFT's ``LoraConfig`` that are arguments of their own.

    Args:
        r: Rank of the adapters.
        lora_alpha: Numerator of the scaling ``lora_alpha / r``; ``None`` means ``2 * r``, the
            common heuristic.
        lora_dropout: Dropout probability in front of the adapters.
        target_modules: Names of layers, a regular expression, or ``"all-linear"``. By default all
            linear layers of the adapted parts except output heads. A name that matches nothing is
            an error. Names in a list may end with rows of a fused layer: ``"qkv[q]"``.
        target_parameters: Weights by the names of their parameters, as in PEFT: those of experts
            that transformers keeps in one parameter, such as ``["experts.gate_up_proj"]``, or of
            a layer (``"q_proj.weight"``). By default all of experts, where all linear layers are
            meant and dropout and initialization allow it; ``[]`` leaves them frozen.
        exclude_modules: Names or a regular expression never to adapt.
        modules_to_save: Modules trained in full and stored with the adapter; never quantized.
        trainable_token_indices: Tokens whose embeddings train, such as those that were added to
            the tokenizer, as numbers: of the input embeddings and what is tied to them, or a list
            for each name (``{"embed_tokens": [32000], "lm_head": [32000]}`` where the two are not
            tied). Checkpoints and files hold these rows alone.
        use_rslora: Scale by ``lora_alpha / sqrt(r)`` (arXiv 2312.03732).
        use_dora: Weight-decomposed LoRA (arXiv 2402.09353).
        init_lora_weights: PEFT's initializations: ``True``, ``"gaussian"``, ``"pissa"``,
            ``"olora"``, ``"loftq"``, ...
        rank_pattern: Rank by layer name or pattern, where it differs from ``r``.
        alpha_pattern: ``lora_alpha`` by layer name or pattern.
        layers_to_transform: Indices of the blocks to adapt.
        bias: Which biases are trained as well: ``"none"``, ``"all"`` or ``"lora_only"``.
    """

    r: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, int] | None = None
    layers_to_transform: int | list[int] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"

    def explicitly_set(self) -> set[str]:
        """Returns the names of the arguments that differ from their defaults."""
        return {field.name for field in fields(self) if getattr(self, field.name) != field.default}


@dataclass(eq=False, repr=False)
class LoRAArguments(LoRAFields):
    """The arguments of :class:`lightning_peft.LoRAStrategy`, besides those of :class:`LoRAFields`.

    Args:
        peft_config: A ready ``peft`` config of any method that can be injected, or its fields with
            a ``peft_type``; the fields of LoRA must then keep their defaults.
        adapt: Names of the submodules that get adapters. By default the pretrained ones
            (transformers and timm models), and where there are none the whole module.
        optimizer: A bitsandbytes optimizer by transformers' name, such as ``"paged_adamw_8bit"``
            or ``"adamw_8bit"``, that replaces those that ``configure_optimizers`` returns, with
            their parameter groups, hyperparameters and LR schedulers. ``"auto"`` gives
            torch's own Adam and AdamW their fused step and leaves others as they are; nothing is
            paged unless its name suggests so. ``None`` leaves all.
        lora_plus_lr_ratio: LoRA+ (arXiv 2402.12354): the factors ``B`` train with the learning rate
            of their parameter group times this number, whatever LR schedulers make of it; ``None``
            means one rate for both.
        gradient_checkpointing: Keep only the inputs of repeated blocks for the backward pass, and
            recompute the rest (arXiv 1604.06174): the same numbers, less memory, more time.
            ``"auto"`` where everything would not fit on the device by the planner's numbers, or
            that is not known; ``True`` raises where the model has no such blocks. An amount
            such as ``"2GB"`` or ``"512MiB"``, or a share such as ``0.5``, is what the blocks may
            keep: what costs most time for its bytes is kept first.
        announce: Print the adapted and quantized layers when training starts.
        verify: What is checked when training starts: ``"cheap"`` looks at the structure and at
            the gradients of the first step, ``"full"`` also runs :func:`lightning_peft.verify` on
            the first batch before that step, ``"off"`` checks nothing.
        ddp_kwargs: For the strategies, further arguments of Lightning's ``DDPStrategy``, such as
            ``{"find_unused_parameters": True}``.
        sharding: For the strategies: ``"fsdp2"`` leaves ``1/N`` of the frozen base in each of ``N``
            processes, and gathers a block when it computes; ``None`` leaves all of it in each. What
            trains is whole in each process either way.
        dp_shard_size: With ``sharding``, how many processes share a base, of numbers that follow
            each other, such as those of a node; others share copies of it. ``None``: all of them.
        offload: With ``sharding``, keep the parts of the base in the memory of the CPU until they
            are gathered.
        halve_batch_on_oom: Where a training step runs out of memory, go on from the last optimizer
            step with half the rows in each batch and twice ``accumulate_grad_batches``: the same
            rows in each step, in all processes. With a ``DataLoader`` that has a ``batch_size``;
            with ``sharding``, by a restart of torchrun.
        async_save: Write checkpoints to local disks in the background. A save waits for the one
            before, the end of a run for the last one.
        exclude_from_checkpoint: Names of frozen submodules outside of the adapted parts, such as a
            teacher, whose weights the module loads itself and checkpoints leave out, as the base.
            By default that is what has the values of the file that ``from_pretrained`` read;
            ``[]`` leaves out none.

    Raises:
        ConfigError: If the arguments cannot work; all problems at once.
    """

    peft_config: Any | None = None
    _: KW_ONLY
    adapt: str | list[str] | None = None
    optimizer: str | None = None
    lora_plus_lr_ratio: float | None = None
    gradient_checkpointing: bool | Literal["auto"] | float | str = "auto"
    announce: bool = True
    verify: Literal["cheap", "full", "off"] = "cheap"
    ddp_kwargs: dict[str, Any] | None = None
    sharding: Literal["fsdp2"] | None = None
    dp_shard_size: int | None = None
    offload: bool = False
    halve_batch_on_oom: bool = False
    async_save: bool = False
    exclude_from_checkpoint: str | list[str] | None = None

    def __post_init__(self) -> None:
        """Calls that of the strategy or callback that derives from the arguments."""
        initialize = getattr(super(), "__post_init__", None)
        if initialize is not None:
            initialize()


@dataclass(kw_only=True, eq=False, repr=False)
class QLoRAArguments(LoRAArguments):
    """The arguments of :class:`lightning_peft.QLoRAStrategy`: those of LoRA, and the base's format.

    Args:
        quantization_config: A ready config of a quantization backend, such as
            ``transformers.BitsAndBytesConfig``, or its fields; the next four arguments must then
            keep their defaults.
        load_in_8bit: 8-bit weights (LLM.int8, arXiv 2208.07339) instead of 4-bit ones.
        bnb_4bit_quant_type: ``"nf4"`` or ``"fp4"``.
        bnb_4bit_use_double_quant: Quantize the block constants too: 4.127 bits per weight instead
            of 4.5.
        bnb_4bit_compute_dtype: Dtype of the products with quantized weights; ``None`` follows the
            activations, and so the Trainer's ``precision``.
        cache_quantized_base: Keep the codes of a base that ``from_pretrained`` loads in
            ``configure_model`` on disk, about half a byte for each weight, and load them from
            there when the same files are loaded again. ``lightning-peft cache`` lists and clears.
    """

    quantization_config: Any | None = None
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    cache_quantized_base: bool = True
    optimizer: str | None = "auto"
