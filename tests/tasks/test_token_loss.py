"""The loss by parts is the model's own loss, with the same gradients; else the model's own runs."""

import copy
import logging

import pytest
import torch
import transformers
from models import VOCABULARY, tiny_gpt2, tiny_llama, token_batch
from torch import nn

from lightning_peft import engine
from lightning_peft.data import packing
from lightning_peft.engine.training.causal_lm_loss import causal_lm_loss
from lightning_peft.plan.memory_tracker import MemoryTracker
from lightning_peft.plan.meta_copy import fake_mode, make_fake, meta_copy
from lightning_peft.tasks import token_loss
from lightning_peft.tasks.token_loss import ChunkedLoss, TokenLoss

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 16,
}


def from_config(kind: str, **fields):
    config = transformers.AutoConfig.for_model(kind, **SIZES, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    # Logits of fresh models are so small that no cap would bend them.
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    return model


def with_bias():
    model = tiny_llama()
    model.lm_head = nn.Linear(64, VOCABULARY)
    return model


MODELS = {
    "llama": tiny_llama,
    "tied": lambda: tiny_llama(tied=True),
    "bias": with_bias,
    "gpt2": tiny_gpt2,
    "gemma2": lambda: from_config("gemma2", final_logit_softcapping=3.0, sliding_window=32),
    "cohere": lambda: from_config("cohere", logit_scale=0.3),
    "granite": lambda: from_config("granite", logits_scaling=5.0),
}


def batch_of(rows: int = 3, length: int = 9):
    """A batch whose prompts, padding and one whole row have no label."""
    batch = token_batch(rows, length)
    batch["labels"][:, :3] = -100
    batch["labels"][1] = -100
    batch["attention_mask"][2, 7:] = 0
    batch["labels"][2, 7:] = -100
    return batch


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compared(model, batch, tolerance=1e-5):
    """Checks loss and all gradients against the model's own; returns the loss in parts."""
    own = copy.deepcopy(model)
    parts = TokenLoss()
    torch.manual_seed(5)
    loss = parts.train(model, model, batch)
    (loss * 0.5).backward()
    torch.manual_seed(5)
    expected = own(**batch).loss
    (expected * 0.5).backward()
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    theirs = gradients(own)
    assert gradients(model).keys() == theirs.keys()
    for name, gradient in gradients(model).items():
        error = (gradient.double() - theirs[name].double()).norm()
        assert error <= tolerance * max(theirs[name].double().norm(), 1e-3), name
    return parts


@pytest.mark.parametrize("chunk", [1 << 24, 4 * VOCABULARY])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_of_all_weights_are_the_models_own(kind, chunk, monkeypatch):
    monkeypatch.setattr(token_loss, "CHUNK", chunk)
    assert compared(MODELS[kind](), batch_of())._chunked is True


HEADS = {
    "frozen": {},
    "adapted": {"target_modules": ["q_proj", "lm_head"]},
    "saved": {"modules_to_save": ["lm_head"]},
    "dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_heads_with_adapters_and_saved_heads(head, quantized, monkeypatch):
    monkeypatch.setattr(token_loss, "CHUNK", 4 * VOCABULARY)
    model = tiny_llama()
    config = engine.quantization_config() if quantized else None
    engine.inject(model, r=4, quantization_config=config, **HEADS[head])
    with torch.no_grad():
        for param in engine.adapter_parameters(model).values():
            param.copy_(torch.randn_like(param) * 0.1)
    assert compared(model, batch_of(), 1e-4)._chunked is True


def test_a_quantized_head():
    model = tiny_llama()
    holder = nn.ModuleDict({"head": model.lm_head})
    engine.inject(
        holder, r=4, target_modules=["head"], quantization_config=engine.quantization_config()
    )
    assert compared(model, batch_of(), 1e-4)._chunked is True


def test_packed_rows():
    model = tiny_llama()
    examples = [[token_batch(1, n) for n in lengths] for lengths in ((5, 7), (3, 4, 2))]
    rows = [
        [{k: v[0].tolist() for k, v in example.items() if k != "attention_mask"} for example in row]
        for row in examples
    ]
    batch = packing.to_model(packing.collate(rows, 0), model)
    assert compared(model, batch)._chunked is True


def test_bfloat16_and_autocast_up_to_rounding():
    assert compared(tiny_llama().bfloat16(), batch_of(), 0.02)._chunked is True
    model = tiny_llama()
    with torch.autocast("cpu", torch.bfloat16):
        assert compared(model, batch_of(), 0.02)._chunked is True


def test_float16_keeps_what_a_mean_over_many_tokens_would_lose():
    head = nn.Linear(8, 50, bias=False).half()
    hidden = torch.randn(4096, 8).half().requires_grad_()
    targets = torch.randint(0, 50, (4096,))
    loss = ChunkedLoss.apply(hidden, targets, 100, head, lambda logits: logits, head.weight)
    (loss * 65536).backward()
    exact_hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, head.weight))
    exact = nn.functional.cross_entropy(exact_hidden @ weight.t(), targets)
    (exact * 65536).backward()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-3, atol=0)
    for got, expected in ((hidden.grad, exact_hidden.grad), (head.weight.grad, weight.grad)):
        assert (got.double() - expected).norm() < 0.01 * expected.norm()


def test_dropout_and_checkpointing_see_the_same_random_numbers():
    model = tiny_gpt2().train()
    model.transformer.drop.p = 0.3
    engine.inject(model, r=4, lora_dropout=0.2)
    engine.checkpoint_activations(model, True)
    batch = batch_of()
    # Without padding, which would not be computed and so draw no numbers.
    batch["attention_mask"][:] = 1
    assert compared(model, batch)._chunked is True


def test_a_batch_without_labels_gives_no_number_and_no_gradient():
    model = tiny_llama()
    batch = batch_of()
    compared(model, batch)
    model.zero_grad()
    batch["labels"][:] = -100
    loss = TokenLoss().train(model, model, batch)
    loss.backward()
    assert loss.isnan()
    assert not any(g.any() for g in gradients(model).values())


def test_no_logits_of_tokens_without_a_label_are_made(monkeypatch):
    monkeypatch.setattr(token_loss, "CHUNK", 4 * VOCABULARY)
    model, parts, batch = tiny_llama(), TokenLoss(), batch_of(4, 20)
    batch["labels"][:, :17] = -100
    model.config.max_position_embeddings = 80
    parts.evaluate(model, model, batch)
    sizes = []
    model.lm_head.register_forward_hook(lambda m, args, out: sizes.append(out.numel()))
    parts.train(model, model, batch)
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    # One position of the rows without padding, since the model calls its head itself; then chunks
    # of four tokens.
    assert sizes[0] == VOCABULARY
    assert sum(sizes[1:]) == labelled * VOCABULARY
    assert max(sizes) == 4 * VOCABULARY


def test_the_head_is_not_copied_for_each_row():
    model, parts, batch = tiny_llama(), TokenLoss(), batch_of(8, 20)
    # On the left, where padding stays.
    batch = {name: tensor.flip(1) for name, tensor in batch.items()}
    engine.inject(model, r=2)
    parts.train(model, model, batch)
    with torch.profiler.profile(record_shapes=True) as profile:
        parts.train(model, model, batch)
    shapes = [tuple(shape) for event in profile.events() for shape in event.input_shapes if shape]
    assert (64, VOCABULARY) in shapes
    assert (8, 64, VOCABULARY) not in shapes


def test_many_classes_do_not_make_the_loss_look_like_another():
    # torch's own sum over so many classes in float32 is off by more than a millionth of this loss.
    classes, token = 49152, 7
    fields = {"vocab_size": classes, "hidden_size": 16, "head_dim": 4, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | fields))
    model.lm_head = nn.Linear(16, classes)
    model.loss_function = causal_lm_loss
    with torch.no_grad():
        model.lm_head.bias.zero_()[token] = 12
    batch, parts = {"input_ids": torch.full((2, 33), token)}, TokenLoss()
    batch["labels"] = batch["input_ids"].clone()
    parts.train(model, model, batch)
    assert parts._chunked is True


def test_evaluation_counts_as_the_logits_say():
    model, batch = tiny_llama(), batch_of()
    scored = TokenLoss().evaluate(model, model, batch)
    logits = model(**batch).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    assert scored.tokens == int((labels != -100).sum())
    assert scored.correct == ((logits.argmax(-1) == labels) & (labels != -100)).sum()
    torch.testing.assert_close(scored.loss, model(**batch).loss)
    whole = TokenLoss()
    whole._chunked = False
    other = whole.evaluate(model, model, batch)
    assert (other.tokens, other.correct) == (scored.tokens, scored.correct)


def _experts():
    fields = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    return from_config("mixtral", **fields)


def _smoothed():
    model = tiny_llama()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.float().pow(2).mean()
    return model


class Shifting(transformers.LlamaForCausalLM):
    """A model that does something to its logits that its config does not say."""

    def forward(self, *args, **kwargs):
        labels = kwargs.pop("labels", None)
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, VOCABULARY)
        return output


def _compiled():
    model = tiny_llama()
    model._compiled_call_impl = model._call_impl
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_experts, "its loss is not a mean over tokens"),
        (_smoothed, "a loss function of its own"),
        (lambda: Shifting(tiny_llama().config), "more to its logits than its config says"),
        (_compiled, "compiled as a whole"),
    ],
)
def test_other_models_compute_their_own_loss_and_it_is_said_once(make, said, caplog):
    model = make()
    with caplog.at_level(logging.INFO, "lightning_peft"):
        parts = compared(model, batch_of())
        parts.train(model, model, batch_of())
    assert parts._chunked is False
    # transformers warns of a class once, in whichever test makes the first one.
    ours = [record for record in caplog.records if record.name.startswith("lightning_peft")]
    assert [said in record.message for record in ours] == [True]


def test_a_batch_with_more_in_it_is_the_models_own_affair():
    model, batch = tiny_llama(), batch_of()
    batch["num_items_in_batch"] = torch.tensor(7)
    assert compared(model, batch)._chunked is None


def test_the_trial_leaves_random_numbers_hooks_and_modes_alone():
    model, batch = tiny_gpt2().train(), batch_of()
    model.lm_head.eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    parts = TokenLoss()
    assert parts._can_chunk(model, model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert not model.lm_head._forward_pre_hooks


def test_the_planner_can_trace_it():
    model, parts = tiny_llama(), TokenLoss()
    other = meta_copy(model)
    with fake_mode() as mode:
        make_fake(other, mode)
        batch = {name: torch.empty(2, 9, dtype=torch.int64) for name in batch_of()}
        with MemoryTracker(VOCABULARY) as ledger:
            parts.train(other, other, batch).backward()
    assert ledger.peak > 0
    assert other.lm_head.weight.grad.shape == model.lm_head.weight.shape
    assert parts._chunked is None
