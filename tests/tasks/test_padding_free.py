"""A batch without its padding gives loss, accuracy and gradients of the padded one."""

import logging

import pytest
import torch
from models import VOCABULARY, tiny_gpt2, tiny_llama, token_batch
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

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


def tiny_gpt_neo(positions=16):
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "window_size": 4}
    config = GPTNeoConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=positions,
        attention_types=[[["local"], 1]],
        **sizes,
    )
    return GPTNeoForCausalLM(config)


@pytest.mark.parametrize("training", [True, False])
def test_rows_together_longer_than_the_positions_of_a_model_run(training):
    model, batch = tiny_gpt_neo().train(training), batch_of(9, 3, 7, 2)
    loss, way = TokenLoss(), TokenLoss()
    way.padding_free = Padded()
    torch.testing.assert_close(loss.train(model, model, batch), way.train(model, model, batch))


def test_no_row_gets_longer_than_the_positions_of_a_model():
    model, batch = tiny_llama().double(), batch_of(9, 3, 7, 2)
    model.config.max_position_embeddings = 12
    packed = PaddingFree().batch(model, batch)
    assert packed["attention_mask"].lengths == [[9, 2], [3, 7, 1]]
    assert packed["input_ids"][1, :3].tolist() == batch["input_ids"][1, :3].tolist()
    assert packed["labels"][1, [0, 3, 10]].tolist() == [-100] * 3
    ways = [TokenLoss(), TokenLoss()]
    ways[1].padding_free = Padded()
    torch.testing.assert_close(*(way.train(model, model, batch) for way in ways))
    # Each row would be one of its own.
    model.config.max_position_embeddings = 3
    kept = batch_of(9, 8)
    assert PaddingFree().batch(model, kept) is kept


def dropping():
    model = tiny_gpt2()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model


def eager():
    model = tiny_llama()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize(("build", "evaluated"), [(dropping, True), (eager, False)])
def test_attention_that_makes_the_mask_gets_padded_rows(build, evaluated, caplog):
    caplog.set_level(logging.INFO, "lightning_peft.tasks.padding_free")
    model, free, batch = build().train(), PaddingFree(), batch_of(9, 3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert free.batch(model, batch) is batch
    assert "needs the mask of all tokens squared" in caplog.text
    assert torch.equal(torch.get_rng_state(), state)
    assert (free.batch(model.eval(), batch) is not batch) == evaluated


class Peeking(LlamaForCausalLM):
    """Reads the mask of long rows."""

    def forward(self, attention_mask=None, **batch):
        if batch["input_ids"].shape[1] > 20:
            attention_mask = attention_mask + 0
        return super().forward(attention_mask=attention_mask, **batch)


def test_a_mask_that_a_step_made_is_the_last():
    model, loss = Peeking(tiny_llama().config).train(), TokenLoss()
    long, short = batch_of(19, 3), batch_of(9, 3)
    loss.train(model, model, short)
    assert loss.padding_free.batch(model, short) is not short
    loss.train(model, model, long)
    assert loss.padding_free.batch(model, short) is short


class Picky(LlamaForCausalLM):
    """Fails at masks of four dimensions."""

    def forward(self, attention_mask=None, **batch):
        if attention_mask is not None and attention_mask.ndim == 4:
            raise self.error("not two dimensions")
        return super().forward(attention_mask=attention_mask, **batch)


@pytest.mark.parametrize("error", [AttributeError, IndexError, KeyError, AssertionError])
def test_a_model_that_fails_at_the_trial_gets_padded_rows(error):
    model, batch = Picky(tiny_llama().config), batch_of(9, 3)
    model.error = error
    assert PaddingFree().batch(model, batch) is batch
