"""Trains a small base of another family than the one in the package, for ``quality.py --model``.

``python benchmarks/second_base.py FOLDER [--steps N]`` trains a GPT-NeoX (one projection for query,
keys and values, LayerNorm, biases, GELU, parallel residual) from nothing, on the documents that the
base in the package has read, with its tokenizer, optimizers and schedule. No pretrained model of
another family comes with an installed package, and without a hub there is no other way to one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.demo_base import pretrain
from tools.demo_base.architecture import CONTEXT, train_tokenizer
from tools.demo_base.corpus import build_documents
from tools.demo_base.stdlib import read_entries


def main() -> None:
    """Trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    given = parser.parse_args()
    train_texts, held_out_texts = build_documents(read_entries())
    tokenizer = train_tokenizer(train_texts)
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPTNeoXForCausalLM(config)
    ids = [pretrain.encode(tokenizer, text) for text in train_texts]
    loss, seconds = pretrain.train(model, ids, given.steps, 0)
    pretrain.save(model, tokenizer, given.folder)
    held_out = pretrain.measure(given.folder, train_texts, held_out_texts)["held_out_loss"]
    print(
        f"{given.steps} steps in {seconds / 60:.1f} min: training loss {loss:.3f}, "
        f"held-out loss {held_out:.3f}; saved to {given.folder}"
    )


if __name__ == "__main__":
    main()
