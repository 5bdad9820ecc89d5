"""Operators of torchvision whose names its package takes when it is imported.

Its binary fits one build of torch, and timm and torchmetrics use only its Python code.
"""

from importlib.util import find_spec
from pathlib import Path

import torch


def define_missing() -> None:
    """Gives the operators their signatures where the binary cannot be loaded."""
    found = find_spec("torchvision")
    if found is None or found.origin is None:
        return
    try:
        torch.ops.load_library(Path(found.origin).with_name("_C.so"))
    except OSError:
        for name in ("nms", "qnms"):
            given = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", given)
