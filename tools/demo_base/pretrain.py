"""Trains the demo's base model from nothing, on plain standard library documentation.

``python -m tools.demo_base.pretrain`` writes ``lightning_peft/demo/base/``: a byte-level BPE
tokenizer, a Llama-architecture causal language model of about four million parameters in
bfloat16, and ``training_record.json`` with what was measured. The model reads documents only,
never a question with its answer: that form is what the demo tunes it on.

The defaults are those of the shipped base. A run repeats to the last bit on one machine with
one number of threads and one version of PyTorch and Python; elsewhere the losses agree closely
but the weights do not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lightning_peft.compat.transformers import NAME_KEY
from tools.demo_base.architecture import CONTEXT, build_model, train_tokenizer
from tools.demo_base.corpus import build_documents
from tools.demo_base.stdlib import read_entries

BASE_PATH = Path(__file__).parents[2] / "lightning_peft" / "demo" / "base"

STEPS = 5000
BATCH = 8
"""Sequences of ``CONTEXT`` tokens in one optimizer step."""

MATRIX_RATE = 0.02
"""Peak learning rate of the weight matrices of the layers, under Muon."""

OTHER_RATE = 4e-3
"""Peak learning rate of the embedding and the norm weights, under AdamW."""

WARMUP = 0.04
"""Share of the steps in which the learning rate rises from zero."""

FINAL_SHARE = 0.05
"""Learning rate at the last step, as a share of the peak."""

WEIGHT_DECAY = 0.1
CLIP = 1.0
PROBES = 4
"""Documents of each kind whose loss is stored in the record."""


def batches(
    documents: Sequence[Tensor], steps: int, seed: int, size: int = BATCH
) -> Iterator[Tensor]:
    """Yields ``steps`` batches of packed documents, token ids of shape ``(size, CONTEXT)``.

    Each epoch shuffles the documents, joins them and cuts the stream into sequences, so that a
    document meets other neighbours and other positions every time.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = size * CONTEXT
    rest = torch.empty(0, dtype=torch.long)
    while steps > 0:
        order = torch.randperm(len(documents), generator=generator).tolist()
        stream = torch.cat([rest, *(documents[index] for index in order)])
        whole = min(len(stream) // tokens, steps)
        for index in range(whole):
            yield stream[index * tokens : (index + 1) * tokens].view(size, CONTEXT)
        rest = stream[len(stream) // tokens * tokens :]
        steps -= whole


def rate_share(step: int, steps: int) -> float:
    """Returns the learning rate at ``step`` (from 0) as a share of the peak.

    A linear warm-up, then a cosine down to ``FINAL_SHARE``.
    """
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return FINAL_SHARE + (1 - FINAL_SHARE) * cosine


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Returns Muon for the layers' matrices and AdamW for the embedding and the norms.

    Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) reaches in a fifth of
    the tokens what AdamW alone reaches here, which is what makes half an hour on a CPU enough.

    Raises:
        RuntimeError: If this PyTorch has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(
            f"Cannot pre-train with PyTorch {torch.__version__}: it has no torch.optim.Muon, which "
            "came with 2.9. Upgrade PyTorch for this command; the demo itself does not need it, "
            "because its base model is shipped."
        )
    embedding = model.get_input_embeddings().weight
    weights = [weight for weight in model.parameters() if weight is not embedding]
    matrices = [weight for weight in weights if weight.dim() == 2]
    norms = [weight for weight in weights if weight.dim() != 2]
    adamw = torch.optim.AdamW(
        [
            {"params": [embedding], "weight_decay": WEIGHT_DECAY},
            {"params": norms, "weight_decay": 0.0},
        ],
        lr=OTHER_RATE,
        betas=(0.9, 0.95),
    )
    return [torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=WEIGHT_DECAY), adamw]


def train(
    model: LlamaForCausalLM, documents: Sequence[Tensor], steps: int, seed: int
) -> tuple[float, float]:
    """Trains ``model`` in place; returns the mean loss of the last 100 steps (nats), and seconds.

    The matrix products run in bfloat16 by autocast, which on CPUs with such instructions (AVX512
    BF16, AMX) doubles the speed; weights and optimizer state stay in float32.
    """
    optimizers = build_optimizers(model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    losses: list[float] = []
    model.train()
    started = time.perf_counter()
    columns = (
        TextColumn("pre-training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("train", total=steps, loss="-")
        for step, tokens in enumerate(batches(documents, steps, seed)):
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * rate_share(step, steps)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            recent = losses[-50:]
            progress.update(task, advance=1, loss=f"{sum(recent) / len(recent):.3f}")
    last = losses[-100:]
    return sum(last) / len(last), time.perf_counter() - started


@torch.no_grad()
def document_loss(model: LlamaForCausalLM, ids: Tensor) -> tuple[float, int]:
    """Returns the mean loss of one document (nats per token) and its number of predictions."""
    tokens = ids[:CONTEXT].unsqueeze(0)
    return model(input_ids=tokens, labels=tokens).loss.item(), tokens.shape[1] - 1


def encode(tokenizer: PreTrainedTokenizerBase, document: str) -> Tensor:
    """Returns the token ids of a document between ``<s>`` and ``</s>``."""
    # Long documents are cut later, so the length warning would be noise.
    return torch.tensor([*tokenizer(document, verbose=False)["input_ids"], tokenizer.eos_token_id])


def pretrain(out: Path = BASE_PATH, seed: int = 0, steps: int = STEPS) -> dict[str, Any]:
    """Makes tokenizer and model, trains, saves both, and returns the record of what was saved."""
    if steps < 1:
        raise ValueError(
            f"Cannot pre-train for steps={steps}: at least one optimizer step is needed. Pass "
            f"--steps with a positive number, or leave it out for the default of {STEPS}."
        )
    train_texts, held_out_texts = build_documents(read_entries())
    tokenizer = train_tokenizer(train_texts)
    train_ids = [encode(tokenizer, text) for text in train_texts]

    torch.manual_seed(seed)
    model = build_model(tokenizer)
    train_loss, seconds = train(model, train_ids, steps, seed)
    save(model, tokenizer, out)

    tokens = sum(len(ids) for ids in train_ids)
    record = {
        "seed": seed,
        "steps": steps,
        "batch_sequences": BATCH,
        "context_tokens": CONTEXT,
        "optimizer": "Muon (matrices of the layers), AdamW (embedding, norms)",
        "peak_learning_rates": [MATRIX_RATE, OTHER_RATE],
        "weight_decay": WEIGHT_DECAY,
        "gradient_clip": CLIP,
        "autocast": "bfloat16",
        "threads": torch.get_num_threads(),
        "documents": len(train_texts),
        "documents_sha256": hashlib.sha256("\0".join(train_texts).encode()).hexdigest(),
        "tokens": tokens,
        "epochs": round(steps * BATCH * CONTEXT / tokens, 2),
        "wall_seconds": round(seconds, 1),
        "final_train_loss": round(train_loss, 4),
        **measure(out, train_texts, held_out_texts),
        "versions": {
            "python": platform.python_version(),
            "tokenizers": tokenizers.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    text = json.dumps(record, indent=2) + "\n"
    (out / "training_record.json").write_text(text, encoding="utf-8", newline="\n")
    return record


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Saves model (in bfloat16) and tokenizer where the Auto classes find them."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # safetensors writes 0600, and a wheel built from that could not be read by other users.
    (out / "model.safetensors").chmod(0o644)


def measure(
    folder: Path, train_texts: Sequence[str], held_out_texts: Sequence[str]
) -> dict[str, Any]:
    """Measures the saved base, in float32, so that rounding and files are part of the result."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses = [document_loss(model, encode(tokenizer, text)) for text in held_out_texts]
    predictions = sum(count for _, count in losses)
    held_out_loss = sum(loss * count for loss, count in losses) / predictions
    probe = []
    for held_out, texts in ((False, train_texts), (True, held_out_texts)):
        for text in _probe_texts(texts):
            loss, _ = document_loss(model, encode(tokenizer, text))
            probe.append({"text": text, "held_out": held_out, "loss": round(loss, 4)})
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "held_out_documents": len(held_out_texts),
        "held_out_predictions": predictions,
        "held_out_loss": round(held_out_loss, 4),
        # Without the folder it was written to, which says nothing anywhere else.
        "config": {k: v for k, v in model.config.to_dict().items() if k != NAME_KEY},
        "probe": probe,
    }


def _probe_texts(texts: Sequence[str]) -> list[str]:
    """Picks a few short documents, spread over ``texts``."""
    short = [text for text in texts if 150 <= len(text) <= 400 and text.isascii()]
    return short[:: max(1, len(short) // PROBES)][:PROBES]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo_base.pretrain",
        description="Train the demo's tiny base model on the standard library's documentation.",
    )
    parser.add_argument("--out", type=Path, default=BASE_PATH, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps")
    options = parser.parse_args(arguments)
    record = pretrain(options.out, options.seed, options.steps)
    print(
        f"{record['parameters']:,} parameters, {record['tokens']:,} tokens, "
        f"{record['steps']} steps in {record['wall_seconds'] / 60:.1f} min: train loss "
        f"{record['final_train_loss']:.3f}, held-out loss {record['held_out_loss']:.3f}"
    )
    print(f"Saved to {options.out}")


if __name__ == "__main__":
    main()
