"""AdaLoRA: ranks are cut after each step, as PEFT cuts them by hand."""

from __future__ import annotations

import peft
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
from modules import trainer as make_trainer
from peft import AdaLoraConfig, PeftModel, get_peft_model

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import ConfigError, UnsupportedError

SETTINGS = {
    "peft_type": "ADALORA",
    "target_modules": ["q_proj", "down_proj"],
    "init_r": 4,
    "target_r": 2,
    "tinit": 2,
    "tfinal": 2,
    "lora_alpha": 8,
}


class WithLoss(task_class(ROOTS[0])):
    """Trains on the loss of the model itself, for which PEFT has the penalty, and no head."""

    def __init__(self, kind="llama"):
        super().__init__(kind)
        self.model.lm_head.requires_grad_(False)

    def loss(self, batch):
        return self.model(input_ids=batch["ids"], labels=batch["ids"]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fitted(folder, method="lora", settings=SETTINGS, cls=WithLoss, **given):
    torch.manual_seed(5)
    module = cls("llama")
    ours = strategy(method, r=16, peft_config=dict(settings))
    run = make_trainer(folder, ours, **{"max_epochs": 2, "max_steps": 10, **given})
    run.fit(module, loader("llama"))
    return module


def adapters(module):
    return {n: p.detach() for n, p in module.named_parameters() if ".lora_" in n}


def kept_ranks(module) -> int:
    return sum(int((p != 0).sum()) for n, p in adapters(module).items() if ".lora_E" in n)


def test_ten_steps_are_those_of_peft(tmp_path):
    module = fitted(tmp_path)
    torch.manual_seed(5)
    fields = {key: value for key, value in SETTINGS.items() if key != "peft_type"}
    # PEFT adds the penalty in the classes that it has for tasks only.
    config = AdaLoraConfig(**fields, total_step=10, task_type="CAUSAL_LM")
    theirs = get_peft_model(build("llama"), config)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.01)
    batches = [*loader("llama"), *loader("llama")]
    losses = []
    for step, batch in enumerate(batches[:10]):
        optimizer.zero_grad()
        loss = theirs(input_ids=batch["ids"], labels=batch["ids"]).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
    expected = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters()}
    mine = adapters(module.model)
    assert len(mine) == 12
    for name, value in mine.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
        if ".lora_E" in name:
            assert torch.equal(value == 0, expected[name] == 0)
    assert kept_ranks(module) == 2 * 4
    # What is logged is the loss of the user's step.
    assert module.losses[0] < losses[0]


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.long), "qlora"])
def test_a_resumed_run_cuts_the_same_ranks(method, tmp_path):
    def fit(ckpt_path=None, callbacks=()):
        torch.manual_seed(5 if ckpt_path is None else 1000)
        module = task(kind="llama")
        ours = strategy(method, r=16, peft_config=dict(SETTINGS))
        run = make_trainer(tmp_path / "root", ours, max_epochs=2, callbacks=list(callbacks))
        run.fit(module, loader("llama", shuffle=True), ckpt_path=ckpt_path)
        return module

    module, _ = resumed(fit, tmp_path, 2, steps=(4, 10))
    assert kept_ranks(module) == 2 * 4
    loaded = lightning_peft.load_from_checkpoint(task_class(ROOTS[0]), tmp_path / "step=12.ckpt")
    assert torch.equal(outputs(loaded, "llama"), outputs(module, "llama"))


def test_peft_reads_the_folder_and_merging_is_exact(tmp_path):
    points = saver(ROOTS[0], tmp_path, filename="one")
    module = fitted(tmp_path / "root", callbacks=[points])
    expected = outputs(module, "llama")
    theirs = PeftModel.from_pretrained(build("llama"), tmp_path / "adapters" / "one")
    assert theirs.peft_config["default"].total_step == 10
    with torch.no_grad():
        found = theirs.eval()(input_ids=next(iter(loader("llama")))["ids"]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    folder = tmp_path / "adapters" / "one"
    loaded = task(kind="llama")
    lightning_peft.load_adapter(loaded.model, folder)
    torch.testing.assert_close(outputs(loaded, "llama"), expected)
    lightning_peft.merge(module)
    torch.testing.assert_close(outputs(module, "llama"), expected, rtol=1e-4, atol=1e-5)
    assert "AdaLoRA r=4 to 2" in str(lightning_peft.report(module))


def test_a_run_without_steps_to_cut_in_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="total_step=3, tinit=2 and tfinal=2"):
        fitted(tmp_path, max_steps=3)
    with pytest.raises(ConfigError, match="total_step=inf"):
        fitted(tmp_path, max_steps=-1, max_epochs=-1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_r": 4}, "target_r=4 with init_r=4: the average rank"),
        ({"use_rslora": True}, "use_rslora=True: PEFT's AdaLoRA does not follow it"),
        ({"rank_pattern": {"q_proj": [True, False]}}, "rank_pattern: PEFT's files hold"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': True or False"),
        ({"deltaT": 0, "beta1": 1.0}, r"deltaT=0: a number(.|\n)*beta1=1.0: between 0 and 1"),
        ({"tinit": -1}, "tinit=-1: a number of optimizer steps, 0 or more"),
    ],
)
def test_settings_that_cannot_work(changes, said):
    with pytest.raises(ConfigError, match=said):
        strategy("lora", r=16, peft_config={**SETTINGS, **changes})


def test_it_needs_a_trainer_and_linear_layers(tmp_path):
    with pytest.raises(UnsupportedError, match="AdaLoraConfig by inject: ranks are cut"):
        lightning_peft.inject(build("llama"), SETTINGS)
    with pytest.raises(UnsupportedError, match="for linear layers here, not a Embedding"):
        fitted(tmp_path, settings={**SETTINGS, "target_modules": ["embed_tokens"]})


def test_steps_whose_gradients_overflow_are_not_counted():
    module = build("llama")
    config = engine.as_peft_config({**SETTINGS, "total_step": 8})
    engine.inject_config(module, engine.InjectionRequest(config, None))
    budget = engine.rank_budget(module, lambda: 8)
    held = {id(p) for p in module.parameters()}
    budget.after_step(held)
    assert budget.step == 0
    for number, expected in ((float("inf"), 0), (1.0, 1)):
        for param in engine.adapter_parameters(module).values():
            param.grad = torch.full_like(param, number)
        budget.after_step(held)
        assert budget.step == expected
    budget.after_step(set())
    assert budget.step == 1


def test_other_methods_have_no_budget():
    module = build("llama")
    lightning_peft.inject(module, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert engine.rank_budget(module, lambda: 8) is None


def test_a_run_that_ends_before_the_cut_warns(tmp_path, caplog):
    class Stopped(WithLoss):
        def on_train_batch_end(self, *given):
            self.trainer.should_stop = self.trainer.global_step == self.ends

    for Stopped.ends, kept in ((2, 16), (5, 10), (9, 8)):
        caplog.clear()
        module = fitted(tmp_path, cls=Stopped, min_epochs=0)
        assert module.trainer.global_step == Stopped.ends
        assert kept_ranks(module) == kept
        said = f"ended after {Stopped.ends} optimizer steps with {kept} ranks. Its budget is 8"
        assert (said in caplog.text) is (kept > 8)
        assert ("in step 9 of 10" in caplog.text) is (kept > 8)


def test_ddp_looks_for_unused_parameters_before_the_penalty(tmp_path, monkeypatch):
    # One process that is not started by Lightning, with a store in memory: it opens no port.
    for name, value in (("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("NODE_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for weight in (0.5, 0.0):
            module = WithLoss()
            ddp = lightning(ROOTS[0]).strategies.DDPStrategy(find_unused_parameters=True)
            settings = {**SETTINGS, "orth_reg_weight": weight}
            ours = lightning_peft.LoRACallback(r=16, peft_config=settings, announce=False)
            run = make_trainer(tmp_path, ddp, callbacks=[ours], max_epochs=2, max_steps=6)
            if weight:
                with pytest.raises(ConfigError, match="find_unused_parameters=True with AdaLoRA"):
                    run.fit(module, loader("llama"))
            else:
                run.fit(module, loader("llama"))
            assert run.global_step == (0 if weight else 6)
    finally:
        dist.destroy_process_group()
