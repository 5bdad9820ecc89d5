"""Any change of the vocabulary comes back with the adapter, or is named."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from hypothesis import strategies as st
from properties import few_and_many
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft
from lightning_peft.engine.vocabulary import vocabulary_size
from lightning_peft.errors import CheckpointError, LightningPeftError

SIZE = 32
BASES: dict[bool, str] = {}


def base(tied: bool) -> LlamaForCausalLM:
    if tied not in BASES:
        config = LlamaConfig(
            vocab_size=SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, tie_word_embeddings=tied,
        )  # fmt: skip
        BASES[tied] = tempfile.mkdtemp()
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(BASES[tied])
    return LlamaForCausalLM.from_pretrained(BASES[tied]).eval()


@few_and_many(
    6,
    tied=st.booleans(),
    size=st.integers(SIZE - 8, SIZE + 40),
    targets=st.sampled_from(["all-linear", ["q_proj"], ["q_proj", "embed_tokens"]]),
    saved=st.sampled_from([None, ["embed_tokens"], ["embed_tokens", "lm_head"], ["norm"]]),
    damaged=st.booleans(),
)
def test_a_vocabulary_comes_back_or_is_named(tied, size, targets, saved, damaged):
    model = base(tied)
    if size != SIZE:
        model.resize_token_embeddings(size, mean_resizing=False)
    try:
        lightning_peft.inject(
            model, r=2, target_modules=targets, modules_to_save=saved, init_lora_weights=False
        )
    except LightningPeftError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        # One side of tied weights, or a layer that is to be adapted and trained in full.
        assert "embed_tokens" in refusal
        return
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.01)
    ids = torch.arange(0, size)[None]
    expected = model(ids).logits
    with tempfile.TemporaryDirectory() as folder:
        lightning_peft.save_adapter(model, folder)
        file = Path(folder) / "adapter_model.safetensors"
        if damaged:
            kept = {k: v for k, v in load_file(file).items() if v.shape[0] != size}
            save_file(kept, file)
            (Path(folder) / "provenance.json").write_text(
                (Path(folder) / "provenance.json").read_text().replace("adapter_sha256", "earlier")
            )
        other = base(tied)
        before = copy.deepcopy(other.state_dict())
        try:
            lightning_peft.load_adapter(other, folder)
        except CheckpointError as error:
            refusal = str(error)
        if refusal:
            assert damaged
            assert size == SIZE or f"{SIZE} in the base, {size} in the run" in refusal
            assert vocabulary_size(other) == other.config.vocab_size == SIZE
            torch.testing.assert_close(dict(other.state_dict()), dict(before))
            return
    assert vocabulary_size(other) == other.config.vocab_size == size
    torch.testing.assert_close(other(ids).logits, expected)
