"""EVA, CorDA and LoRA-GA: adapters that start from the training data, as PEFT makes them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from modules import (
    ROOTS,
    build,
    lightning,
    loader,
    outputs,
    resumed,
    saver,
    strategy,
    task,
    task_class,
)
from modules import rows as some_rows
from modules import trainer as make_trainer
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn
from torch.utils.data import DataLoader

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.layers.lora import LoraLinear
from lightning_peft.errors import ConfigError, LifecycleError, UnsupportedError

SETTINGS = {
    "peft_type": "LORA",
    "init_lora_weights": "eva",
    "eva_config": {"rho": 2.0, "tau": 0.9},
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "r": 3,
    "lora_alpha": 6,
}


class WithLoss(task_class(ROOTS[0])):
    """Trains on the loss of the model itself, and no head."""

    def __init__(self) -> None:
        super().__init__("llama")
        self.model.lm_head.requires_grad_(False)

    def loss(self, batch: Any) -> torch.Tensor:
        return self.model(input_ids=batch["ids"], labels=batch["ids"]).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fitted(folder: Any, method: str = "lora", settings: Any = SETTINGS, **given: Any) -> Any:
    torch.manual_seed(5)
    module = given.pop("module", None) or task(kind="llama")
    ours = strategy(method, r=16, peft_config=copy.deepcopy(settings))
    data = given.pop("data", None) or loader("llama")
    run = make_trainer(folder, ours, **{"max_epochs": 2, "max_steps": 10, **given})
    run.fit(module, data)
    return module


def rows(inputs: Any, model_inputs: None, name: str) -> torch.Tensor:
    return inputs[0].flatten(0, -2)


def test_ten_steps_are_those_of_peft(tmp_path):
    torch.manual_seed(5)
    module = WithLoss()
    model = copy.deepcopy(module.model)
    fitted(tmp_path, module=module)
    fields = {key: value for key, value in SETTINGS.items() if key != "peft_type"}
    fields["eva_config"] = EvaConfig(**SETTINGS["eva_config"])
    theirs = get_peft_model(model, LoraConfig(**fields))
    initialize_lora_eva_weights(
        theirs,
        loader("llama"),
        forward_fn=lambda peft_model, batch: peft_model(input_ids=batch["ids"]),
        prepare_model_inputs_fn=lambda batch, config: None,
        prepare_layer_inputs_fn=rows,
        show_progress_bar=False,
    )
    mine = as_after_ten_steps(module, theirs, [*loader("llama"), *loader("llama")], atol=1e-5)
    ranks = {len(p) for n, p in mine.items() if "lora_A" in n}
    assert len(ranks) > 1, "no rank was moved"


def as_after_ten_steps(
    module: Any, theirs: Any, batches: Any, atol: float
) -> dict[str, torch.Tensor]:
    """Trains ``theirs`` and compares the adapters, which are returned."""
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.01)
    for batch in list(batches)[:10]:
        optimizer.zero_grad()
        theirs(input_ids=batch["ids"], labels=batch["ids"]).loss.backward()
        optimizer.step()
    expected = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters()}
    mine = {n: p for n, p in module.model.named_parameters() if "lora_" in n}
    assert mine.keys() == {n for n in expected if "lora_" in n}
    for name, value in mine.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=atol, msg=name)
    return mine


RESIDUAL = {
    "corda": {"corda_config": {"corda_method": "kpm"}},
    "lora_ga": {"lora_ga_config": {"direction": "ArBr"}},
}


def residual(init: str) -> dict[str, Any]:
    """Settings of an initialisation that takes the first factors off the base."""
    settings = {**SETTINGS, **RESIDUAL[init], "init_lora_weights": init}
    del settings["eva_config"]
    return settings


@pytest.mark.parametrize("init", RESIDUAL)
def test_ten_steps_on_a_residual_are_those_of_peft(init, tmp_path):
    torch.manual_seed(5)
    module = WithLoss()
    model = copy.deepcopy(module.model)
    before = outputs(module, "llama")
    # PEFT's covariance is of one row at a time.
    data = DataLoader(some_rows("llama"), batch_size=1)
    points = saver(ROOTS[0], tmp_path, filename="one")
    fitted(tmp_path, settings=residual(init), module=module, data=data, callbacks=[points])
    config = engine.as_peft_config(residual(init))
    if init == "corda":
        preprocess_corda(model, config, lambda: [model(input_ids=x["ids"]) for x in data])
    else:
        first = list(data)[:8]
        preprocess_loraga(
            model,
            config,
            lambda: [model(input_ids=x["ids"], labels=x["ids"]).loss.backward() for x in first],
        )
    torch.manual_seed(0)
    theirs = get_peft_model(model, config)
    torch.testing.assert_close(theirs(input_ids=next(iter(loader("llama")))["ids"]).logits, before)
    as_after_ten_steps(module, theirs, data, atol=1e-4)
    # The folder is plain LoRA for the base as it was.
    read = PeftModel.from_pretrained(build("llama"), tmp_path / "adapters" / "one").eval()
    with torch.no_grad():
        found = read(input_ids=next(iter(loader("llama")))["ids"]).logits
    torch.testing.assert_close(found, outputs(module, "llama"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        pytest.param("lora", SETTINGS, marks=pytest.mark.long),
        ("qlora", SETTINGS),
        ("lora", {**residual("corda"), "use_dora": True}),
        pytest.param("lora", residual("lora_ga"), marks=pytest.mark.long),
    ],
)
def test_a_resumed_run_does_not_do_it_again(method, settings, tmp_path, monkeypatch):
    calls: list[int] = []
    original = engine.initialize_from_batches

    def counted(*args: Any) -> Any:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(engine, "initialize_from_batches", counted)

    def fit(ckpt_path=None, callbacks=()):
        torch.manual_seed(5 if ckpt_path is None else 1000)
        module = task(kind="llama")
        ours = strategy(method, r=16, peft_config=copy.deepcopy(settings))
        run = make_trainer(tmp_path / "root", ours, max_epochs=2, callbacks=list(callbacks))
        run.fit(module, loader("llama", shuffle=True), ckpt_path=ckpt_path)
        return module

    module, _ = resumed(fit, tmp_path, 2, steps=(4,))
    assert len(calls) == 1
    loaded = lightning_peft.load_from_checkpoint(task_class(ROOTS[0]), tmp_path / "step=12.ckpt")
    assert torch.equal(outputs(loaded, "llama"), outputs(module, "llama"))


def test_nothing_else_changes_and_peft_reads_the_folder(tmp_path):
    plain = {**SETTINGS, "init_lora_weights": True}
    del plain["eva_config"]
    orders = []

    class Order(lightning(ROOTS[0]).Callback):
        def on_train_start(self, trainer, module):
            orders.append([torch.random.get_rng_state()])

        def on_train_batch_start(self, trainer, module, batch, index):
            orders[-1].append(batch["ids"])

    for settings, name in ((plain, "plain"), (SETTINGS, "one")):
        points = saver(ROOTS[0], tmp_path, filename=name)
        module = fitted(tmp_path / "root", settings=settings, callbacks=[points, Order()])
    # The batches are those of a run without it.
    assert all(torch.equal(a, b) for a, b in zip(*(order[1:] for order in orders), strict=True))
    expected = outputs(module, "llama")
    theirs = PeftModel.from_pretrained(build("llama"), tmp_path / "adapters" / "one")
    with torch.no_grad():
        found = theirs.eval()(input_ids=next(iter(loader("llama")))["ids"]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    read = task(kind="llama")
    lightning_peft.load_adapter(read.model, tmp_path / "adapters" / "one", is_trainable=True)
    torch.testing.assert_close(outputs(read, "llama"), expected)

    # A second fit goes on.
    before = {n: p.shape for n, p in module.named_parameters()}
    fitted(tmp_path / "again", module=module, max_steps=1)
    assert before == {n: p.shape for n, p in module.named_parameters()}


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_inject_makes_what_a_trainer_makes(init, tmp_path):
    settings = SETTINGS if init == "eva" else residual(init)
    torch.manual_seed(5)
    module, mine = WithLoss(), WithLoss()
    run = make_trainer(tmp_path, strategy(r=16, peft_config=copy.deepcopy(settings)), max_steps=1)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    run.fit(module, loader("llama"))
    lightning_peft.inject(mine, settings, batches=loader("llama"))
    assert torch.equal(outputs(mine, "llama"), outputs(module, "llama"))
    found, expected = engine.adapter_parameters(mine), engine.adapter_parameters(module)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_layers_that_get_no_rank_lose_their_adapter(tmp_path):
    settings = {**SETTINGS, "r": 1, "target_modules": "all-linear"}
    settings["eva_config"] = {"rho": 4.0, "tau": 0.5}
    points = saver(ROOTS[0], tmp_path, filename="one")
    module = fitted(tmp_path / "root", settings=settings, callbacks=[points], max_steps=2)
    (entry,) = engine.require_record(module).parts.values()
    (info,) = entry.adapters.values()
    layers = engine.adapted_layers(module.model)
    assert set(layers) == set(info.targets)
    assert 0 < len(layers) < 14
    loaded = lightning_peft.load_from_checkpoint(task_class(ROOTS[0]), tmp_path / "one.ckpt")
    assert torch.equal(outputs(loaded, "llama"), outputs(module, "llama"))


def test_a_failure_in_between_leaves_the_module_as_it_was(monkeypatch):
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    rewritten = []

    def fails(layer: Any, name: str) -> None:
        # Injection starts an adapter too, and there are no values in it.
        if layer.lora_B[name].weight.any():
            rewritten.append(layer)
        if len(rewritten) == 3:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(LoraLinear, "start_adapter", fails)
    data = [{"input_ids": batch["ids"]} for batch in loader("llama")]
    with pytest.raises(torch.OutOfMemoryError):
        lightning_peft.inject(model, residual("corda"), batches=data)
    assert engine.record_of(model) is None
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_residual_is_the_same_on_any_device():
    """What float64 gives, rounded once; sums of float32 depend on the order of a kernel."""
    model = build("llama")
    before = {name: x.clone() for name, x in model.named_parameters()}
    data = [{"input_ids": batch["ids"]} for batch in loader("llama")]
    lightning_peft.inject(model, residual("corda"), batches=data)
    for name, layer in engine.adapted_layers(model).items():
        a, b = (x.double() for x in layer.factors("default"))
        product = layer.adapter_settings["default"].scaling * (b @ a)
        exact = (before[f"{name}.weight"].double() - product).float()
        assert torch.equal(layer._parameters["weight"], exact)


def test_gradients_that_are_there_do_not_count():
    torch.manual_seed(5)
    module, other = WithLoss(), WithLoss()
    other.load_state_dict(module.state_dict())
    other.loss({"ids": next(iter(loader("llama")))["ids"].flip(1)}).mul(100).backward()
    kept = {p: p.grad.clone() for p in other.parameters() if p.grad is not None}
    for one in (module, other):
        lightning_peft.inject(one, residual("lora_ga"), batches=loader("llama"))
    found = engine.adapter_parameters(other)
    assert all(torch.equal(x, found[n]) for n, x in engine.adapter_parameters(module).items())
    assert torch.equal(outputs(module, "llama"), outputs(other, "llama"))
    assert kept
    assert all(p.grad is None or torch.equal(p.grad, x) for p, x in kept.items())


class Gated(nn.Module):
    """Two layers, one of which gets what a batch says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return self.one(x) + self.two(x * gate)


def test_inputs_of_zeros_do_not_count():
    draw = torch.Generator().manual_seed(1)
    rows_of = [-torch.rand(4, 6, generator=draw) for _ in range(40)]
    batches = [(x, torch.tensor(float(index % 2))) for index, x in enumerate(rows_of)]
    config = {"peft_type": "LORA", "init_lora_weights": "corda", "r": 2}
    config |= {"corda_config": {"corda_method": "kpm"}, "target_modules": ["one", "two"]}
    model, x = Gated(), rows_of[0]
    before = model(x, torch.tensor(1.0))
    lightning_peft.inject(model, config, batches=batches)
    torch.testing.assert_close(model(x, torch.tensor(1.0)), before)
    with pytest.raises(UnsupportedError, match="two: it gets only zeros"):
        lightning_peft.inject(Gated(), config, batches=batches[::2])


@pytest.mark.parametrize("init", ["eva", "corda"])
def test_a_checkpoint_from_before_the_first_batch_has_no_values(init, tmp_path):
    settings = SETTINGS if init == "eva" else residual(init)
    run = make_trainer(tmp_path, strategy(r=16, peft_config=copy.deepcopy(settings)))
    run.validate(task(kind="llama"), loader("llama"), verbose=False)
    run.save_checkpoint(tmp_path / "early.ckpt")
    loaded = lightning_peft.load_from_checkpoint(task_class(ROOTS[0]), tmp_path / "early.ckpt")
    assert engine.lacks_data(loaded)
    if init == "corda":
        with pytest.raises(
            UnsupportedError, match="corda, loftq, lora_ga. is supported for the only"
        ):
            lightning_peft.inject(loaded, r=2, target_modules=["q_proj"], adapter_name="second")


def test_what_it_cannot_do_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_peft.engine.eva._MOST_BATCHES", 8)
    with pytest.raises(UnsupportedError, match=r"training data of a Trainer(.|\n)*pass `batches`"):
        lightning_peft.inject(build("llama"), SETTINGS)
    with pytest.raises(ConfigError, match="nothing is made from them"):
        lightning_peft.inject(build("llama"), batches=[])
    with pytest.raises(ConfigError, match="has no training_step"):
        lightning_peft.inject(build("llama"), residual("lora_ga"), batches=[])
    with pytest.raises(ConfigError, match="has no batches"):
        lightning_peft.inject(model := build("llama"), residual("corda"), batches=[])
    assert engine.record_of(model) is None
    data = [{"input_ids": torch.ones(1, 4, dtype=torch.long)}]
    with pytest.raises(ConfigError, match="one number with a gradient"):
        lightning_peft.inject(model, residual("lora_ga"), batches=data, step=lambda *_: None)
    wrapped = get_peft_model(build("llama"), engine.as_peft_config(SETTINGS))
    with pytest.raises(ConfigError, match="put the adapters into the module already"):
        lightning_peft.inject(wrapped, SETTINGS, batches=data)
    halves = residual("corda")["corda_config"] | {"use_float16_for_covariance": True}
    with pytest.raises(ConfigError, match="use_float16_for_covariance: leave it out"):
        lightning_peft.inject(model, {**residual("corda"), "corda_config": halves}, batches=data)
    with pytest.raises(UnsupportedError, match="the layers are quantized before"):
        fitted(tmp_path, method="qlora", settings=residual("corda"))
    few = {**SETTINGS, "r": 64, "lora_alpha": 64}
    with pytest.raises(ConfigError, match=r"needs at least r \* rho = 128 tokens"):
        fitted(tmp_path, settings=few)
    module = task(kind="llama")
    module.automatic_optimization = False
    with pytest.raises(UnsupportedError, match="manual optimization: training_step would train"):
        fitted(tmp_path, module=module)
    module = fitted(tmp_path, settings={**SETTINGS, "init_lora_weights": True, "eva_config": None})
    with pytest.raises(LifecycleError, match="init_lora_weights"):
        fitted(tmp_path, module=module)
