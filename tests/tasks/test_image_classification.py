"""The classifier of images: its numbers, its labels, and its head with LoRA and QLoRA."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import short_runs
import torch
from transformers import AutoConfig, AutoModelForImageClassification

from lightning_peft.data.images import ImageData
from lightning_peft.errors import ConfigError
from lightning_peft.plugin.loading import load_from_checkpoint
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.tasks.image_classification import ImageClassifier

pytest.importorskip("PIL")

DIGITS = Path(__file__).parents[2] / "recipes" / "small" / "data" / "digits.parquet"
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "do_resize": False}
SIZES = {"image_size": 8, "patch_size": 4, "hidden_size": 64, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "initializer_range": 0.1}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VIT = {"model_type": "vit", "intermediate_size": 64, **SIZES, **HEADS, **QUIET}
DINO = {"model_type": "dinov2", "mlp_ratio": 1, **SIZES, **HEADS, **QUIET}
MODELS = {"vit": VIT, "dinov2": DINO}
ROOT = ROOTS[1]


@pytest.fixture
def data(tmp_path):
    def data(**options):
        options = {"batch_size": 20, "limit": 100, "validation_share": 0.2, **options}
        cache = str(tmp_path / "cache")
        return bind_to_lightning(ImageData, ROOT)(
            str(DIGITS), PROCESSOR, cache_dir=cache, **options
        )

    return data


def task(config=VIT, **options):
    return bind_to_lightning(ImageClassifier, ROOT)("none", config=config, **options)


def trainer(**options):
    return short_runs.trainer(**{"max_steps": 8, "num_sanity_val_steps": 0, **options})


def with_adapters(method, **options):
    return trainer(strategy=short_runs.STRATEGIES[method](r=4, announce=False), **options)


def test_loss_and_metrics_are_those_counted_by_hand(data):
    module, images = task(), data(batch_size=7)
    logged = trainer().validate(module, images, verbose=False)[0]
    batches = list(images.val_dataloader())
    labels = torch.cat([batch["labels"] for batch in batches])
    with torch.no_grad():
        logits = torch.cat([module(pixel_values=b["pixel_values"]).logits for b in batches])
    assert len(labels) % 7, "the last batch is as long as the others, so weights prove nothing"
    picked = logits.exp()[range(len(labels)), labels] / logits.exp().sum(-1)
    assert logged["val_loss"] == pytest.approx(-picked.log().mean().item(), rel=1e-4)
    likely = logits.argmax(-1)
    assert logged["val_accuracy"] == pytest.approx((likely == labels).float().mean().item())
    scores = []
    for label in range(10):
        hits = ((likely == label) & (labels == label)).sum().item()
        named, there = (likely == label).sum().item(), (labels == label).sum().item()
        if named + there:
            scores.append(2 * hits / (named + there))
    assert logged["val_f1"] == pytest.approx(sum(scores) / len(scores))


def test_the_training_loss_is_the_models_own(data):
    module, images = task(), data()
    trainer(max_steps=0).fit(module, images)
    batch = next(iter(images.val_dataloader()))
    module.log = lambda *_, **__: None
    expected = module(**batch).loss
    torch.testing.assert_close(module.training_step(batch, 0), expected)


@pytest.mark.parametrize("method", short_runs.STRATEGIES)
@pytest.mark.parametrize("model", MODELS)
def test_adapters_and_head_are_trained_and_saved_and_nothing_else(method, model, data, tmp_path):
    module, images = task(MODELS[model], learning_rate=5e-3), data()
    before = with_adapters(method).validate(task(MODELS[model]), images, verbose=False)[0]
    start = short_runs.values()
    run = with_adapters(method, callbacks=[start])
    run.fit(module, images)
    assert run.callback_metrics["val_loss"] < before["val_loss"]
    moved = short_runs.changed(start.before, module)
    heads = {f"model.classifier.{kind}" for kind in ("weight", "bias")}
    assert heads <= moved
    assert len(moved) > 10
    assert all("lora_" in name for name in moved - heads)
    run.save_checkpoint(tmp_path / "one.ckpt")
    loaded = load_from_checkpoint(bind_to_lightning(ImageClassifier, ROOT), tmp_path / "one.ckpt")
    assert loaded.hparams["labels"] == [str(n) for n in range(10)]
    module.eval(), loaded.eval()
    pixels = next(iter(images.val_dataloader()))["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(pixel_values=pixels).logits, module(pixel_values=pixels).logits
        )
    assert loaded.model.config.id2label == {n: str(n) for n in range(10)}


@pytest.mark.parametrize("method", short_runs.STRATEGIES)
def test_the_head_of_other_classes_is_replaced_and_trained(method, data, tmp_path):
    base = AutoModelForImageClassification.from_config(AutoConfig.for_model(**VIT, num_labels=3))
    base.save_pretrained(tmp_path / "base")
    module = bind_to_lightning(ImageClassifier, ROOT)(str(tmp_path / "base"), learning_rate=5e-3)
    run = with_adapters(method, max_steps=2)
    run.fit(module, data())
    head = module.model.classifier
    assert head.weight.shape == (10, 64)
    assert head.weight.requires_grad
    assert head.weight.is_floating_point()
    if method == "lora":
        inner = dict(base.vit.named_parameters())
        kept = dict(module.model.vit.named_parameters())
        assert all(torch.equal(kept[name], value) for name, value in inner.items())


def test_a_ready_head_is_not_read_the_wrong_way_round(data, tmp_path, caplog):
    names = [str(n) for n in range(10)]

    def validate(labels):
        config = AutoConfig.for_model(**VIT, id2label=dict(enumerate(labels)))
        AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "base")
        module = bind_to_lightning(ImageClassifier, ROOT)(str(tmp_path / "base"))
        return trainer().validate(module, data(), verbose=False)

    with pytest.raises(ConfigError, match="They are in another order: number 0 is '9'"):
        validate(names[::-1])
    validate(names)
    assert "other labels" not in caplog.text
    validate([*"abcdefghij"])
    assert "is for other labels (a, b, c" in caplog.text


def test_predictions_name_the_label(data):
    module, images = task(), data()
    rows = [row for batch in trainer().predict(module, images) for row in batch]
    assert len(rows) == images.read().splits["validation"].num_rows
    for row in rows:
        assert list(row["probabilities"]) == images.labels
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["probabilities"][row["label"]] == max(row["probabilities"].values())


def test_they_are_the_same_after_resuming(data, tmp_path):
    def run(steps, **fit):
        module = task(learning_rate=5e-3, schedule="constant", warmup=0)
        current = with_adapters("qlora", max_steps=steps)
        import_module(ROOT).seed_everything(1)
        current.fit(module, data(), **fit)
        current.save_checkpoint(tmp_path / f"{steps}{len(fit)}.ckpt")
        return {n: p for n, p in module.named_parameters() if p.requires_grad}

    run(3)
    resumed = run(6, ckpt_path=tmp_path / "30.ckpt")
    whole = run(6)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
