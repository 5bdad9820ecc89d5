"""Trainings of modules with teachers, momentum copies, and layers that no optimizer holds."""

from __future__ import annotations

import copy
import logging
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from modules import ROOTS, strategy, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import LifecycleError

METHODS = pytest.mark.parametrize("method", ["lora", "qlora"])


def bert(width: int = 16) -> BertModel:
    size = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=32, intermediate_size=32, max_position_embeddings=8, **size)
    return BertModel(config, add_pooling_layer=False)


def mlp(*sizes: int) -> nn.Sequential:
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*(x for layer in layers for x in (layer, nn.ReLU(), nn.Dropout(0.5))))


def tokens() -> DataLoader:
    torch.manual_seed(5)
    return DataLoader(torch.randint(0, 32, (6, 5)), batch_size=2)


def vectors() -> DataLoader:
    torch.manual_seed(5)
    return DataLoader(torch.randn(6, 8), batch_size=2)


def fit(module: Any, data: DataLoader, folder: Any, method: str = "lora", **given: Any) -> Any:
    run = trainer(folder, strategy(method, ROOTS[1], **given), ROOTS[1])
    run.fit(module, data)
    return run


class Distiller(L.LightningModule):
    """A teacher in eval mode under ``no_grad``, with dropout."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.teacher = mlp(8, 32, 16) if plain else bert(16)
        self.teacher.eval().requires_grad_(False)
        self.student, self.proj = (mlp(8, 16, 8) if plain else bert(8)), nn.Linear(8, 16)
        self.seen: list[tuple[bool, bool]] = []

    def run(self, network: nn.Module, batch: Any) -> Any:
        output = network(batch)
        return getattr(output, "last_hidden_state", output)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            target, again = self.run(self.teacher, batch), self.run(self.teacher, batch)
        self.seen.append((self.teacher.training, torch.equal(target, again)))
        return F.mse_loss(self.proj(self.run(self.student, batch)), target)

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


@METHODS
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "transformers"])
def test_a_teacher_stays_as_it_is_through_fit_and_resume(plain, method, tmp_path) -> None:
    torch.manual_seed(0)
    module = Distiller(plain)
    fresh = copy.deepcopy(module)
    data = vectors() if plain else tokens()
    batch = next(iter(data))
    before = module.run(module.teacher, batch)
    run = fit(module, data, tmp_path, method)
    assert module.seen == [(False, True)] * 3
    assert torch.equal(module.run(module.teacher.eval(), batch), before)
    assert not any(p.requires_grad for p in module.teacher.parameters())
    assert lightning_peft.report(module).left == {"teacher": "frozen by the module"}
    path = tmp_path / "run.ckpt"
    run.save_checkpoint(path)
    run.validate(fresh, data, ckpt_path=path, verbose=False)
    module.eval(), fresh.eval()
    mine, theirs = (m.proj(m.run(m.student, batch)) for m in (module, fresh))
    assert torch.equal(mine, theirs)
    assert lightning_peft.verify(module, batch).passed


class Momentum(L.LightningModule):
    """A model of transformers and its momentum copy, averaged over ``zip`` of their parameters."""

    def __init__(self, freeze: bool) -> None:
        super().__init__()
        self.student, self.predictor = bert(), nn.Linear(16, 16)
        self.momentum = copy.deepcopy(self.student).eval().requires_grad_(not freeze)
        self.expected: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def average(self) -> None:
        student, momentum = (
            engine.adapter_parameters(part) for part in (self.student, self.momentum)
        )
        self.expected = {n: p * 0.9 + student[n] * 0.1 for n, p in momentum.items()}
        pairs = zip(self.momentum.parameters(), self.student.parameters(), strict=True)
        for slow, fast in pairs:
            slow.data = slow.data * 0.9 + fast.data * 0.1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.average()
        with torch.no_grad():
            target = self.momentum(batch).last_hidden_state
        return F.mse_loss(self.predictor(self.student(batch).last_hidden_state), target)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.5)


@METHODS
@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "shielded"])
def test_a_momentum_copy_of_transformers_follows(freeze, method, tmp_path) -> None:
    torch.manual_seed(0)
    module = Momentum(freeze)
    fit(module, tokens(), tmp_path, method)
    followed = engine.adapter_parameters(module.momentum)
    assert followed.keys() == engine.adapter_parameters(module.student).keys()
    assert all(torch.allclose(followed[n], value) for n, value in module.expected.items())
    assert any(bool(p.any()) for n, p in followed.items() if "lora_B" in n)
    assert not module.momentum.training
    report = lightning_peft.report(module)
    assert report.parts[1].follows == {"momentum": "student"}


class Listed(L.LightningModule):
    """An optimizer over some submodules by name; ``spare`` is not one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.spare, self.head = mlp(8, 16, 8), mlp(8, 16, 8), nn.Linear(8, 1)
        self.trained = ("trunk", "head")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.head(self.trunk(batch) + self.spare(batch)).pow(2).mean()

    def configure_optimizers(self) -> Any:
        params = [p for name in self.trained for p in getattr(self, name).parameters()]
        return torch.optim.AdamW(params, 0.01)


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in engine.adapter_parameters(module).items()}


@METHODS
def test_layers_that_no_optimizer_holds_are_frozen_for_this_fit(method, tmp_path, caplog) -> None:
    caplog.set_level(logging.WARNING, "lightning_peft")
    torch.manual_seed(0)
    module = Listed()
    fit(module, vectors(), tmp_path, method)
    (text,) = [r.getMessage() for r in caplog.records if "No optimizer holds" in r.getMessage()]
    assert "anything of 2 adapted layers: spare.0, spare.3. configure_optimizers lists" in text
    assert not any(p.requires_grad for p in engine.adapter_parameters(module.spare).values())
    assert engine.require_record(module).unoptimized == ["spare.0", "spare.3"]
    assert all(not p.any() for n, p in values(module.spare).items() if "lora_B" in n)
    # The next fit may hold others.
    before = values(module)
    module.trained = ("spare", "head")
    fit(module, vectors(), tmp_path, method)
    spare, trunk = values(module.spare), values(module.trunk)
    assert any(not torch.equal(p, before[f"spare.{n}"]) for n, p in spare.items())
    assert all(torch.equal(p, before[f"trunk.{n}"]) for n, p in trunk.items())
    assert engine.require_record(module).unoptimized == ["trunk.0", "trunk.3"]


class Forgotten(Listed):
    """Lists of which nothing shows that a layer was left out on purpose."""

    way = ""

    def configure_optimizers(self) -> Any:
        if self.way == "filtered":
            params = [p for p in self.trunk.parameters() if p.requires_grad]
        else:
            params = [p for n, p in self.named_parameters() if "spare" not in n or "lora_A" in n]
        return torch.optim.AdamW([*params, *self.head.parameters()])


@pytest.mark.parametrize("way", ["filtered", "half of the adapters"])
def test_adapters_that_were_forgotten_are_still_an_error(way, tmp_path) -> None:
    module = Forgotten()
    module.way = way
    with pytest.raises(LifecycleError, match=r"are in no optimizer, such as 'spare\.0\.lora_"):
        fit(module, vectors(), tmp_path)
    assert engine.require_record(module).unoptimized == []


class Hidden(Listed):
    """A copy, another network of the same class, and an alias, all in a list or dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = [mlp(8, 16, 8), copy.deepcopy(self.trunk), self.trunk]
        self.by_name = {"slow": copy.deepcopy(self.head)}


def test_copies_in_lists_are_named_where_they_could_follow(tmp_path, caplog) -> None:
    caplog.set_level(logging.WARNING, "lightning_peft")
    module = Hidden()
    assert engine.unregistered_copies(module) == {"copies[1]": "trunk", "by_name['slow']": "head"}
    fit(module, vectors(), tmp_path)
    texts = [r.getMessage() for r in caplog.records if "is a copy of" in r.getMessage()]
    assert [text.partition(" that ")[0] for text in texts] == ["copies[1] is a copy of 'trunk'"]
    assert "make it an attribute of the module" in texts[0]


class Embedded(L.LightningModule):
    """A frozen model of transformers that only embeds, under ``no_grad``; ``body`` trains."""

    def __init__(self, listed: bool = False) -> None:
        super().__init__()
        self.embed, self.listed = bert().requires_grad_(False).eval(), listed
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            embedded = self.embed(batch).last_hidden_state
        return self.body(embedded).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD((self.body if self.listed else self).parameters(), 0.5)


@pytest.mark.parametrize("listed", [False, True])
def test_a_frozen_model_under_no_grad_is_named_with_what_leaves_it(listed, tmp_path) -> None:
    found = "are in no optimizer" if listed else "no gradient has reached any adapter"
    fix = r"To leave 'embed' as the module froze it(.|\n)*adapt=''; `exclude_modules`"
    with pytest.raises(LifecycleError, match=rf"{found}(.|\n)*{fix}"):
        fit(Embedded(listed), tokens(), tmp_path)
    module = Embedded(listed)
    before = {n: v.clone() for n, v in module.embed.state_dict().items()}
    fit(module, tokens(), tmp_path, adapt="")
    after = module.embed.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], value) for n, value in before.items())
    assert not module.embed.training
    assert lightning_peft.report(module).left == {"embed": "frozen by the module"}


def test_a_free_model_under_no_grad_is_named_with_the_parts_that_train(tmp_path) -> None:
    class Shielded(Distiller):
        """A teacher that only ``no_grad`` shields."""

        def __init__(self) -> None:
            L.LightningModule.__init__(self)
            self.teacher, self.student, self.proj = bert(), bert(), nn.Linear(16, 16)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with torch.no_grad():
                target = self.teacher(batch).last_hidden_state
            return F.mse_loss(self.proj(self.student(batch).last_hidden_state), target)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.5)

    fix = r"To leave 'teacher' without(.|\n)*adapt=\['student'\]"
    with pytest.raises(LifecycleError, match=rf"adapter on:\n  - teacher\n(.|\n)*{fix}"):
        fit(Shielded(), tokens(), tmp_path)
    module = Shielded()
    fit(module, tokens(), tmp_path, adapt=["student"])
    assert not engine.adapter_parameters(module.teacher)
