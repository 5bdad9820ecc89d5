"""Encoder-decoder language models: loss, generation and metrics, with LoRA and QLoRA."""

import json
from runpy import run_path

import pytest
import short_runs
import torch
from torch import nn

from lightning_peft import LoRAStrategy, QLoRAStrategy
from lightning_peft.data.sequence_to_sequence import Seq2SeqData
from lightning_peft.demo.run import BASE
from lightning_peft.errors import ConfigError, UnsupportedError
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.tasks.encoder_decoder import Seq2SeqLM

T5 = {
    "model_type": "t5", "vocab_size": 4096, "d_model": 64, "d_kv": 16, "d_ff": 96,
    "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip
ROWS = [
    {"source": f"what comes after {i}", "target": f"{i + 1}" + " it is" * (i % 3)}
    for i in range(10)
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{**row, "split": "validation" if i > 6 else "train"} for i, row in enumerate(ROWS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return bind_to_lightning(Seq2SeqData, ROOTS[1])(
        str(path), str(BASE), batch_size=4, cache_dir=str(tmp_path / "cache")
    )


def task(**options):
    options = {"config": T5, "dtype": "float32", "max_new_tokens": 5, **options}
    return bind_to_lightning(Seq2SeqLM, ROOTS[1])("tiny", **options)


def trainer(tmp_path, **options):
    return short_runs.trainer(default_root_dir=tmp_path, **{"max_steps": 2, **options})


def test_the_loss_is_the_mean_over_target_tokens(data):
    made = task()
    made.configure_model()
    made.model.eval()
    batch = next(iter(data.loader("train")))
    labels = batch["labels"]
    assert (labels == -100).any()
    # The decoder reads the targets moved by one place, after its start token.
    start = torch.full_like(labels[:, :1], T5["decoder_start_token_id"])
    decoder = torch.cat([start, labels[:, :-1].clamp(min=0)], 1)
    with torch.no_grad():
        logits = made.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=decoder,
        ).logits
        picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        trained = labels != -100
        made.log = lambda *_, **__: None
        torch.testing.assert_close(made.training_step(batch, 0), -picked[trained].mean())
        # What stands in padded places does not count.
        longer = {**batch, "labels": nn.functional.pad(labels, (0, 3), value=-100)}
        torch.testing.assert_close(made.training_step(longer, 0), made.training_step(batch, 0))


def test_evaluation_is_that_of_all_rows_together(data, tmp_path):
    made = task(generate_limit=2)
    found = trainer(tmp_path).validate(made, data, verbose=False)[0]
    losses, right = [], []
    for row in [data.read().splits["validation"][place] for place in range(3)]:
        batch = data.collator()([row])
        with torch.no_grad():
            logits = made(**{n: v for n, v in batch.items() if torch.is_tensor(v)}).logits[0]
        losses.append(nn.functional.cross_entropy(logits, batch["labels"][0], reduction="none"))
        right.append(logits.argmax(-1) == batch["labels"][0])
    loss = torch.cat(losses).mean()
    assert found["val_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert found["val_perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)
    assert found["val_token_accuracy"] == pytest.approx(torch.cat(right).float().mean().item())


@pytest.mark.parametrize(("limit", "texts"), [(2, [2]), (64, [3]), (0, [])])
def test_text_is_generated_for_the_first_rows(limit, texts, data, tmp_path, monkeypatch):
    made = task(generate_limit=limit, metrics=["rouge", "chrf"])
    said = [row["target"] for row in ROWS[7:]]
    asked = []

    def say(batch, max_new_tokens):
        asked.append(len(batch["target"]))
        assert max_new_tokens == 5
        return batch["target"]

    monkeypatch.setattr(made, "generate_texts", say)
    for _ in range(2):
        found = trainer(tmp_path).validate(made, data, verbose=False)[0]
    assert asked == texts * 2
    assert len(said) == 3
    assert ("val_rougeL" in found) == bool(limit)
    if limit:
        assert found["val_rougeL"] == found["val_chrf"] == 1


def test_metrics_compare_with_the_text_of_the_row(data, tmp_path, monkeypatch):
    made = task(metrics=["cer"])
    collate = data.collator()

    def lossy(rows):
        # As if the tokenizer could write nothing of the targets but their end.
        batch = collate(rows)
        return {**batch, "labels": torch.full_like(batch["labels"][:, :1], 2)}

    monkeypatch.setattr(data, "collator", lambda: lossy)
    monkeypatch.setattr(made, "generate_texts", lambda batch, _: ["" for _ in batch["target"]])
    assert trainer(tmp_path).validate(made, data, verbose=False)[0]["val_cer"] == 1


def test_generation_is_greedy_and_leaves_the_modes(data, tmp_path):
    made = task()
    run = trainer(tmp_path)
    run.validate(made, data, verbose=False)
    made.train()
    rows = [data.read().splits["validation"][place] for place in range(2)]
    samples = made.generate_samples(rows, max_new_tokens=4)
    assert all(module.training for module in made.model.modules())
    assert [sample.prompt for sample in samples] == [row["source"] for row in ROWS[7:9]]
    assert [sample.expected for sample in samples] == [row["target"] for row in ROWS[7:9]]
    made.eval()
    ids = torch.tensor([rows[0]["input_ids"]])
    written = [T5["decoder_start_token_id"]]
    with torch.no_grad():
        for _ in range(4):
            logits = made.model(input_ids=ids, decoder_input_ids=torch.tensor([written])).logits
            written.append(int(logits[0, -1].argmax()))
    expected = data.tokenizer.decode(written, skip_special_tokens=True).strip()
    assert samples[0].generated == expected
    rows = [row for batch in run.predict(made, data) for row in batch]
    assert [row["target"] for row in rows] == [row["target"] for row in ROWS[7:]]
    assert json.loads(json.dumps(rows))[0].keys() == {"source", "target", "prediction"}


@pytest.mark.parametrize("strategy", [LoRAStrategy, QLoRAStrategy])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_strategies_train_it_and_nothing_else_moves(strategy, checkpointing, data, tmp_path):
    made = task(learning_rate=1e-2)
    given = strategy(r=4, gradient_checkpointing=checkpointing, announce=False, verify="cheap")
    start = short_runs.values()
    run = trainer(tmp_path, strategy=given, max_steps=4, callbacks=[start])
    run.fit(made, data)
    moved = short_runs.changed(start.before, made)
    assert moved
    assert all("lora_" in name for name in moved)
    assert {name.split(".")[1] for name in moved} == {"encoder", "decoder"}
    assert torch.isfinite(run.callback_metrics["val_loss"])
    assert len(made.generate_samples([data.read().splits["train"][0]], 3)) == 1


def test_float16_is_refused_for_t5_before_anything_is_loaded(data, tmp_path):
    made = task()
    run = trainer(tmp_path)
    object.__setattr__(made, "_trainer", run)
    run.strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(UnsupportedError, match="overflow float16"):
        made.setup("fit")
    half = task(dtype="float16")
    with pytest.raises(UnsupportedError, match="t5 model, and the run is in 'float16'"):
        trainer(tmp_path).fit(half, data)
    assert half.model is None


def test_what_cannot_be_evaluated_is_reported_first(data, tmp_path):
    with pytest.raises(ConfigError, match="generate_limit=-1.*'rogue'. are none of rouge"):
        task(metrics=["rogue"], generate_limit=-1)
    with pytest.raises(ConfigError, match="no datamodule with a tokenizer"):
        trainer(tmp_path).fit(task(), data.loader("train"))
    trainer(tmp_path).fit(task(generate_limit=0), data.loader("train"))


@pytest.mark.parametrize("name", ["notices", "english_german"])
def test_the_texts_of_the_small_recipes_are_as_they_are_made(name, tmp_path):
    shipped = BASE.parents[2] / "recipes" / "small" / "data"
    run_path(str(shipped / f"{name}.py"))["main"](tmp_path)
    assert (tmp_path / f"{name}.jsonl").read_bytes() == (shipped / f"{name}.jsonl").read_bytes()
