"""LightningModules around sequences: speech, time series, recurrent nets, plain attention."""

from __future__ import annotations

import lightning.pytorch as L
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from transformers import WhisperConfig, WhisperForConditionalGeneration

from .kind import Kind, names

WIDTH = 32


class Regression(pl.LightningModule):
    """Any net that forecasts ``(N, 3)`` from ``(N, length, WIDTH)``."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.MSELoss()

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = self.loss(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        loss = self.loss(self(x), y)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def series(count: int = 4) -> list[tuple[torch.Tensor, ...]]:
    found = [torch.randn(4, 6, WIDTH) for _ in range(count)]
    return [(x, x[:, :3, 0] * 2) for x in found]


class Whisper(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = WhisperForConditionalGeneration(
            WhisperConfig(
                vocab_size=64,
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                num_mel_bins=8,
                max_source_positions=16,
                max_target_positions=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
                suppress_tokens=[],
                begin_suppress_tokens=[],
            )
        ).eval()

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=2e-2)


def speech() -> list[dict[str, torch.Tensor]]:
    return [
        {"input_features": torch.randn(2, 8, 32), "labels": torch.randint(3, 64, (2, 6))}
        for _ in range(4)
    ]


class TransformerForecaster(Regression):
    """``nn.TransformerEncoder``, whose fast path in eval mode reads the weights of its layers."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class AttentionPooling(Regression):
    """``nn.MultiheadAttention``, which reads the weight of its ``out_proj``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.fc = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.embed(x)
        pooled, _ = self.attention(x[:, -1:], x, x, need_weights=False)
        return self.fc(pooled[:, 0])


class Recurrent(Regression):
    """LSTM or GRU between linear layers."""

    def __init__(self, cls: type) -> None:
        super().__init__()
        self.inputs = nn.Linear(WIDTH, WIDTH)
        self.rnn = cls(WIDTH, 16, num_layers=2, batch_first=True, bidirectional=True)
        self.decoder = nn.Sequential(nn.Linear(32, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))

    def forward(self, x):
        return self.decoder(self.rnn(self.inputs(x))[0].mean(1))


class BareLSTM(Regression):
    """An LSTM and its output layer, nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 16, batch_first=True)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.lstm(x)[0][:, -1])


class Tagger(pl.LightningModule):
    """A classic text model: embedding, LSTM of a class of its own, linear layers."""

    class SpatialDropoutLSTM(nn.LSTM):
        def forward(self, x, state=None):
            return super().forward(F.dropout1d(x, 0.1, self.training), state)

    class PositionalEmbedding(nn.Embedding):
        def forward(self, ids):
            return super().forward(torch.arange(ids.shape[1], device=ids.device))

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(64, WIDTH, padding_idx=0)
        self.places = self.PositionalEmbedding(16, WIDTH)
        self.lstm = self.SpatialDropoutLSTM(WIDTH, 16, batch_first=True)
        self.project = nn.Linear(16, WIDTH)
        self.tags = nn.Linear(WIDTH, 5)

    def forward(self, ids):
        x = self.words(ids) + self.places(ids)
        return self.tags(F.relu(self.project(self.lstm(x)[0])))

    def training_step(self, ids, batch_idx):
        return F.cross_entropy(self(ids).flatten(0, 1), ids.flatten() % 5)

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class WaveNet(Regression):
    """Dilated one-dimensional convolutions, causal by padding."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(WIDTH, WIDTH, 2, dilation=2**level, padding=2**level) for level in range(2)
        )
        self.fc = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = x.transpose(1, 2)
        for conv in self.convs:
            x = x + F.gelu(conv(x)[..., : x.shape[-1]])
        return self.fc(x.mean(-1))


class SharedScalers(Regression):
    """Registers one layer under several names, as temporal fusion transformers do."""

    def __init__(self) -> None:
        super().__init__()
        prescalers = nn.ModuleDict({name: nn.Linear(1, 16) for name in ("price", "sales")})
        self.prescalers = prescalers
        self.encoder_variables = nn.ModuleDict({"price": prescalers["price"]})
        self.decoder_variables = nn.ModuleDict({"price": prescalers["price"]})
        self.encoder = nn.ModuleDict({"encoder": nn.Linear(16, WIDTH)})
        self.output_layer = nn.Linear(WIDTH, 3)

    def forward(self, x):
        price = self.encoder_variables["price"](x[:, :, :1])
        past = self.decoder_variables["price"](x[:, :, 1:2])
        sales = self.prescalers["sales"](x[:, :, 2:3])
        return self.output_layer(F.relu(self.encoder["encoder"](price + past + sales)).mean(1))


class ByType(Regression):
    """Asks ``isinstance(layer, nn.Linear)`` in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                assert layer.weight.shape == (WIDTH, WIDTH)
                x = layer(x.to(layer.weight.dtype))
            elif isinstance(layer, nn.ReLU):
                x = layer(x)
            else:
                raise TypeError(type(layer).__name__)
        return self.head(x.mean(1))


class Gated(Regression):
    """Zero-initialised gates, a part that is fed with zeros, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.silent = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.spare = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Parameter(torch.ones(WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head((self.main(x) * self.gate + self.silent(torch.zeros_like(x))).mean(1))


class Autoencoder(L.LightningModule):
    """Its decoder is its encoder transposed: one weight, used in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(WIDTH, 16)
        self.hidden = nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.zeros(WIDTH))
        self.scale = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        code = self.hidden(torch.tanh(self.encoder(x)))
        return self.scale(F.linear(code, self.encoder.weight.t(), self.bias))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[0])

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


KINDS = [
    Kind(
        "whisper",
        "Speech",
        "Whisper",
        Whisper,
        speech,
        adapted=names("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        note="its two convolutions at the input stay as they are",
    ),
    Kind(
        "conv1d",
        "Speech",
        "dilated `Conv1d` stack (WaveNet, TCN)",
        WaveNet,
        series,
        adapted=names("0", "1"),
        note="the adapter is dilated as the layer is; PEFT's own leaves dilation out",
    ),
    Kind(
        "transformer encoder",
        "Time series",
        "`nn.TransformerEncoder`",
        TransformerForecaster,
        series,
        strategy={"target_modules": ["self_attn", "linear1", "linear2"]},
        adapted=names("self_attn", "linear1", "linear2", "out_proj"),
        quantized=names("self_attn", "linear1", "linear2"),
        note="in train and eval mode; without names, `in_proj_weight` gets no adapter",
    ),
    Kind(
        "attention",
        "Time series",
        "`nn.MultiheadAttention`",
        AttentionPooling,
        series,
        adapted=names("embed", "out_proj"),
        quantized=names("embed", "attention"),
        note="`out_proj` is read without being called: the adapter is in the weight",
    ),
    Kind(
        "lstm",
        "Time series",
        "LSTM between linear layers",
        lambda: Recurrent(nn.LSTM),
        series,
        strategy={"target_modules": ["inputs", "rnn", "0"]},
        adapted=names("inputs", "rnn", "0"),
        quantized=names("inputs", "0"),
        note="without names, the linear layers are adapted and the LSTM is frozen; its own weights "
        "stay dense under QLoRA",
    ),
    Kind(
        "gru",
        "Time series",
        "GRU trained in full next to adapted linear layers",
        lambda: Recurrent(nn.GRU),
        series,
        strategy={"modules_to_save": ["rnn"]},
        adapted=names("inputs", "0"),
    ),
    Kind(
        "bare lstm",
        "Time series",
        "LSTM with nothing but an output layer",
        BareLSTM,
        series,
        strategy={"target_modules": ["lstm"]},
        adapted=names("lstm"),
        refused={"qlora": "Nothing to quantize in BareLSTM"},
        note="by name only, and in no 4-bit form",
    ),
    Kind(
        "tagger",
        "Time series",
        "embedding and LSTM classes of one's own",
        Tagger,
        lambda: [torch.randint(1, 64, (4, 8)) for _ in range(4)],
        strategy={"target_modules": ["words", "places", "project"]},
        adapted=names("words", "places", "project"),
        quantized=names("project"),
    ),
    Kind(
        "aliases",
        "Time series",
        "one layer under several names, and `encoder` inside `encoder`",
        SharedScalers,
        series,
        adapted=names("price", "sales", "encoder"),
    ),
    Kind(
        "by type",
        "Time series",
        "`isinstance(layer, nn.Linear)` in `forward`",
        ByType,
        series,
        adapted=names("0", "2"),
    ),
    Kind(
        "gated",
        "Time series",
        "layers that are never called, or fed with zeros",
        Gated,
        series,
        adapted=names("main", "silent", "spare"),
        idle=names("silent", "spare"),
        note="`verify` reports that the loss does not depend on them; not a fault",
    ),
    Kind(
        "tied weights",
        "Time series",
        "autoencoder with a transposed, tied decoder",
        Autoencoder,
        series,
        adapted=names("encoder", "hidden"),
    ),
]
