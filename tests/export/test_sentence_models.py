"""Folders for sentence-transformers: loaded by it, they give what the trained model gives."""

import json

import pytest
import torch
from sentences import EMBEDDING, RERANKER, model_in, random_adapter, rows_of
from transformers import AutoModelForSequenceClassification

from lightning_peft.cli import main
from lightning_peft.errors import UnsupportedError
from lightning_peft.export.adapters import find_adapter
from lightning_peft.export.base import find_base
from lightning_peft.export.request import ExportRequest
from lightning_peft.export.sentence_models import as_sentence_transformers
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.tasks.embedding import SentenceEmbedder

package = pytest.importorskip("sentence_transformers", reason="loads with it")


def exported(folder, adapter, base, **options):
    found = find_adapter(str(adapter))
    request = ExportRequest(found, find_base(base), folder, None, {"measure": False}, **options)
    return as_sentence_transformers(request)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", ["bert", pytest.param("llama", marks=pytest.mark.long)])
def test_an_embedding_model_gives_the_same_embeddings(kind, separate, tmp_path):
    base = model_in(tmp_path / "base", kind)
    model = random_adapter(tmp_path / "adapter", base, EMBEDDING)
    report = exported(tmp_path / "out", tmp_path / "adapter", base, separate_adapter=separate)
    assert ("merge" in report) is not separate
    loaded = package.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    settings = EMBEDDING["output_settings"]
    task = bind_to_lightning(SentenceEmbedder, ROOTS[1])(base, **settings)
    task._settle(model.config)
    task.model = model
    texts = [row["anchor"] for row in rows_of("pairs", 5)]
    for prompt, theirs in (
        ("ask: ", loaded.encode_query(texts)),
        ("doc: ", loaded.encode_document(texts)),
    ):
        given = loaded.tokenizer(
            [prompt + text for text in texts], padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            ours = task.embed(given["input_ids"], given["attention_mask"])
        torch.testing.assert_close(ours, torch.tensor(theirs), rtol=0, atol=1e-5)
    assert loaded.max_seq_length == 20
    assert loaded.similarity_fn_name == "cosine"
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-sim")
    assert "SentenceTransformer('out')" in card


def test_the_longest_text_is_that_of_training(tmp_path):
    # Its files say 32.
    base = model_in(tmp_path / "base", "bert", ("Transformer", "Pooling"))
    random_adapter(tmp_path / "adapter", base, EMBEDDING)
    exported(tmp_path / "out", tmp_path / "adapter", base, separate_adapter=True)
    written = json.loads((tmp_path / "out" / "sentence_bert_config.json").read_text())
    assert written["max_seq_length"] == 20


def test_a_reranker_gives_the_same_scores(tmp_path):
    base = model_in(tmp_path / "base", "bert", ("Transformer", "Pooling"))
    cls = AutoModelForSequenceClassification
    model = random_adapter(tmp_path / "adapter", base, RERANKER, cls, num_labels=1)
    exported(tmp_path / "out", tmp_path / "adapter", base)
    loaded = package.CrossEncoder(str(tmp_path / "out"), device="cpu")
    pairs = [(row["anchor"], row["positive"]) for row in rows_of("pairs", 5)]
    given = loaded.tokenizer(pairs, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**given).logits[:, 0].sigmoid()
    assert len(expected.unique()) == 5
    torch.testing.assert_close(torch.tensor(loaded.predict(pairs)), expected, rtol=0, atol=1e-5)
    # What the base was does not stand next to what it is now.
    assert not (tmp_path / "out" / "modules.json").exists()
    assert "CrossEncoder('out')" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UnsupportedError, match="CrossEncoder loads models, not adapters"):
        exported(tmp_path / "other", tmp_path / "adapter", base, separate_adapter=True)
    assert not (tmp_path / "other").exists()


def test_other_adapters_are_refused(tmp_path, capsys):
    base = model_in(tmp_path / "base")
    random_adapter(tmp_path / "adapter", base, {"task": "mine.Task"})
    with pytest.raises(UnsupportedError, match=r"adapter is of Task, and sentence-transformers"):
        exported(tmp_path / "out", tmp_path / "adapter", base)
    assert not (tmp_path / "out").exists()
    assert main(["chat", str(tmp_path / "adapter")]) != 0
    assert "was trained on a BertModel, which generates no text" in capsys.readouterr().err
