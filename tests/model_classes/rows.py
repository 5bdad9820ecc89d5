"""Default adapters on every model class of transformers that a configuration alone can build."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from typing import Any

import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.models.auto import modeling_auto

import lightning_peft
from lightning_peft.engine.adapters import adapted_layers
from lightning_peft.errors import LightningPeftError
from model_classes.own_sizes import OWN
from model_classes.reasons import NOT_TRIED
from model_classes.small_configs import inputs, small

KINDS = {
    "causal language model": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "encoder": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence to sequence": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "vision": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "speech to text": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "speech (CTC)": "MODEL_FOR_CTC_MAPPING_NAMES",
    "audio classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
LARGEST = 100_000_000


@dataclasses.dataclass
class Row:
    """One class of one kind, and what became of it.

    Attributes:
        kind: A key of ``KINDS``.
        model_type: As of ``AutoConfig``.
        name: Name of the class.
        layers: Number of layers with an adapter.
        lora: ``"yes"``, or the words of a refusal.
        qlora: The same.
    """

    kind: str
    model_type: str
    name: str
    layers: int = 0
    lora: str = ""
    qlora: str = ""


def rows() -> list[Row]:
    """Returns a row for each class, by the first kind that names it; nothing tried yet."""
    found: dict[str, Row] = {}
    for kind, mapping in KINDS.items():
        for model_type, names in getattr(modeling_auto, mapping).items():
            name = names if isinstance(names, str) else next(iter(names))
            found.setdefault(name, Row(kind, model_type, name))
    return list(found.values())


def tried() -> list[Row]:
    """Returns the rows that can be tried."""
    return [row for row in rows() if row.name not in NOT_TRIED]


def logits(output: Any) -> torch.Tensor:
    """Returns the first tensor of an output, float32."""
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value.float()
    return next(v for v in output.values() if isinstance(v, torch.Tensor)).float()


def build(row: Row, own: dict[str, Any]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Returns a small model with random weights, and a batch for it."""
    cls = getattr(transformers, row.name)
    config = small(row.model_type, own)
    if not isinstance(config, cls.config_class):
        part = getattr(config, "text_config", None) or getattr(config, "decoder", None)
        config = part or config.get_text_config()
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise RuntimeError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = cls(config).float().eval()
    return model, inputs(model, model.config)


def run(row: Row, method: str) -> str:
    """Returns ``"yes"``, or the words in which the package refuses.

    One optimizer step with default adapters; saved, and loaded onto a copy of the base.
    """
    own = OWN.get(row.name, OWN.get(row.model_type, {}))
    model, batch = build(row, own)
    with torch.no_grad():
        before = logits(model(**batch))
    base = copy.deepcopy(model)
    options = {} if method == "lora" else {"quantization_config": NF4}
    try:
        lightning_peft.inject(model, r=4, **options)
    except LightningPeftError as error:
        return f"refused: {error}"
    row.layers = len(adapted_layers(model))
    with torch.no_grad():
        start = logits(model(**batch))
    if method == "lora":
        torch.testing.assert_close(start, before, rtol=1e-4, atol=1e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.5)
    model.train()
    torch.manual_seed(1)
    for _ in range(2):
        optimizer.zero_grad()
        out = logits(model(**batch))
        (out * torch.linspace(-1, 1, out.shape[-1])).mean().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        after = logits(model(**batch))
    if torch.equal(after, start):
        return "WRONG: a step changes nothing"
    with tempfile.TemporaryDirectory() as folder:
        lightning_peft.save_adapter(model, folder)
        lightning_peft.load_adapter(base, folder, **options)
    with torch.no_grad():
        again = logits(base.eval()(**batch))
    torch.testing.assert_close(again, after, rtol=1e-4, atol=5e-5)
    return "yes"
