"""Serializable state of random generators."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state(devices: bool = True) -> dict[str, Any]:
    """Returns the state of Python's, NumPy's and torch's generators as tensors and numbers."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": {
            "version": version,
            "internal": _to_tensor(internal),
            "gauss": gauss,
        },
        "numpy": {
            "kind": str(kind),
            "keys": _to_tensor(keys),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        **(_cuda_state() if devices and torch.cuda.is_initialized() else {"cuda": []}),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts the generators into a state that :func:`random_state` returned."""
    python, numpy = state["python"], state["numpy"]
    internal = tuple(_from_tensor(python["internal"]).tolist())
    random.setstate((python["version"], internal, python["gauss"]))
    keys, position = _from_tensor(numpy["keys"]), numpy["position"]
    np.random.set_state((numpy["kind"], keys, position, numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"].cpu())
    saved = [value.cpu() for value in state["cuda"]]
    if not saved or not torch.cuda.is_available():
        return
    if len(saved) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved)
    else:
        # Of a machine with another number of GPUs: the one that this process computes on counts.
        torch.cuda.set_rng_state(saved[state["cuda_device"]])


def _cuda_state() -> dict[str, Any]:
    states = torch.cuda.get_rng_state_all()
    return {"cuda": states, "cuda_device": torch.cuda.current_device()}


def same_state(a: Any, b: Any) -> bool:
    """Returns whether two states that :func:`random_state` returned are the same."""
    if isinstance(a, dict):
        return all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_state, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def _to_tensor(words: Any) -> torch.Tensor:
    # As signed integers: torch cannot send unsigned ones to other processes.
    return torch.from_numpy(np.asarray(words, dtype=np.uint32).view(np.int32).copy())


def _from_tensor(words: torch.Tensor) -> Any:
    return words.numpy().view(np.uint32)
