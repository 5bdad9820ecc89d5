"""What the device can do, and what single operations of this project cost on it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from ladder import LENGTHS, OURS, Build, Steps, build_model
from run import Kit
from torch import Tensor, nn


def ceilings(kit: Kit) -> None:
    """Measures what no training step can beat: copies and products in bfloat16."""
    size = 256 if kit.tiny else 8192

    def copy() -> dict[str, Any]:
        source = torch.zeros(1 << (16 if kit.tiny else 30), dtype=torch.uint8, device=kit.device)
        target = torch.empty_like(source)
        seconds = kit.seconds(lambda: target.copy_(source), 10)
        # Read once and written once.
        return {"bytes_per_second": 2 * source.numel() / seconds}

    def product_() -> dict[str, Any]:
        a = torch.randn(size, size, device=kit.device, dtype=torch.bfloat16)
        return {"flops": 2 * size**3 / kit.seconds(lambda: a @ a, 10)}

    kit.row("ceilings", "copy", 2, copy)
    kit.row("ceilings", "product", 2, product_)


def agreement(kit: Kit) -> None:
    """Compares the fused layer with the same operations one after the other."""
    from lightning_peft import engine
    from lightning_peft.engine.layers import lora

    def gradients(layer: nn.Module, x: Tensor, fused: bool, autocast: bool) -> list[Tensor]:
        layer.zero_grad()
        torch.manual_seed(3)
        given = x.clone().requires_grad_()
        before = lora.fused_output
        if not fused:
            lora.fused_output = lambda *_: None
        try:
            with torch.autocast(kit.device, torch.bfloat16, enabled=autocast):
                out = layer(given)
            out.float().square().mean().backward()
        finally:
            lora.fused_output = before
        assert given.grad is not None
        trained = [p.grad for p in layer.parameters() if p.grad is not None]
        return [out.detach(), given.grad, *trained]

    def compare(quantized: bool, p: float, autocast: bool) -> dict[str, Any]:
        torch.manual_seed(1)
        width = 64 if kit.tiny else 1024
        dtype = torch.float32 if autocast else torch.bfloat16
        layer = nn.Sequential(nn.Linear(width, width, bias=False)).to(kit.device, dtype)
        config = engine.quantization_config() if quantized else None
        engine.inject(layer, quantization_config=config, lora_dropout=p, r=16, target_modules=["0"])
        layer.to(kit.device)
        with torch.no_grad():
            for param in engine.all_adapter_parameters(layer):
                param.normal_(std=0.05)
        x = torch.randn(4, 64, width, device=kit.device, dtype=dtype)
        pairs = [gradients(layer, x, fused, autocast) for fused in (True, False)]
        worst = max(
            float((a.float() - b.float()).norm() / b.float().norm())
            for a, b in zip(*pairs, strict=True)
        )
        return {"worst": worst}

    for quantized, p, autocast in product((True, False), (0.0, 0.1), (False, True)):
        name = f"{'NF4' if quantized else 'dense'}, dropout {p:g}"
        name += ", autocast" if autocast else ""
        kit.row("agreement", name, 3, lambda given=(quantized, p, autocast): compare(*given))


def optimizers(kit: Kit) -> None:
    """Times a step of each optimizer on the adapters of 32 layers of 7 linear layers."""
    from lightning_peft import engine

    count, width = (4, 64) if kit.tiny else (448, 4096)
    ways: dict[str, dict[str, Any]] = {
        "torch, fused": {"fused": True}, "torch, foreach": {"foreach": True},
    }  # fmt: skip

    def measure(name: str) -> dict[str, Any]:
        params = [nn.Parameter(torch.zeros(16, width, device=kit.device)) for _ in range(count)]
        optimizer: Any = torch.optim.AdamW(params, lr=1e-4, **ways.get(name, {}))
        if name not in ways:
            engine.replace_optimizers([optimizer], name)
        for param in params:
            param.grad = torch.ones_like(param)
        seconds = kit.seconds(optimizer.step, 5)
        states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        paged = sum(v.nbytes for v in states if getattr(v, "is_paged", False))
        return {"seconds": seconds, "paged_bytes": paged, "bytes": sum(v.nbytes for v in states)}

    for name in (*ways, "adamw_32bit", "paged_adamw_32bit", "paged_adamw_8bit"):
        kit.row("optimizers", name, 4, lambda name=name: measure(name))


def waits(kit: Kit) -> None:
    """Counts launches of kernels and waits of one step, and names the longest kernels."""
    from profiles import torch_profiler

    def measure() -> dict[str, Any]:
        build = Build("tiny" if kit.tiny else "1B", True, 0.0, 0)
        model = build_model(kit, build, OURS)
        step = Steps(kit, model, OURS, 32 if kit.tiny else LENGTHS[1], False)
        loss = step.loss()
        trained = [param for param in model.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)

        def once() -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        kit.seconds(once, 1)
        with torch_profiler() as profile:
            once()
            kit.wait()
        averages = profile.key_averages()
        calls = {event.key: event.count for event in averages if event.key.startswith("cuda")}
        own: Callable[[Any], float] = lambda event: getattr(  # noqa: E731
            event, "self_device_time_total" if kit.device == "cuda" else "self_cpu_time_total"
        )
        longest = sorted(averages, key=own, reverse=True)[:25]
        return {"calls": calls, "longest": {e.key[:120]: own(e) / 1e6 for e in longest}}

    kit.row("waits", "one step", 15, measure)


def paging(kit: Kit) -> None:
    """Trains states that do not fit next to what fills the card: paged they must step the same.

    Only on a card of one's own: managed memory beyond what is free can stop others.
    """
    from lightning_peft import engine

    def measure() -> dict[str, Any]:
        cuda = kit.device == "cuda"
        rows, width = (4, 64) if kit.tiny else (16, 1 << 24)
        ballast: list[Tensor] = []
        if cuda:
            free, total = torch.cuda.mem_get_info(0)
            if free < 0.95 * total:
                return {"absent": f"a card of one's own: {free / total:.0%} is free"}
        results = []
        for name in ("adamw_32bit", "paged_adamw_32bit"):
            params = [nn.Parameter(torch.ones(width, device=kit.device)) for _ in range(rows)]
            optimizer: Any = torch.optim.AdamW(params, lr=1e-2)
            engine.replace_optimizers([optimizer], name)
            for param in params:
                param.grad = torch.full_like(param, 0.5)
            if name.startswith("paged") and cuda:
                # The parameters and gradients are there; half of the states fit.
                free, _ = torch.cuda.mem_get_info(0)
                states = 8 * rows * width
                ballast.append(torch.empty(free - states // 2, dtype=torch.uint8, device="cuda"))
            seconds = kit.seconds(optimizer.step, 2)
            results.append((seconds, [param.detach().double().sum().item() for param in params]))
            del optimizer, params
            kit.free()
        ballast.clear()
        same = results[0][1] == results[1][1]
        return {"same": same, "seconds": results[0][0], "paged_seconds": results[1][0]}

    kit.row("paging", "states beyond the card", 30, measure)
