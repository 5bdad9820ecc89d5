"""What a fit leaves behind goes through pickle, also where its class was made at run time."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from modules import ROOTS, differing, lightning, loader, task_class, trainer, weights

import lightning_peft
from lightning_peft.plugin.interruption import SaveOnInterrupt
from lightning_peft.plugin.namespace import bind_to_lightning

METHODS = ("lora", "qlora", "callback")


class First(task_class(ROOTS[0])):
    """A module that pickle finds by its name."""


class Second(task_class(ROOTS[1])):
    """The same in the other Lightning."""


def made(method, root, folder, **given):
    if method != "callback":
        return trainer(folder, method, root, **given)
    callback = bind_to_lightning(lightning_peft.QLoRACallback, root)(r=4, announce=False)
    return trainer(folder, "auto", root, callbacks=[callback], **given)


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_trainer_and_its_parts(method, root, tmp_path):
    run = made(method, root, tmp_path, enable_progress_bar=True, max_epochs=2)
    before = pickle.loads(pickle.dumps(run))
    assert type(before) is type(run)
    module = First() if root == ROOTS[0] else Second()
    run.fit(module, loader())
    again = pickle.loads(pickle.dumps(run))
    for name in ("strategy", "_accelerator_connector", "train_dataloader", "progress_bar_callback"):
        mine, theirs = getattr(run, name), getattr(again, name)
        assert type(theirs) is type(mine), name
        assert type(pickle.loads(pickle.dumps(mine))) is type(mine), name
        assert type(copy.deepcopy(mine)) is type(mine), name
    assert not differing(weights(again.lightning_module), weights(module))
    torch.save(run.strategy, io.BytesIO())


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_trainer_from_a_pickle_trains_the_same(method, tmp_path):
    results = []
    for pickled in (False, True):
        run = made(method, ROOTS[0], tmp_path)
        run = pickle.loads(pickle.dumps(run)) if pickled else run
        torch.manual_seed(4)
        module = First()
        run.fit(module, loader())
        run.validate(module, loader(), verbose=False)
        results.append((module.losses, weights(module)))
    assert results[0][0] == results[1][0]
    assert not differing(results[0][1], results[1][1])


class Own(lightning_peft.LoRAStrategy):
    """A strategy of a user's."""


@pytest.mark.parametrize("root", ROOTS)
def test_subclasses_and_other_callbacks(root):
    own = pickle.loads(pickle.dumps(bind_to_lightning(Own, root)(r=3)))
    assert isinstance(own, lightning(root).strategies.DDPStrategy)
    assert isinstance(own, Own)
    assert own.lifecycle.injection.peft_config.r == 3
    assert pickle.loads(pickle.dumps(Own)) is Own
    saver = pickle.loads(pickle.dumps(bind_to_lightning(SaveOnInterrupt, root)()))
    assert isinstance(saver, lightning(root).Callback)
