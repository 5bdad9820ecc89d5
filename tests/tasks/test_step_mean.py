"""Accumulated batches and processes give the gradient and the loss of one batch of all rows."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from step_gradients import LENGTHS, TASKS, step

from lightning_peft import LoRAStrategy
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning

HERE = Path(__file__).parent


def distance(found, expected):
    assert found.keys() == expected.keys()
    apart = sum((found[name] - expected[name]).pow(2).sum() for name in expected)
    return float((apart / sum(value.pow(2).sum() for value in expected.values())).sqrt())


@pytest.mark.parametrize("kind", TASKS)
def test_accumulated_batches_are_one_batch(kind):
    expected, (loss,) = step(kind, 8, 1)
    for batch_size, accumulate in ((2, 4), (1, 8)):
        found, losses = step(kind, batch_size, accumulate)
        assert distance(found, expected) < 2e-6
        assert losses[-1] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("kind", TASKS)
def test_smaller_batches_of_a_step_are_one_batch(kind):
    """Where memory is short in the second batch: the tokens of the first count once."""

    class Short(import_module(ROOTS[1]).Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if len(batch["labels"]) > 2 and batch_idx == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    expected, (loss,) = step(kind, 8, 1)
    ours = bind_to_lightning(LoRAStrategy, ROOTS[1])(
        r=4, announce=False, optimizer=None, halve_batch_on_oom=True
    )
    found, losses = step(kind, 4, 2, ours, callbacks=[Short()])
    assert len(losses) == 1 + 4
    assert distance(found, expected) < 2e-6
    assert losses[-1] == pytest.approx(loss, rel=1e-6)


def test_a_quantized_base_in_bfloat16_differs_by_rounding_alone():
    given = {"dtype": "bfloat16"}
    expected, _ = step("causal lm", 8, 1, "qlora", given)
    found, _ = step("causal lm", 1, 8, "qlora", given)
    assert distance(found, expected) < 1e-3


def test_the_logged_loss_is_the_mean_over_the_tokens_so_far():
    single = [step("causal lm", 1, 1, limit_train_batches=1)[1][0]]
    _, losses = step("causal lm", 1, 8)
    assert losses[0] == pytest.approx(single[0], rel=1e-6)
    # The first token of a row has no prediction.
    first, second = (length - 1 for length in LENGTHS[:2])
    own = (losses[1] * (first + second) - losses[0] * first) / second
    assert abs(own - losses[1]) > 1e-4


def test_a_last_step_of_fewer_batches_is_their_mean():
    expected, (loss,) = step("seq2seq", 2, 1, limit_train_batches=1)
    found, losses = step("seq2seq", 1, 5, limit_train_batches=2)
    assert distance(found, expected) < 2e-6
    assert losses[-1] == pytest.approx(loss, rel=1e-6)


def test_gradients_are_clipped_as_those_of_one_batch():
    # What the optimizer gets is seen after its step: with SGD it is the change.
    options = {"gradient_clip_val": 1e-3, "max_steps": 2}
    one, _ = step("causal lm", 8, 1, **options, max_epochs=2)
    four, _ = step("causal lm", 2, 4, **options, max_epochs=2)
    assert distance(four, one) < 1e-4


def test_without_it_steps_are_those_of_lightning():
    expected, _ = step("causal lm", 8, 1)
    off = {"average_across_step": False}
    assert distance(step("causal lm", 8, 1, given=off)[0], expected) < 2e-6
    assert distance(step("causal lm", 1, 8, given=off)[0], expected) > 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory, program):
    made = tmp_path_factory.mktemp("ranks")
    program.run_script(made, HERE / "step_gradients.py", str(made), ranks=2)
    return made


@pytest.mark.parametrize("kind", TASKS)
def test_two_processes_are_one_batch(kind, folder):
    expected, (loss,) = step(kind, 8, 1)
    for rank in (0, 1):
        seen = torch.load(folder / f"{kind}{rank}.pt")
        assert distance(seen["gradients"], expected) < 2e-6
        assert seen["losses"][-1] == pytest.approx(loss, rel=1e-6)
