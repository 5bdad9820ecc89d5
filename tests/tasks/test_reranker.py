"""Rerankers: sentence-transformers' losses and scores, and what is measured."""

import pytest
import torch
from sentences import model_in, passages_in, rows_of, trainer_of
from transformers import BertForSequenceClassification

from lightning_peft.errors import ConfigError
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.tasks.reranker import Reranker, in_rows


def task_of(name, **options):
    return bind_to_lightning(Reranker, ROOTS[1])(name, learning_rate=1e-2, **options)


def headed(folder, labels=1, activation=None):
    """Returns the name of a tiny encoder with a head, whose outputs differ from row to row."""
    name = model_in(folder)
    model = BertForSequenceClassification.from_pretrained(name, num_labels=labels)
    if activation:
        model.config.sentence_transformers = {"activation_fn": activation}
    torch.nn.init.normal_(model.classifier.weight, std=3)
    model.save_pretrained(folder)
    return name


def loaded(name, **options):
    task = task_of(name, **options)
    task.configure_model()
    return task.eval()


def test_passages_in_rows():
    found = in_rows(torch.tensor([1.0, 2, 3, 4]), torch.tensor([0, 1, 1, 2]))
    assert found.tolist() == [[1, -torch.inf], [2, 3], [4, -torch.inf]]


def test_metrics_of_outputs_in_and_outside_of_zero_to_one(monkeypatch):
    task = bind_to_lightning(Reranker, ROOTS[1])("none", config={"model_type": "bert"})

    def measured(*batches):
        for metric in task.metrics.values():
            metric.reset()
        for outputs, labels, rows in batches:
            monkeypatch.setattr(task, "logits", lambda _, outputs=outputs: torch.tensor(outputs))
            task.evaluate({"labels": torch.tensor(labels), "rows": torch.tensor(rows)})
        return {name: value.item() for name, value in task.results().items()}

    pairs = [([0.5, 0.1], [1.0, 0], [0, 1]), ([-2, 0.2], [0.0, 0], [0, 1])]
    assert measured(*pairs)["average_precision"] == 1
    lost = [torch.nan] * 4
    found = measured((lost, [1.0, 0, 1, 0], [0, 0, 1, 1]))
    assert (found["accuracy"], found["mrr"]) == (0, 0.5)
    assert found["average_precision"] < 0.6
    assert measured((lost, [1.0, 0, 0, 0], [0, 1, 2, 3]))["accuracy"] == 0


def test_losses_and_scores_are_theirs(tmp_path):
    package = pytest.importorskip("sentence_transformers", reason="compares with it")
    from sentence_transformers.cross_encoder import losses

    name = headed(tmp_path / "model")
    theirs = package.CrossEncoder(name, device="cpu")
    task = loaded(name)
    scored = passages_in(tmp_path, name, "scores", validation_share=0)
    batch = scored.collator()(list(scored.rows("train")))
    rows = rows_of("scores")
    given = [[row["text_a"] for row in rows], [row["text_b"] for row in rows]]
    with torch.no_grad():
        ours = task._losses(task.logits(batch), batch)
        expected = losses.BinaryCrossEntropyLoss(theirs)(given, batch["labels"])
        scores = [score for row in task.predict_step(batch, 0) for score in row["scores"]]
    torch.testing.assert_close(ours.mean(), expected, rtol=0, atol=1e-5)
    pairs = list(zip(*given, strict=True))
    assert scores == pytest.approx(theirs.predict(pairs).tolist(), abs=1e-5)
    ranked = passages_in(tmp_path, name, "triples", validation_share=0)
    batch = ranked.collator()(list(ranked.rows("train"))[:4])
    with torch.no_grad():
        ours = task._losses(task.logits(batch), batch)
        # One row at a time: theirs takes negatives of other rows too.
        alone = [
            losses.MultipleNegativesRankingLoss(theirs)([[v] for v in row.values()], None)
            for row in rows_of("triples")[:4]
        ]
    torch.testing.assert_close(ours, torch.stack(alone), rtol=0, atol=1e-5)
    binary = loaded(name, loss="binary")
    with torch.no_grad():
        found = binary._losses(binary.logits(batch), batch)
    assert found.shape == (8,)


def test_what_is_measured(tmp_path):
    name = headed(tmp_path / "model")
    task, data = task_of(name), passages_in(tmp_path, name, "triples", validation_share=0.5)
    trainer = trainer_of()
    trainer.validate(task, data, verbose=False)
    batch = data.collator()(list(data.rows("validation")))
    scores = in_rows(task.eval().logits(batch), batch["rows"])
    first = scores[:, 0] > scores[:, 1]
    found = trainer.callback_metrics
    assert found["val_accuracy"] == pytest.approx(first.float().mean().item())
    assert found["val_mrr"] == pytest.approx((first.float() * 0.5 + 0.5).mean().item())
    assert {n for n in found if n.startswith("val_")} == {
        *("val_loss", "val_accuracy", "val_mrr", "val_average_precision"),
    }


def test_adapters_and_the_head_train(tmp_path):
    name = model_in(tmp_path / "model")
    task, data = task_of(name), passages_in(tmp_path, name, "scores")
    trainer = trainer_of("qlora", max_steps=-1, max_epochs=2)
    trainer.fit(task, data)
    trained = {n for n, param in task.named_parameters() if param.requires_grad}
    assert {n for n in trained if "lora_" not in n} == {
        *("model.classifier.weight", "model.classifier.bias"),
    }
    found = {n for n in trainer.callback_metrics if n.startswith("val_")}
    assert found == {"val_loss", "val_accuracy", "val_spearman", "val_average_precision"}
    predicted = [row for part in trainer.predict(task, data) for row in part]
    assert all(0 <= row["scores"][0] <= 1 and len(row["expected"]) == 1 for row in predicted)


def test_scores_by_the_configuration(tmp_path):
    name = headed(tmp_path / "model", activation="torch.nn.modules.linear.Identity")
    task, data = loaded(name), passages_in(tmp_path, name, "scores", validation_share=0)
    batch = data.collator()(list(data.rows("train"))[:2])
    with torch.no_grad():
        scores = [row["scores"][0] for row in task.predict_step(batch, 0)]
        assert scores == pytest.approx(task.logits(batch).tolist())
    other = headed(tmp_path / "other", activation="torch.nn.Tanh")
    with pytest.raises(ConfigError, match=r"makes scores by torch\.nn\.Tanh, and Sigmoid or"):
        loaded(other).output_settings  # noqa: B018


def test_what_cannot_work_is_refused(tmp_path, caplog):
    name = headed(tmp_path / "three", labels=3)
    with pytest.raises(ConfigError, match="has a head for 3 labels, and a reranker has one output"):
        loaded(name)
    name = model_in(tmp_path / "model")
    data = passages_in(tmp_path, name, "scores")
    with pytest.raises(ConfigError, match="loss='ranking' looks for the positive among"):
        trainer_of(max_steps=0).fit(task_of(name, loss="ranking"), data)
    with pytest.raises(ConfigError, match="scale=-1 is not above 0"):
        task_of(name, scale=-1)
    decoder = model_in(tmp_path / "llama", "llama")
    tokenizer = passages_in(tmp_path, decoder, "triples").tokenizer
    tokenizer.num_special_tokens_to_add = lambda pair=False: 1
    data = passages_in(tmp_path, decoder, "triples")
    data._tokenizer = tokenizer
    trainer_of(max_steps=0).fit(task_of(decoder), data)
    assert "puts nothing between query and passage" in caplog.text
