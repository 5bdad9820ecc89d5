"""Speech recognition."""

from pathlib import Path

import pytorch_lightning as pl
import torch
from made_data import loader
from pytorch_lightning.callbacks import ModelCheckpoint
from transformers import WhisperConfig, WhisperForConditionalGeneration

from lightning_peft import LoRAStrategy, load_from_checkpoint


class Speech(pl.LightningModule):
    """Writes down what is said."""

    def __init__(self) -> None:
        super().__init__()
        size = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        depth = {"encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 16}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        places = {"max_source_positions": 32, "max_target_positions": 16, "vocab_size": 24}
        tokens = {"pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": 2}
        config = WhisperConfig(**size, **depth, **heads, **places, **tokens)
        self.model = WhisperForConditionalGeneration(config)

    def training_step(self, batch, index):
        return self.model(input_features=batch[0], labels=batch[1]).loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.model(input_features=batch[0], labels=batch[1]).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main(folder: Path) -> float:
    """Trains, loads the file into a new module, and returns the validation loss."""
    pl.seed_everything(0)
    lora = LoRAStrategy(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "fc1", "fc2"])
    saving = ModelCheckpoint(dirpath=folder, filename="last")
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=folder, max_epochs=20, callbacks=[saving], strategy=lora
    )
    trainer.fit(Speech(), loader("speech"))
    pl.seed_everything(0)
    module = load_from_checkpoint(Speech, folder / "last.ckpt")
    (metrics,) = trainer.validate(module, loader("speech", 1))
    return metrics["val_loss"]
