"""Copies without values that a step runs on."""

import pytorch_lightning
import torch
from torch import nn

from lightning_peft.plan.meta_copy import fake_mode, make_fake, meta_copy


class Shifted(pytorch_lightning.LightningModule):
    """Makes a tensor on its own device in every step."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)

    def training_step(self, batch, index):
        return (self.net(batch) + torch.ones(2, device=self.device)).sum()


def test_the_device_of_a_module_is_that_of_its_copy():
    module = Shifted().to("meta")
    copy = meta_copy(module)
    with fake_mode() as mode:
        make_fake(copy, mode)
        loss = copy.training_step(torch.zeros(4, 3), 0)
    assert loss.device == copy.device == torch.device("cpu")
    assert module.device == torch.device("meta")
