"""The classifier of texts: loss, metrics, padding, its head, and labels that must agree."""

import json
import shutil

import pytest
import torch
from short_runs import HEADS, MODELS, fit_and_reload, make, trainer, values, write
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from lightning_peft.data.text_classification import TextClassificationData
from lightning_peft.demo.run import BASE
from lightning_peft.errors import CheckpointError, ConfigError
from lightning_peft.plugin.loading import load_from_checkpoint
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.tasks.text_classification import TextClassifier

TEXTS = {"file": "open the file and read", "mail": "send a message to", "sum": "add one number to"}
LABELS = list(TEXTS)


def rows(count=24):
    made = [
        (label, f"{TEXTS[label]} {'it ' * (i % 5)}{i}") for i in range(count) for label in TEXTS
    ]
    return [{"text": text, "label": label} for label, text in made]


@pytest.fixture
def data(tmp_path):
    def data(**options):
        options = {"batch_size": 6, "validation_share": 0.2, **options}
        path = write(tmp_path / "rows.jsonl", options.pop("rows", rows()))
        cache = str(tmp_path / "cache")
        return make(TextClassificationData, path, str(BASE), cache_dir=cache, **options)

    return data


def task(kind="decoder", **options):
    return make(TextClassifier, **{"learning_rate": 1e-2, **MODELS[kind], **options})


def built(kind="decoder", **options):
    made = task(kind, labels=LABELS, pad_token_id=0, **options)
    made.configure_model()
    return made


def test_the_loss_is_the_mean_over_rows(data):
    made, batch = built(), next(iter(data().train_dataloader()))
    with torch.no_grad():
        output = made(**batch)
    chosen = output.logits.log_softmax(-1)[torch.arange(6), batch["labels"]]
    torch.testing.assert_close(output.loss, -chosen.mean())


@pytest.mark.parametrize("kind", MODELS)
def test_a_row_is_read_the_same_with_padding_and_without(kind, data):
    made, found = built(kind).eval(), data()
    collate, prepared = found.collator(), list(found.rows("train"))[:6]
    assert len({len(row["input_ids"]) for row in prepared}) > 1
    with torch.no_grad():
        together = made(**collate(prepared)).logits
        alone = torch.cat([made(**collate([row])).logits for row in prepared])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.fixture
def base_with(tmp_path):
    """Makes a copy of the demo's base with other fields in its configuration."""

    def base_with(**fields):
        folder = tmp_path / "base"
        shutil.copytree(BASE, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))
        return str(folder)

    return base_with


def test_a_decoder_without_padding_learns_it_from_the_data(base_with, data):
    made = task(model=base_with(pad_token_id=None))
    trainer("lora", max_steps=1, limit_val_batches=0).fit(made, data())
    assert made.model.config.pad_token_id == data().pad_token_id == 0
    assert made.hparams["pad_token_id"] == 0


def test_another_padding_is_refused_unless_it_is_meant(base_with, data):
    base = base_with(pad_token_id=7)
    with pytest.raises(ConfigError, match="short rows with token 0, and .* takes token 7"):
        trainer(max_steps=1).fit(task(model=base), data())
    with pytest.raises(ConfigError, match="with token 0, and the model has pad_token_id=7"):
        trainer(max_steps=1).fit(task(model=base, pad_token_id=7), data())
    made = task(model=base, pad_token_id=0)
    trainer("lora", max_steps=1, limit_val_batches=0).fit(made, data())
    assert made.model.config.pad_token_id == 0


def test_the_loss_of_the_base_is_not_taken_over(base_with):
    made = built(model=base_with(problem_type="regression"))
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor([[1, 5], [1, 6]])}
        output = made(**inputs, labels=torch.tensor([0, 2]))
    wanted = -output.logits.log_softmax(-1)[[0, 1], [0, 2]].mean()
    torch.testing.assert_close(output.loss, wanted)


def test_metrics_are_those_counted_by_hand():
    made = built()
    wanted = [0, 0, 0, 1, 2]
    said = [0, 0, 1, 1, 0]

    class Said(torch.nn.Module):
        def forward(self):
            logits = 5.0 * torch.nn.functional.one_hot(torch.tensor(self.said), 3)
            return type("Output", (), {"logits": logits})

    made.model = Said()
    for part in (slice(0, 3), slice(3, 5)):
        made.model.said = said[part]
        made.evaluate({"labels": torch.tensor(wanted[part])})
    found = {name: float(value) for name, value in made.results().items()}
    right = torch.tensor([2.0, 1.0, 0.0])
    f1 = 2 * right / (2 * right + torch.tensor([1.0, 1.0, 0.0]) + torch.tensor([1.0, 0.0, 1.0]))
    good, bad = -torch.tensor([5.0, 0, 0]).log_softmax(0)[:2]
    assert found == {
        "accuracy": pytest.approx(3 / 5),
        "f1": pytest.approx(float(f1.mean())),
        "loss": pytest.approx(float(3 * good + 2 * bad) / 5),
    }


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("kind", MODELS)
def test_adapters_and_the_new_head_learn_and_nothing_else(kind, method, data, tmp_path):
    made = task(kind)
    metrics, predictions, again, rows_again = fit_and_reload(
        made, data(), method, HEADS[kind], tmp_path
    )
    if kind == "decoder":
        assert metrics["val_accuracy"] > 0.8
        assert metrics["val_f1"] > 0.8
    assert again.labels == LABELS
    assert again.model.config.id2label == dict(enumerate(LABELS))
    for row, same in zip(predictions, rows_again, strict=True):
        assert row["expected"] == same["expected"]
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["probabilities"] == pytest.approx(same["probabilities"], abs=1e-5)


def test_texts_without_labels_are_predicted():
    made, tokenizer = built().eval(), AutoTokenizer.from_pretrained(BASE)
    found = made.predict_step(tokenizer(["open the file"], return_tensors="pt"), 0)
    assert [set(row) for row in found] == [{"label", "probabilities"}]
    assert list(found[0]["probabilities"]) == LABELS


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_head_of_a_bfloat16_base_is_trained_in_float32(precision, method, data):
    before, made = values(), task(dtype="bfloat16", learning_rate=1e-5)
    runner = trainer(
        method, max_steps=2, precision=precision, callbacks=[before], limit_val_batches=0
    )
    runner.fit(made, data())
    head = made.model.score.weight
    assert head.dtype == torch.float32
    assert made.model.model.embed_tokens.weight.dtype == torch.bfloat16
    # In bfloat16 most of these steps would be none at all.
    moved = (head - before.before["model.score.weight"]) != 0
    assert moved.float().mean() > 0.99


def test_labels_that_the_data_numbers_otherwise_are_refused(data):
    with pytest.raises(ConfigError, match=r"another order: number 0 is 'sum', not 'file'\. Give"):
        trainer(max_steps=1).fit(task(labels=["sum", "mail", "file"]), data())
    with pytest.raises(ConfigError, match=r"2 there and 3 here; only here: \['sum'\]"):
        trainer(max_steps=1).fit(task(labels=["file", "mail"]), data())
    with pytest.raises(ConfigError, match="does not know its labels"):
        task().configure_model()


def test_labels_of_a_checkpoint_in_another_order_are_refused(data, tmp_path):
    runner = trainer("lora", max_steps=1, limit_val_batches=0)
    runner.fit(task(), data())
    path = tmp_path / "one.ckpt"
    runner.save_checkpoint(path)
    other = ["mail", "file", "sum"]
    with pytest.raises(CheckpointError, match=r"number 0 is 'file', not 'mail'\. Give .* labels="):
        trainer("lora", max_steps=2).fit(task(), data(labels=other), ckpt_path=path)
    with pytest.raises(CheckpointError, match="wrong names"):
        trainer("lora").validate(task(), data(labels=other), ckpt_path=path)
    with pytest.raises(CheckpointError, match="wrong names"):
        load_from_checkpoint(bind_to_lightning(TextClassifier, ROOTS[1]), path, labels=other)
    # The same labels in the order of the run are those of the run.
    again = trainer("lora", max_steps=2, limit_val_batches=0)
    again.fit(task(), data(labels=LABELS), ckpt_path=path)
    assert again.global_step == 2


def test_a_loaded_task_checks_the_data_that_it_is_given(data, tmp_path):
    runner = trainer("lora", max_steps=1, limit_val_batches=0)
    runner.fit(task(), data())
    runner.save_checkpoint(tmp_path / "one.ckpt")
    again = load_from_checkpoint(bind_to_lightning(TextClassifier, ROOTS[1]), tmp_path / "one.ckpt")
    with pytest.raises(ConfigError, match="number 0 is 'file', not 'mail'"):
        trainer().predict(again, data(labels=["mail", "file", "sum"]))


@pytest.fixture
def tuned_base(tmp_path):
    """Saves a base with a head for these labels."""

    def tuned_base(labels):
        names = dict(enumerate(labels)) if isinstance(labels, list) else None
        fields = {"id2label": names} if names else {"num_labels": labels}
        config = AutoConfig.from_pretrained(BASE, **fields)
        torch.manual_seed(5)
        model = AutoModelForSequenceClassification.from_config(config)
        model.save_pretrained(tmp_path / "tuned")
        return str(tmp_path / "tuned"), model.score.weight.detach().clone()

    return tuned_base


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["sum", "mail", "file"], r"number 0 is 'sum', not 'file'\. Give labels=\['sum', 'mail'"),
        (["x", "y", "z"], r"only there: \['x', 'y', 'z'\]; .* tuned from, whose head is new"),
        (["x", "y"], "2 there and 3 here"),
        (4, "4 there and 3 here"),
    ],
)
def test_a_base_with_a_head_for_other_labels_is_refused(labels, message, tuned_base):
    folder, _ = tuned_base(labels)
    with pytest.raises(ConfigError, match=message):
        built(model=folder)


@pytest.mark.parametrize("labels", [LABELS, 3])
def test_a_base_with_a_head_for_these_labels_goes_on_with_it(labels, tuned_base):
    folder, head = tuned_base(labels)
    assert torch.equal(built(model=folder).model.score.weight, head)


def test_a_model_from_a_config_gets_the_padding_of_the_data():
    config = {k: v for k, v in MODELS["encoder"]["config"].items() if k != "pad_token_id"}
    made = built("encoder", config=config)
    assert made.model.config.pad_token_id == 0
    assert made.model.model.embeddings.tok_embeddings.padding_idx == 0
