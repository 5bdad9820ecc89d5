"""A protein language model with a strategy of its own."""

from pathlib import Path

import pytorch_lightning as pl
import torch
from made_data import loader
from peft import LoraConfig, get_peft_model
from pytorch_lightning.strategies import SingleDeviceStrategy
from transformers import EsmConfig, EsmForMaskedLM


class Proteins(pl.LightningModule):
    """Guesses hidden amino acids."""

    def __init__(self) -> None:
        super().__init__()
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        self.model = EsmForMaskedLM(
            EsmConfig(vocab_size=16, num_attention_heads=2, mask_token_id=3, pad_token_id=0,
                      position_embedding_type="rotary", **size)
        )  # fmt: skip
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value", "dense"])
        self.model = get_peft_model(self.model, config)

    def training_step(self, batch, index):
        return self.model(input_ids=batch[0], labels=batch[1]).loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.model(input_ids=batch[0], labels=batch[1]).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class AdapterStrategy(SingleDeviceStrategy):
    """A DeepSpeed strategy in the code base, for what all strategies do: saving and loading."""

    def lightning_module_state_dict(self):
        trained = {n for n, p in self.lightning_module.named_parameters() if p.requires_grad}
        state = super().lightning_module_state_dict()
        return {name: value for name, value in state.items() if name in trained}

    def save_checkpoint(self, checkpoint, filepath, storage_options=None):
        checkpoint["optimizer_states"] = []
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_model_state_dict(self, checkpoint, strict=True):
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=False)


def main(folder: Path) -> float:
    """Trains, loads the file into a new module, and returns the validation loss."""
    pl.seed_everything(0)
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=folder, max_epochs=20, strategy=AdapterStrategy("cpu")
    )
    trainer.fit(Proteins(), loader("protein"))
    trainer.save_checkpoint(folder / "last.ckpt")
    pl.seed_everything(0)
    module = Proteins.load_from_checkpoint(folder / "last.ckpt", strict=False)
    (metrics,) = trainer.validate(module, loader("protein", 1))
    return metrics["val_loss"]
