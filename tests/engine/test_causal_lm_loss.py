"""The loss of causal language models: transformers' numbers, with less of the logits in memory."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from models import Stack, tiny_gpt2, tiny_llama, token_batch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForSequenceClassification
from transformers.loss.loss_utils import ForCausalLMLoss

from lightning_peft import engine
from lightning_peft.engine.training import causal_lm_loss as loss_module
from lightning_peft.engine.training.causal_lm_loss import causal_lm_loss

from .reference import randomize, relative_error

ROWS, LENGTH, WORDS = 3, 11, 37
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of logits at a time, so that tests have many pieces, and a last smaller one."""
    monkeypatch.setattr(loss_module, "_CHUNK", 2 * WORDS + 1)


def made(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Returns logits that are not small, and labels of which some do not count."""
    logits = (torch.randn(ROWS, LENGTH, WORDS) * 5).to(dtype)
    labels = torch.randint(0, WORDS, (ROWS, LENGTH))
    labels[0, :6] = labels[2, 9] = -100
    return logits, labels


def both(logits: Tensor, *args: Any, weight: float = 1.0, **kwargs: Any) -> list[Tensor]:
    """Returns loss and gradient of transformers, and ours."""
    found = []
    for function in (ForCausalLMLoss, causal_lm_loss):
        given = logits.clone().requires_grad_()
        loss = function(given, *args, **kwargs)
        (loss * weight).backward()
        assert torch.equal(given, logits)
        found += [loss.detach(), given.grad]
    return found


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_loss_and_gradient_are_those_of_transformers(dtype: torch.dtype, weight: float) -> None:
    logits, labels = made(dtype)
    theirs, of_theirs, mine, of_mine = both(logits, labels, WORDS, weight=weight)
    assert mine.dtype == theirs.dtype == torch.float32
    assert mine == pytest.approx(theirs.item(), rel=1e-6)
    assert of_mine.dtype == dtype
    assert relative_error(of_mine, of_theirs) <= TOLERANCE[dtype]
    # What does not count has no gradient at all: the last position, and those before no label.
    assert of_mine[:, -1].count_nonzero() == of_mine[0, :5].count_nonzero() == 0
    assert of_mine.count_nonzero() > 0


@pytest.mark.parametrize(
    ("scale", "given"),
    [
        (1, {"num_items_in_batch": 7}),
        (1, {"num_items_in_batch": torch.tensor(7)}),
        # Neither overflows nor loses the small ones.
        (1e4, {}),
        # Shifted already, with another label that does not count.
        (1, {"shift_labels": torch.arange(ROWS * LENGTH).view(ROWS, LENGTH), "ignore_index": 5}),
    ],
    ids=["divided by an int", "divided by a tensor", "large logits", "shifted labels"],
)
def test_settings_are_those_of_transformers(scale: float, given: dict[str, Any]) -> None:
    logits, labels = made()
    theirs, of_theirs, mine, of_mine = both(logits * scale, labels, WORDS, **given)
    assert torch.isfinite(mine)
    assert mine == pytest.approx(theirs.item(), rel=1e-6)
    assert relative_error(of_mine, of_theirs) <= 1e-6


def test_without_any_label_it_is_no_number_as_in_transformers() -> None:
    logits, labels = made()
    nothing = torch.full_like(labels, -100)
    assert causal_lm_loss(logits, nothing, WORDS).isnan()
    assert ForCausalLMLoss(logits, nothing, WORDS).isnan()
    assert causal_lm_loss(logits, nothing, WORDS, num_items_in_batch=4) == 0


def test_a_label_outside_of_the_vocabulary_is_refused() -> None:
    logits, labels = made()
    labels[1, 1] = WORDS
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        causal_lm_loss(logits, labels, WORDS)


def test_logits_that_are_a_slice_of_others() -> None:
    logits, labels = made()
    wider = torch.cat([logits, torch.randn(ROWS, LENGTH, 3)], dim=-1)
    sliced = wider[..., :WORDS]
    assert causal_lm_loss(sliced, labels, WORDS) == causal_lm_loss(logits, labels, WORDS)


def test_the_default_dtype_does_not_matter() -> None:
    logits, labels = made(torch.bfloat16)
    loss, gradient = both(logits, labels, WORDS)[2:]
    torch.set_default_dtype(torch.bfloat16)
    try:
        again, of_again = both(logits, labels, WORDS)[2:]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again, loss)
    assert torch.equal(of_again, gradient)


def test_gradients_of_gradients() -> None:
    logits, labels = made()
    found = []
    for function in (ForCausalLMLoss, causal_lm_loss):
        given = logits.clone().requires_grad_()
        loss = function(given, labels, WORDS)
        (first,) = torch.autograd.grad(loss, given, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), given)[0])
    assert relative_error(found[1], found[0]) <= 1e-5


def test_under_a_transform_transformers_computes() -> None:
    logits, labels = made()
    wanted = torch.func.grad(lambda x: ForCausalLMLoss(x, labels, WORDS))(logits)
    assert torch.equal(torch.func.grad(lambda x: causal_lm_loss(x, labels, WORDS))(logits), wanted)


def test_a_plan_counts_what_is_run() -> None:
    """The planner runs a step with fake tensors, which are of another class."""
    with FakeTensorMode():
        logits = torch.empty(ROWS, LENGTH, WORDS, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
        loss = causal_lm_loss(logits, labels, WORDS)
        loss.backward()
    assert loss.grad_fn.next_functions[0][0].name() == "SummedCrossEntropyBackward"
    assert logits.grad.shape == logits.shape


def test_only_the_logits_themselves_wait_for_the_backward_pass() -> None:
    logits, labels = made(torch.bfloat16)
    kept: dict[str, int] = {}
    for function in (ForCausalLMLoss, causal_lm_loss):
        seen: dict[int, int] = {}

        def note(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[tensor.data_ptr()] = tensor.nbytes
            return tensor

        given = logits.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            function(given, labels, WORDS)
        seen.pop(given.data_ptr(), None)
        kept[function.__name__] = sum(seen.values())
    positions = ROWS * LENGTH
    assert kept["ForCausalLMLoss"] >= positions * WORDS * 4
    # Next to the logits: two numbers to normalize by, two targets; and how many there are.
    assert kept["causal_lm_loss"] <= positions * (4 + 4 + 8 + 8) + 8


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_model_learns_as_with_the_loss_of_transformers(build: Any) -> None:
    model = build()
    plain = copy.deepcopy(model)
    engine.inject(model, r=4)
    assert model.loss_function is causal_lm_loss
    engine.inject(plain, r=4)
    randomize(model)
    plain.load_state_dict(model.state_dict())
    plain.loss_function = ForCausalLMLoss
    batch = token_batch()
    batch["labels"][0, :3] = -100
    losses = [one(**batch).loss for one in (model, plain)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    grads = [
        torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None])
        for one in (model, plain)
    ]
    assert relative_error(*grads) <= 1e-5


def test_the_model_around_an_adapted_part_is_found_and_taken_back() -> None:
    holder = nn.ModuleDict({"model": tiny_llama(), "other": tiny_llama()})
    engine.inject(holder, adapt="model.model", r=2)
    assert holder["model"].loss_function is causal_lm_loss
    assert holder["other"].loss_function is ForCausalLMLoss
    again = pickle.loads(pickle.dumps(holder))
    assert again["model"].loss_function is causal_lm_loss
    engine.unload(holder)
    assert holder["model"].loss_function is ForCausalLMLoss
    assert "_loss_function" not in vars(holder["model"])


def test_other_losses_are_left_alone() -> None:
    def own(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return logits.float().pow(2).mean()

    model = tiny_llama()
    model.loss_function = own
    engine.inject(model, r=2)
    assert model.loss_function is own
    engine.unload(model)
    assert model.loss_function is own
    config = copy.deepcopy(tiny_llama().config)
    config.pad_token_id = 0
    classifier = LlamaForSequenceClassification(config)
    before = classifier.loss_function
    engine.inject(classifier, r=2)
    assert classifier.loss_function is before
    # A module that has nothing to do with transformers.
    engine.inject(Stack(), r=2)
