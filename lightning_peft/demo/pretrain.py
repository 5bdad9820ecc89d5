"""Trains the demo's base model from nothing, on plain standard library documentation.

``python -m lightning_peft.demo.pretrain`` writes ``base/`` beside this file: a byte-level BPE
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lightning_peft.demo.corpus import build_documents, read_entries

BASE_PATH = Path(__file__).with_name("base")

VOCABULARY = 4096
CONTEXT = 256
"""Longest sequence, in tokens."""

PAD, BOS, EOS = "<pad>", "<s>", "</s>"

STEPS = 3000
BATCH = 16
"""Sequences of ``CONTEXT`` tokens in one optimizer step."""

LEARNING_RATE = 2e-3
WARMUP = 0.04
"""Share of the steps in which the learning rate rises from zero."""

FINAL_SHARE = 0.05
"""Learning rate at the last step, as a share of ``LEARNING_RATE``."""

WEIGHT_DECAY = 0.1
CLIP = 1.0
PROBES = 4
"""Documents of each kind whose loss is stored in the record."""


def train_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer that starts every encoded text with ``<s>``.

    Args:
        documents: Text to learn the merges from.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Builds the untrained model from the global random state.

    Every linear layer has input and output sizes that are multiples of 64, the block size of
    NF4 quantization, so that no quantization block spans two rows.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(documents: Sequence[Tensor], steps: int, seed: int) -> Iterator[Tensor]:
    """Yields ``steps`` batches of packed documents.

    Each epoch shuffles the documents, joins them and cuts the stream into sequences, so that a
    document meets other neighbours and other positions every time.

    Args:
        documents: Token ids of each document, with ``<s>`` and ``</s>``.
        steps: Number of batches.
        seed: Seed of the shuffling.

    Yields:
        Token ids of shape ``(BATCH, CONTEXT)``.
    """
    generator = torch.Generator().manual_seed(seed)
    size = BATCH * CONTEXT
    rest = torch.empty(0, dtype=torch.long)
    while steps > 0:
        order = torch.randperm(len(documents), generator=generator).tolist()
        stream = torch.cat([rest, *(documents[index] for index in order)])
        whole = min(len(stream) // size, steps)
        for index in range(whole):
            yield stream[index * size : (index + 1) * size].view(BATCH, CONTEXT)
        rest = stream[len(stream) // size * size :]
        steps -= whole


def learning_rate(step: int, steps: int) -> float:
    """Returns the rate for ``step`` (from 0): linear warm-up, then a cosine to its final share."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return LEARNING_RATE * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return LEARNING_RATE * (FINAL_SHARE + (1 - FINAL_SHARE) * cosine)


def train(
    model: LlamaForCausalLM, documents: Sequence[Tensor], steps: int, seed: int
) -> tuple[float, float]:
    """Trains ``model`` in place.

    The matrix products run in bfloat16 by autocast, which on CPUs with such instructions (AVX512
    BF16, AMX) doubles the speed; weights and optimizer state stay in float32.

    Args:
        model: Model in float32.
        documents: Token ids of each document.
        steps: Optimizer steps.
        seed: Seed of the document order.

    Returns:
        Mean training loss over the last 100 steps (nats per token), and seconds.
    """
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": WEIGHT_DECAY},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
    )
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
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            recent = losses[-50:]
            progress.update(task, advance=1, loss=f"{sum(recent) / len(recent):.3f}")
    last = losses[-100:]
    return sum(last) / len(last), time.perf_counter() - started


@torch.no_grad()
def document_loss(model: LlamaForCausalLM, ids: Tensor) -> tuple[float, int]:
    """Returns the mean loss of one document (nats per token) and its number of predictions.

    Args:
        model: Model to evaluate.
        ids: Token ids; what is beyond ``CONTEXT`` is cut off.
    """
    tokens = ids[:CONTEXT].unsqueeze(0)
    return model(input_ids=tokens, labels=tokens).loss.item(), tokens.shape[1] - 1


def encode(tokenizer: PreTrainedTokenizerFast, document: str) -> Tensor:
    """Returns the token ids of a document between ``<s>`` and ``</s>``."""
    # Long documents are cut later, so the length warning would be noise.
    return torch.tensor([*tokenizer(document, verbose=False)["input_ids"], tokenizer.eos_token_id])


def pretrain(out: Path = BASE_PATH, seed: int = 0, steps: int = STEPS) -> dict[str, Any]:
    """Makes tokenizer and model, trains, saves both and measures what was saved.

    Args:
        out: Folder to write; made if missing.
        seed: Seed of the initial weights and the document order.
        steps: Optimizer steps.

    Returns:
        The content of ``training_record.json``.

    Raises:
        ValueError: If ``steps`` is less than one.
    """
    if steps < 1:
        raise ValueError(
            f"Cannot pre-train for steps={steps}: at least one optimizer step is needed. Pass "
            f"--steps with a positive number, or leave it out for the default of {STEPS}."
        )
    train_texts, held_out_texts = build_documents(read_entries())
    tokenizer = train_tokenizer(train_texts)
    train_ids = [encode(tokenizer, text) for text in train_texts]
    held_out_ids = [encode(tokenizer, text) for text in held_out_texts]

    torch.manual_seed(seed)
    model = build_model(tokenizer)
    train_loss, seconds = train(model, train_ids, steps, seed)

    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)

    # The rounding to bfloat16 and the files themselves are part of what is measured.
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    reloaded = AutoTokenizer.from_pretrained(out)
    measured = [document_loss(saved, ids) for ids in held_out_ids]
    predictions = sum(count for _, count in measured)
    held_out_loss = sum(loss * count for loss, count in measured) / predictions
    probe = [
        {
            "text": text,
            "held_out": held_out,
            "loss": round(document_loss(saved, encode(reloaded, text))[0], 4),
        }
        for held_out, texts in ((False, train_texts), (True, held_out_texts))
        for text in _probe_texts(texts)
    ]
    record: dict[str, Any] = {
        "seed": seed,
        "steps": steps,
        "batch_sequences": BATCH,
        "context_tokens": CONTEXT,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "gradient_clip": CLIP,
        "autocast": "bfloat16",
        "threads": torch.get_num_threads(),
        "documents": len(train_ids),
        "documents_sha256": hashlib.sha256("\0".join(train_texts).encode()).hexdigest(),
        "tokens": sum(len(ids) for ids in train_ids),
        "epochs": round(steps * BATCH * CONTEXT / sum(len(ids) for ids in train_ids), 2),
        "held_out_documents": len(held_out_ids),
        "held_out_predictions": predictions,
        "parameters": sum(weight.numel() for weight in saved.parameters()),
        "final_train_loss": round(train_loss, 4),
        "held_out_loss": round(held_out_loss, 4),
        "wall_seconds": round(seconds, 1),
        "versions": {
            "python": platform.python_version(),
            "tokenizers": tokenizers.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "config": saved.config.to_dict(),
        "probe": probe,
    }
    text = json.dumps(record, indent=2) + "\n"
    (out / "training_record.json").write_text(text, encoding="utf-8", newline="\n")
    return record


def _probe_texts(texts: Sequence[str]) -> list[str]:
    """Picks a few short documents, spread over ``texts``."""
    short = [text for text in texts if 150 <= len(text) <= 400 and text.isascii()]
    return short[:: max(1, len(short) // PROBES)][:PROBES]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_peft.demo.pretrain",
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
