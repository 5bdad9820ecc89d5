"""Sentence embeddings: pooled as the files say, trained by the losses, evaluated on the split."""

import json
import logging
from importlib import import_module

import pytest
import torch
from sentences import data_in, model_in, rows_of, trainer_of
from transformers import AutoModel, AutoTokenizer

from lightning_peft.errors import ConfigError
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.tasks.embedding import SentenceEmbedder, pool

ALL = ("Transformer", "Pooling", "Normalize")


def task_of(name, **options):
    return bind_to_lightning(SentenceEmbedder, ROOTS[1])(name, learning_rate=1e-2, **options)


def callback_class():
    return import_module(ROOTS[1]).Callback


def loaded(name, **options):
    task = task_of(name, **options)
    task.configure_model()
    return task.eval()


@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling(side):
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    if side == "left":
        mask = mask.flip(1)
    first, last = ([0, 1], [2, 3]) if side == "right" else ([2, 3], [4, 5])
    assert pool(hidden, mask, "cls").tolist() == [first, [6, 7]]
    assert pool(hidden, mask, "lasttoken").tolist() == [last, [10, 11]]
    mean = [(a + b) / 2 for a, b in zip(first, last, strict=True)]
    assert pool(hidden, mask, "mean").tolist() == [mean, [8, 9]]


def test_what_the_files_do_not_say_is_chosen_and_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        encoder = loaded(model_in(tmp_path / "bert"))
        decoder = loaded(model_in(tmp_path / "llama", "llama"))
    plain = {"normalize": False, "similarity": "cosine"}
    assert encoder.output_settings == {"pooling": "mean", **plain}
    assert decoder.output_settings == {"pooling": "lasttoken", **plain}
    assert [r.getMessage() for r in caplog.records if "modules.json" in r.getMessage()] == [
        f"'{tmp_path / name}' has no modules.json, which says how embeddings are made: "
        f"pooling='{pooling}' and normalize=False are taken. Name them if they are to be others."
        for name, pooling in (("bert", "mean"), ("llama", "lasttoken"))
    ]
    given = loaded(model_in(tmp_path / "cls", "bert", ALL, pooling_mode_cls_token=True))
    assert given.output_settings == {"pooling": "cls", "normalize": True, "similarity": "cosine"}
    assert given.hparams["scale"] == 20
    assert loaded(str(tmp_path / "cls"), similarity="dot").hparams["scale"] == 1


LONG = pytest.mark.long
TRAINED = [
    ("qlora", "bert", "triples"),
    *(pytest.param("lora", "bert", kind, marks=LONG) for kind in ("pairs", "triples", "scores")),
    *(pytest.param("qlora", "bert", kind, marks=LONG) for kind in ("pairs", "scores")),
    *(pytest.param("lora", "llama", kind, marks=LONG) for kind in ("pairs", "triples", "scores")),
    *(pytest.param("qlora", "llama", kind, marks=LONG) for kind in ("pairs", "scores")),
]


@pytest.mark.parametrize(("kind", "model", "rows"), TRAINED)
def test_adapters_train_and_the_split_is_measured(kind, model, rows, tmp_path):
    name = model_in(tmp_path / "model", model)
    task, data = task_of(name), data_in(tmp_path, name, rows)
    trainer = trainer_of(kind, max_steps=-1, max_epochs=4, num_sanity_val_steps=-1)
    batch = data.collator()(list(data.rows("train")))
    measured = {}

    class Watch(callback_class()):
        def on_train_start(self, trainer, module):
            with torch.no_grad():
                measured["before"] = module.eval().losses(batch).mean()
            module.train()

    trainer.callbacks.append(Watch())
    trainer.fit(task, data)
    trained = {n for n, param in task.named_parameters() if param.requires_grad}
    assert trained
    assert all("lora_" in n and "pooler" not in n for n in trained)
    found = {n for n in trainer.callback_metrics if n.startswith("val_")}
    ranked = {"val_loss", "val_accuracy", "val_mrr", "val_masked"}
    assert found == ({"val_loss", "val_spearman"} if rows == "scores" else ranked)
    with torch.no_grad():
        assert task.eval().losses(batch).mean() < measured["before"]
    predicted = [row for part in trainer.predict(task, data) for row in part]
    texts = 3 if rows == "triples" else 2
    assert all(len(row["embeddings"]) == texts for row in predicted)
    assert all(-1 <= row["similarity"] <= 1.0001 for row in predicted)
    assert all(("score" in row) == (rows == "scores") for row in predicted)


def test_a_step_is_the_mean_over_the_rows_of_its_batches(tmp_path):
    """Each batch has its own negatives; rows of all batches count alike, also of a smaller one."""
    name = model_in(tmp_path / "model", "bert", ALL)
    data = data_in(tmp_path, name, "pairs", validation_share=0)
    rows = list(data.rows("train"))[:7]
    batches = [data.collator()(part) for part in (rows[:4], rows[4:])]
    task = task_of(name, schedule="constant")
    seen = {}

    class Watch(callback_class()):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.update(
                {n: p.grad.clone() for n, p in module.named_parameters() if p.requires_grad}
            )

    trainer = trainer_of("lora", max_steps=1, accumulate_grad_batches=2, callbacks=[Watch()])
    torch.manual_seed(3)
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(task, loader)
    other = task_of(name)
    torch.manual_seed(3)
    trainer_of("lora", max_steps=0).fit(
        other, torch.utils.data.DataLoader(batches, batch_size=None)
    )
    losses = torch.cat([other.losses(batch) for batch in batches])
    assert len(losses) == 7
    losses.mean().backward()
    assert trainer.callback_metrics["train_loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    expected = dict(other.named_parameters())
    assert seen.keys() == {n for n, p in expected.items() if p.requires_grad}
    for n, gradient in seen.items():
        torch.testing.assert_close(gradient, expected[n].grad, rtol=1e-3, atol=1e-6)


def test_arguments_and_data_that_cannot_work(tmp_path):
    name = model_in(tmp_path / "model")
    with pytest.raises(ConfigError, match="scale=0 is not above 0"):
        task_of(name, scale=0)
    rows = [{**row, "score": 5 * row["score"]} for row in rows_of("scores")]
    data = data_in(tmp_path, name, "scores")
    (tmp_path / "scores.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match=r"from -1 to 1, equal to scores, .* are from 0 to 5"):
        trainer_of(max_steps=0).fit(task_of(name, scored_loss="cosine"), data)
    t5 = {"model_type": "t5", "vocab_size": 64, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1}
    with pytest.raises(ConfigError, match="has an encoder and a decoder"):
        task_of("none", config=t5).configure_model()


def test_embeddings_are_those_of_sentence_transformers(tmp_path):
    transformers = pytest.importorskip("sentence_transformers", reason="compares with it")
    texts = [row["anchor"] for row in rows_of("pairs", 6)]
    kinds = [("bert", ALL, {}), ("bert", ALL[:2], {"pooling_mode_cls_token": True})]
    kinds += [("llama", ALL, {"pooling_mode_lasttoken": True})]
    for number, (kind, modules, pooling) in enumerate(kinds):
        name = model_in(tmp_path / str(number), kind, modules, **pooling)
        theirs = transformers.SentenceTransformer(name, device="cpu").encode(texts)
        encoded = AutoTokenizer.from_pretrained(name)(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            ours = loaded(name).embed(encoded["input_ids"], encoded["attention_mask"])
        torch.testing.assert_close(ours, torch.tensor(theirs), rtol=0, atol=1e-5)


def test_the_whole_loss_is_theirs(tmp_path):
    """From texts to the loss, with sentence-transformers' own collator and model."""
    package = pytest.importorskip("sentence_transformers", reason="compares with it")
    from sentence_transformers.sentence_transformer import losses

    name = model_in(
        tmp_path / "model", "bert", ALL, prompts={"query": "ask: ", "document": "doc: "}
    )
    data = data_in(tmp_path, name, "triples", validation_share=0)
    rows = list(data.read().splits["train"])[:6]
    batch = data.collator()(rows)
    with torch.no_grad():
        ours = loaded(name).losses(batch).mean()
    model = package.SentenceTransformer(name, device="cpu")
    given = [rows_of("triples")[row["row"] - 1] for row in rows]
    columns = [
        model.preprocess([prompt + row[column] for row in given])
        for column, prompt in (("anchor", "ask: "), ("positive", "doc: "), ("negative", "doc: "))
    ]
    with torch.no_grad():
        theirs = losses.MultipleNegativesRankingLoss(model)(columns, None)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_an_unused_pooler_is_part_of_the_base_and_gets_no_adapter(tmp_path):
    from lightning_peft import engine, inject

    name = model_in(tmp_path / "model")
    task = task_of(name)
    trainer_of("lora", max_steps=0).fit(task, data_in(tmp_path, name, "pairs"))
    entry = engine.record_of(task).parts["model"]
    assert not any("pooler" in target for target in entry.adapters["default"].targets)
    plain = AutoModel.from_pretrained(name)
    inject(plain, r=4)
    # Of the same base, whose summary of the first token is in its files.
    (other,) = engine.record_of(plain).parts.values()
    assert entry.base.digest() == other.base.digest()
