"""Models of timm, trained with adapters from start to end; `make test-formats` installs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from trainer_fixtures import QUIET

import lightning_peft
from lightning_peft import LoRAStrategy, QLoRAStrategy

timm = pytest.importorskip("timm")

VIT = ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2})
CONVNEXT = ("convnext_atto", {})
CASES = {
    "vit": (VIT, "all-linear"),
    "vit-slices": (VIT, ["qkv[q]", "qkv[v]"]),
    "convnext": (CONVNEXT, "all-linear"),
}


class Classifier(L.LightningModule):
    """A model that tells colours apart."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        name, given = kind
        self.model = timm.create_model(name, num_classes=3, **given)
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 3e-3)


def rows() -> TensorDataset:
    made = torch.Generator().manual_seed(0)
    labels = torch.arange(6) % 3
    images = torch.randn(6, 3, 32, 32, generator=made) * 0.1
    return TensorDataset(images + torch.eye(3)[labels].view(6, 3, 1, 1), labels)


@pytest.mark.parametrize("strategy", [LoRAStrategy, QLoRAStrategy])
@pytest.mark.parametrize("case", CASES)
def test_a_model_of_timm_trains_resumes_and_merges(
    case: str, strategy: Any, tmp_path: Path
) -> None:
    kind, targets = CASES[case]

    def fit(folder: str, start: Any = None) -> Classifier:
        module = Classifier(kind)
        torch.manual_seed(1)
        saver = L.callbacks.ModelCheckpoint(
            tmp_path / folder, "{step}", save_top_k=-1, every_n_train_steps=1
        )
        chosen = strategy(r=4, target_modules=targets)
        trainer = L.Trainer(
            max_steps=8, strategy=chosen, callbacks=[saver], accelerator="cpu", **QUIET
        )
        trainer.fit(module, DataLoader(rows(), 6), ckpt_path=start)
        return module

    straight = fit("all")
    assert straight.losses[-1] < 0.8 * straight.losses[0]
    assert fit("rest", tmp_path / "all" / "step=4.ckpt").losses == straight.losses[4:]
    images = rows().tensors[0]
    with torch.no_grad():
        expected = straight.model.eval()(images)
        lightning_peft.merge(straight)
        assert straight.model(images).allclose(expected, atol=1e-4)
