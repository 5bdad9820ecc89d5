"""The tagger: loss over first tokens, scores in words, its head, and labels that must agree."""

import pytest
import torch
from short_runs import HEADS, MODELS, fit_and_reload, make, write

from lightning_peft.data.token_classification import TokenClassificationData
from lightning_peft.demo.run import BASE
from lightning_peft.tasks.token_classification import TokenClassifier

LABELS = ["B-NAME", "I-NAME", "O"]


def rows(count=60):
    made = []
    for i in range(count):
        name = ["os", ".", f"path{i}"] if i % 2 else [f"collections{i}"]
        filler = ["very"] * (i % 3)
        words = ["The", "function", *name, "is", *filler, "good", "."]
        tags = ["O", "O", "B-NAME", *["I-NAME"] * (len(name) - 1), "O", *["O"] * len(filler), "O"]
        made.append({"tokens": words, "tags": [*tags, "O"]})
    return made


@pytest.fixture
def data(tmp_path):
    def data(**options):
        options = {"batch_size": 6, "validation_share": 0.2, **options}
        path = write(tmp_path / "rows.jsonl", options.pop("rows", rows()))
        cache = str(tmp_path / "cache")
        return make(TokenClassificationData, path, str(BASE), cache_dir=cache, **options)

    return data


def task(kind="decoder", **options):
    return make(TokenClassifier, **{"learning_rate": 1e-2, **MODELS[kind], **options})


def built(kind="decoder", labels=LABELS, **options):
    made = task(kind, labels=labels, **options)
    made.configure_model()
    return made


def test_the_loss_is_the_mean_over_tokens_with_a_tag(data):
    made, batch = built().eval(), next(iter(data().train_dataloader()))
    with torch.no_grad():
        loss = made.training_step(batch, 0)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        chances = made(**inputs).logits.log_softmax(-1)
    labelled = batch["word_starts"].bool()
    assert 0 < labelled.sum() < batch["attention_mask"].sum()
    picked = chances[labelled].gather(-1, batch["labels"][labelled][:, None])
    torch.testing.assert_close(loss, -picked.mean())


class Said(torch.nn.Module):
    """Generates the given text."""

    def __init__(self, numbers, count):
        super().__init__()
        self.logits = torch.nn.functional.one_hot(torch.tensor(numbers), count).float()

    def forward(self, input_ids, attention_mask, labels=None):
        loss = None
        if labels is not None:
            flat = self.logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(flat, labels.flatten())
        return type("Output", (), {"logits": self.logits, "loss": loss})


def batch(labels, starts):
    ones = torch.ones(len(labels), len(labels[0]), dtype=torch.int64)
    words = [[f"w{i}" for i in range(sum(row))] for row in starts]
    return {
        "input_ids": ones,
        "attention_mask": ones,
        "labels": torch.tensor(labels),
        "word_starts": torch.tensor(starts),
        "words": words,
    }


def test_spans_are_scored_in_words_also_where_all_tokens_are_trained():
    made = built()
    # Two words of two tokens each, a name; then a word alone.
    given = batch([[0, 1, 1, 1, 2]], [[1, 0, 1, 0, 1]])
    # The second tokens of the words are wrong, which says nothing about the words.
    made.model = Said([[0, 2, 1, 2, 2]], 3)
    made.evaluate(given)
    found = {name: float(value) for name, value in made.results().items()}
    right = -torch.tensor([1.0, 0, 0]).log_softmax(0)
    assert found.pop("loss") == pytest.approx(float((3 * right[0] + 2 * right[1]) / 5))
    assert found == {"accuracy": 1.0, "precision": 1.0, "recall": 1.0, "f1": 1.0}
    made.model = Said([[0, 1, 2, 1, 2]], 3)
    made.evaluate(given)
    found = {name: float(value) for name, value in made.results().items()}
    # Of two answers one has the wrong end, and of six words one is wrong.
    assert found["accuracy"] == pytest.approx(5 / 6)
    assert found["f1"] == found["precision"] == found["recall"] == 0.5
    (said,) = made.predict_step(given, 0)
    assert said == {
        "words": ["w0", "w1", "w2"],
        "tags": ["B-NAME", "O", "O"],
        "expected": ["B-NAME", "I-NAME", "O"],
    }


def test_other_tags_are_scored_by_the_mean_over_tags():
    made = built(labels=["A", "B", "C"])
    made.model = Said([[0, 0, 1, 1]], 3)
    made.evaluate(batch([[0, 1, 1, -100]], [[1, 1, 1, 0]]))
    found = {name: float(value) for name, value in made.results().items()}
    # A: 1 right, 1 too many; B: 1 right, 1 missing; C: in neither, and left out.
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert "f1" not in found


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("kind", MODELS)
def test_adapters_and_the_new_head_learn_and_nothing_else(kind, method, data, tmp_path):
    heads = {"model.score.weight", "model.score.bias"} if kind == "decoder" else HEADS[kind]
    found = data()
    metrics, predictions, again, same = fit_and_reload(task(kind), found, method, heads, tmp_path)
    if kind == "decoder":
        assert metrics["val_f1"] > 0.9
        assert metrics["val_accuracy"] > 0.9
    known = {tuple(row["tokens"]): row["tags"] for row in rows()}
    assert len(predictions) == len(found.read().splits["validation"])
    assert all(known[tuple(row["words"])] == row["expected"] for row in predictions)
    assert again.labels == LABELS
    assert same == predictions
