"""The shipped base: loads offline, fits NF4 blocks, and scores what its record says."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.demo_base.architecture import CONTEXT
from tools.demo_base.pretrain import (
    BASE_PATH,
    batches,
    build_optimizers,
    document_loss,
    encode,
    main,
    pretrain,
    rate_share,
)

NF4_BLOCK = 64


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE_PATH)


@pytest.fixture(scope="module")
def record():
    return json.loads((BASE_PATH / "training_record.json").read_text("utf-8"))


def test_base_is_small_and_tied(model, record):
    size = sum(path.stat().st_size for path in BASE_PATH.iterdir())
    assert size < 10_000_000
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(weight.numel() for weight in model.parameters()) == record["parameters"]


def test_base_is_stored_in_bfloat16():
    stored = AutoModelForCausalLM.from_pretrained(BASE_PATH)
    assert {weight.dtype for weight in stored.parameters()} == {torch.bfloat16}


def test_every_linear_layer_fits_nf4_blocks(model):
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(layers) == 4 * 7 + 1
    sizes = {size for layer in layers for size in (layer.in_features, layer.out_features)}
    assert not [size for size in sizes if size % NF4_BLOCK]


def test_tokenizer_round_trip(tokenizer):
    text = "### Question:\nWhat does `textwrap.dedent` do?\n\n### Answer:\n\tnaïve 文\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.bos_token_id not in tokenizer(text, add_special_tokens=False)["input_ids"]
    special = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(special) == 3


def test_probe_losses_are_as_recorded(model, tokenizer, record):
    assert {probe["held_out"] for probe in record["probe"]} == {True, False}
    for probe in record["probe"]:
        loss, _ = document_loss(model, encode(tokenizer, probe["text"]))
        assert loss == pytest.approx(probe["loss"], rel=0.02), probe["text"]


def test_base_has_learned_its_text(record):
    untrained = torch.log(torch.tensor(record["config"]["vocab_size"])).item()
    assert record["final_train_loss"] < 0.5 * untrained
    assert record["held_out_loss"] < 0.7 * untrained


def test_batches_hold_every_document_once_per_epoch():
    documents = [torch.full((CONTEXT,), index) for index in range(64)]
    found = list(batches(documents, steps=8, seed=1, size=16))
    assert [batch.shape for batch in found] == [(16, CONTEXT)] * 8
    first, second = torch.cat(found[:4])[:, 0], torch.cat(found[4:])[:, 0]
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(64))
    assert first.tolist() != second.tolist()
    again = list(batches(documents, steps=8, seed=1, size=16))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_learning_rate_rises_and_falls():
    shares = [rate_share(step, 100) for step in range(100)]
    peak = shares.index(1.0)
    assert 0 < peak < 10
    assert shares[:peak] == sorted(shares[:peak])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert 0 < shares[-1] < 0.1


def test_every_weight_has_one_optimizer(model):
    groups = [group for optimizer in build_optimizers(model) for group in optimizer.param_groups]
    optimized = [id(weight) for group in groups for weight in group["params"]]
    assert sorted(optimized) == sorted(id(weight) for weight in model.parameters())


def test_pytorch_without_muon_is_named(model, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(RuntimeError, match=r"no torch\.optim\.Muon.*Upgrade PyTorch"):
        build_optimizers(model)


def test_no_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"steps=0: at least one.*--steps"):
        pretrain(tmp_path, steps=0)


@pytest.mark.long
def test_one_step_writes_a_loadable_base(tmp_path, capsys):
    main(["--out", str(tmp_path / "base"), "--steps", "1"])
    assert "held-out loss" in capsys.readouterr().out
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokens = tokenizer("textwrap.dedent", return_tensors="pt")
    assert made(**tokens).logits.shape[-1] == len(tokenizer)
