"""A batch without its padding gives loss, accuracy and gradients of the padded one."""

import logging

import pytest
import torch
from models import VOCABULARY, tiny_gpt2, tiny_llama, token_batch
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lightning_peft import engine
from lightning_peft.tasks.padding_free import PaddingFree
from lightning_peft.tasks.token_loss import TokenLoss


def batch_of(*lengths):
    batch = token_batch(len(lengths), max(lengths))
    for i, length in enumerate(lengths):
        batch["attention_mask"][i, length:] = 0
        batch["labels"][i, length:] = -100
    batch["labels"][0, :3] = -100
    return batch


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


class Padded(PaddingFree):
    def batch(self, model, batch):
        return batch


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_loss_and_gradients_are_those_of_the_padded_batch(build):
    model, batch = build().double().eval(), batch_of(9, 3, 7, 1)
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: seen.append(tuple(args[0].shape))
    )
    ours, theirs = TokenLoss(), TokenLoss()
    theirs.padding_free = Padded()
    loss = ours.train(model, model, batch)
    assert seen[-1] == (1, 20)
    loss.backward()
    found = gradients(model)
    expected = theirs.train(model, model, batch)
    assert seen[-1] == (4, 9)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients(model).items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[name], gradient, msg=name)
    scores = [way.evaluate(model, model, batch) for way in (ours, theirs)]
    assert scores[0].tokens == scores[1].tokens == 14
    assert scores[0].correct == scores[1].correct
    torch.testing.assert_close(scores[0].loss, scores[1].loss)


def left_padded():
    batch = batch_of(9, 3)
    return {name: tensor.flip(1) for name, tensor in batch.items()}


def labelled_padding():
    batch = batch_of(9, 3)
    batch["labels"][1, 5] = 1
    return batch


@pytest.mark.parametrize(
    "make",
    [
        lambda: batch_of(5, 5),
        lambda: batch_of(9, 3) | {"position_ids": torch.arange(9).expand(2, 9)},
        left_padded,
        labelled_padding,
    ],
)
def test_other_batches_stay_as_they_are(make):
    batch = make()
    assert PaddingFree().batch(tiny_llama(), batch) is batch


class Deaf(LlamaForCausalLM):
    """Drops the mask."""

    def forward(self, attention_mask=None, position_ids=None, **batch):
        return super().forward(**batch)


def test_a_model_that_would_mix_rows_gets_them_padded(caplog):
    caplog.set_level(logging.INFO, "lightning_peft.tasks.padding_free")
    batch, free = batch_of(9, 3), PaddingFree()
    assert free.batch(Deaf(tiny_llama().config), batch) is batch
    assert "Padding is computed too: Packed examples see each other in Deaf" in caplog.text
    # It is tried once.
    assert free.batch(None, batch) is batch


def test_rows_longer_than_a_sliding_window_stay_padded():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=VOCABULARY, sliding_window=8, **sizes, **heads)
    model, free = MistralForCausalLM(config), PaddingFree()
    short, long = batch_of(8, 3), batch_of(9, 3)
    assert free.batch(model, long) is long
    packed = free.batch(model, short)
    assert isinstance(packed["attention_mask"], engine.PackedMask)
    assert packed["attention_mask"].lengths == [[8, 3]]
    assert packed["position_ids"].tolist() == [[*range(8), *range(3)]]


def test_compiled_models_get_their_rows_padded():
    model, batch = tiny_llama(), batch_of(9, 3)
    model.compile(backend="eager")
    assert PaddingFree().batch(model, batch) is batch


@pytest.mark.parametrize("setting", [True, 0.5])
def test_checkpointed_blocks_get_the_mask_again_without_its_values(setting):
    model, batch = tiny_llama().train(), batch_of(9, 3, 7, 1)
    engine.inject(model, r=4)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(param)
    packed = PaddingFree().batch(model, batch)
    found = []
    for checkpointed in (False, setting):
        engine.checkpoint_activations(model, checkpointed)
        # A budget measures in its first step.
        for _ in range(3):
            model.zero_grad()
            model(**packed).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[1][name], gradient, msg=name)
    assert packed["attention_mask"]._dense is None
