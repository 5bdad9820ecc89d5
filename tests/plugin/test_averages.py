"""Trainings that average weights: copies made late, wrappers of copies, and loops that cannot."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from modules import ROOTS, strategy, trainer
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import LifecycleError

METHODS = pytest.mark.parametrize("method", ["lora", "qlora"])


class Averaging(L.LightningModule):
    """``net`` trains; subclasses keep an average of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 2)
        self.sums: dict[str, torch.Tensor] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.head(self.net(batch)), (batch.sum(1) > 0).long())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.5)


class Late(Averaging):
    """A copy that is made when training starts."""

    def copied(self) -> nn.Module:
        return copy.deepcopy(self.net)

    def on_fit_start(self) -> None:
        self.slow = self.copied()

    @torch.no_grad()
    def on_train_batch_end(self, *given: Any) -> None:
        own, slow = (engine.adapter_parameters(part) for part in (self.net, self.slow))
        self.sums = {n: p * 0.75 + own[n] * 0.25 for n, p in slow.items()}
        for mine, theirs in zip(self.slow.parameters(), self.net.parameters(), strict=True):
            mine.mul_(0.75).add_(theirs, alpha=0.25)


class LateFrozen(Late):
    def copied(self) -> nn.Module:
        return copy.deepcopy(self.net).requires_grad_(False).eval()


class LateAtTrainStart(Late):
    def on_fit_start(self) -> None:
        """Nothing yet."""

    def on_train_start(self) -> None:
        self.slow = self.copied()


def fit(module: Averaging, folder: Any, method: str, **given: Any) -> Any:
    run = trainer(folder, strategy(method, ROOTS[1], **given), ROOTS[1], max_epochs=2)
    torch.manual_seed(5)
    run.fit(module, DataLoader(torch.randn(12, 8), batch_size=4))


@METHODS
@pytest.mark.parametrize("kind", [Late, LateFrozen, LateAtTrainStart])
def test_a_copy_made_after_the_adapters_follows(kind, method, tmp_path) -> None:
    module = kind()
    fit(module, tmp_path, method)
    slow = engine.adapter_parameters(module.slow)
    assert slow.keys() == engine.adapter_parameters(module.net).keys()
    assert not any(p.requires_grad for p in slow.values())
    assert all(torch.equal(slow[n], value) for n, value in module.sums.items())
    assert any(bool(p.any()) for n, p in slow.items() if "lora_B" in n)
    assert lightning_peft.report(module).parts[0].follows == {"slow": "net"}
    base = [dict(part.named_parameters())["0.weight"] for part in (module.net, module.slow)]
    assert torch.equal(*base)
    assert base[0] is not base[1]


@METHODS
def test_a_wrapper_of_a_copy_follows_too(method, tmp_path) -> None:
    class Wrapped(Averaging):
        def __init__(self) -> None:
            super().__init__()
            self.average = AveragedModel(self.net)

        def on_train_batch_end(self, *given: Any) -> None:
            before, own = (
                {n: p.clone() for n, p in engine.adapter_parameters(part).items()}
                for part in (self.average.module, self.net)
            )
            count = int(self.average.n_averaged)
            self.sums = {n: p + (own[n] - p) / (count + 1) for n, p in before.items()}
            self.average.update_parameters(self.net)

    module = Wrapped()
    fit(module, tmp_path, method)
    slow = engine.adapter_parameters(module.average.module)
    assert all(torch.allclose(slow[n], value) for n, value in module.sums.items())
    assert int(module.average.n_averaged) == 6
    x = torch.randn(3, 8)
    assert not torch.equal(module.average(x), module.net(x))
    assert lightning_peft.report(module).parts[0].follows == {"average.module": "net"}
    lightning_peft.unload(module)
    assert type(module.average) is AveragedModel
    assert len(list(module.average.parameters())) == len(list(module.net.parameters())) == 4


class OverStates(Averaging):
    """An average of everything in ``state_dict()``."""

    def on_train_start(self) -> None:
        self.average = {n: value.clone() for n, value in self.state_dict().items()}

    def on_train_batch_end(self, *given: Any) -> None:
        for name, value in self.state_dict().items():
            self.average[name].mul_(0.9).add_(value, alpha=0.1)


class Interpolated(OverStates):
    def on_train_batch_end(self, *given: Any) -> None:
        self.average = {
            n: torch.lerp(self.average[n], v, 0.1) for n, v in self.state_dict().items()
        }


class LoadedIntoAnother(Averaging):
    """A network that ``state_dict()`` is loaded into, and that has no adapters."""

    def on_train_start(self) -> None:
        self.plain = [nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))]

    def on_train_batch_end(self, *given: Any) -> None:
        state = {n: v for n, v in self.net.state_dict().items() if "lora" not in n}
        self.plain[0].load_state_dict(state)


@pytest.mark.parametrize("kind", [OverStates, Interpolated, LoadedIntoAnother])
def test_averages_of_quantized_weights_are_refused(kind, tmp_path) -> None:
    with pytest.raises(
        LifecycleError, match=r"such as those of 'net\.0': packed codes(.|\n)*torch"
    ):
        fit(kind(), tmp_path, "qlora")
    module = kind()
    fit(module, tmp_path, "lora")
    assert module.trainer.global_step == 6


class Older(Averaging):
    """Averages by name that are older than the adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.average = {n: p.detach().clone() for n, p in self.named_parameters()}

    def on_train_batch_end(self, *given: Any) -> None:
        for name, param in self.named_parameters():
            self.average[name] = 0.9 * self.average[name] + 0.1 * param.detach()


class OlderList(Averaging):
    def __init__(self) -> None:
        super().__init__()
        self.average = [p.detach().clone() for p in self.parameters()]

    def on_train_batch_end(self, *given: Any) -> None:
        for mine, param in zip(self.average, self.parameters(), strict=False):
            mine.mul_(0.9).add_(param.detach(), alpha=0.1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Older, r"looks up 'net\.0\.lora_A\.default\.weight'"), (OlderList, "shapes differ")],
)
def test_averages_that_are_older_than_the_adapters(kind, message, tmp_path) -> None:
    with pytest.raises(LifecycleError, match=rf"{message}(.|\n)*`on_fit_start`") as caught:
        fit(kind(), tmp_path, "lora")
    assert caught.value.__cause__ is not None


def test_states_with_adapters_go_into_copies_only(tmp_path) -> None:
    class Plain(Averaging):
        def on_train_start(self) -> None:
            self.plain = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
            self.plain.load_state_dict(self.net.state_dict())

    with pytest.raises(LifecycleError, match=r"layers without adapters(.|\n)*copy\.deepcopy"):
        fit(Plain(), tmp_path, "lora")


def test_other_errors_of_hooks_stay_the_users_own(tmp_path) -> None:
    class Wrong(Averaging):
        def on_train_batch_end(self, *given: Any) -> None:
            self.head(torch.randn(2, 3))

    class Missing(Averaging):
        def on_train_batch_end(self, *given: Any) -> None:
            self.sums["net.0.weight"].zero_()

    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes") as caught:
        fit(Wrong(), tmp_path, "qlora")
    assert not isinstance(caught.value, LifecycleError)
    with pytest.raises(KeyError, match=r"^'net\.0\.weight'$"):
        fit(Missing(), tmp_path, "qlora")
