"""Speech recognition: loss, transcripts, error rates and languages, with LoRA and QLoRA."""

import io
import json
from importlib import import_module
from runpy import run_path

import numpy as np
import pytest
import short_runs
import torch
from models import whisper_tokenizer
from pyarrow import parquet

from lightning_peft import LoRAStrategy, QLoRAStrategy
from lightning_peft.data.audio import decode
from lightning_peft.data.speech import SpeechData
from lightning_peft.demo.run import BASE
from lightning_peft.errors import ConfigError
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.tasks.speech_recognition import SpeechRecognizer

SHIPPED = BASE.parents[2] / "recipes" / "small" / "data" / "telephone_keys.parquet"
HEARD = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 16, "chunk_length": 1}
WHISPER = {
    "model_type": "whisper", "vocab_size": 4096, "num_mel_bins": 16, "d_model": 32,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "max_source_positions": 50, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": [],
    "begin_suppress_tokens": [], "init_std": 0.3,
}  # fmt: skip


@pytest.fixture
def data(tmp_path):
    return bind_to_lightning(SpeechData, ROOTS[1])(
        str(SHIPPED), str(BASE), HEARD, limit=20, validation_share=0.3, batch_size=4,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


def task(**options):
    options = {"config": WHISPER, "dtype": "float32", "max_new_tokens": 5, **options}
    return bind_to_lightning(SpeechRecognizer, ROOTS[1])("tiny", **options)


def trainer(tmp_path, **options):
    return short_runs.trainer(default_root_dir=tmp_path, **{"max_steps": 3, **options})


def test_the_loss_is_the_mean_over_transcript_tokens(data):
    made = task()
    made.configure_model()
    made.model.eval()
    made.log = lambda *_, **__: None
    batch = next(iter(data.loader("train")))
    labels = batch["labels"]
    assert (labels == -100).any()
    start = torch.full_like(labels[:, :1], WHISPER["decoder_start_token_id"])
    decoder = torch.cat([start, labels[:, :-1].clamp(min=0)], 1)
    features = batch["input_features"]
    with torch.no_grad():
        logits = made.model(input_features=features, decoder_input_ids=decoder).logits
        picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        expected = -picked[labels != -100].mean()
        torch.testing.assert_close(made.training_step(batch, 0), expected)


def test_error_rates_are_of_generated_transcripts(data, tmp_path, monkeypatch):
    made = task()
    said = data.read().splits["validation"]["target"]
    words = sum(len(text.split()) for text in said)
    # Without the last word of each, of which there are as many as rows.
    monkeypatch.setattr(
        made, "generate_texts", lambda batch, _: [t.rpartition(" ")[0] for t in batch["target"]]
    )
    found = trainer(tmp_path).validate(made, data, verbose=False)[0]
    assert found["val_wer"] == pytest.approx(len(said) / words)
    characters = sum(len(text) for text in said)
    lost = sum(len(text) - len(text.rpartition(" ")[0]) for text in said)
    assert found["val_cer"] == pytest.approx(lost / characters)


@pytest.mark.parametrize("strategy", [LoRAStrategy, QLoRAStrategy])
def test_both_strategies_train_it_and_it_transcribes(strategy, data, tmp_path):
    made, start = task(learning_rate=1e-2), short_runs.values()
    given = strategy(r=4, gradient_checkpointing=True, announce=False, verify="cheap")
    run = trainer(tmp_path, strategy=given, callbacks=[start])
    run.fit(made, data)
    moved = short_runs.changed(start.before, made)
    assert moved
    assert all("lora_" in name for name in moved)
    rows = [row for batch in run.predict(made, data) for row in batch]
    assert [row["target"] for row in rows] == data.read().splits["validation"]["target"]
    assert rows[0]["source"].endswith(".wav")
    assert json.loads(json.dumps(rows)) == rows
    (sample,) = made.generate_samples([data.read().splits["validation"][0]], 5)
    assert sample.expected == rows[0]["target"]
    assert sample.generated == rows[0]["prediction"]


@pytest.fixture
def many(tmp_path):
    """Recordings for a tokenizer, and a recognizer for the same three languages."""
    tokenizer = whisper_tokenizer()
    tokenizer.save_pretrained(tmp_path / "whisper")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    start = {"decoder_start_token_id": ids["<|startoftranscript|>"], "eos_token_id": 0}

    def make(**asked):
        made = task(config={**WHISPER, **start})
        made.configure_model()
        for name, value in {
            "is_multilingual": True,
            "lang_to_id": {token: ids[token] for token in ("<|en|>", "<|zh|>", "<|de|>")},
            "task_to_id": {name: ids[f"<|{name}|>"] for name in ("transcribe", "translate")},
            "no_timestamps_token_id": ids["<|notimestamps|>"],
        }.items():
            setattr(made.model.generation_config, name, value)
        data = bind_to_lightning(SpeechData, ROOTS[1])(
            str(SHIPPED), str(tmp_path / "whisper"), HEARD, limit=20, validation_share=0.3,
            cache_dir=str(tmp_path / "cache"), **asked,
        )  # fmt: skip
        return made, data

    return make


def test_generation_begins_as_the_labels_do(many, tmp_path):
    made, data = many(language="german", task="translate")
    begun = []

    class Decoded(import_module(ROOTS[1]).Callback):
        def on_predict_start(self, trainer, module):
            decoder = module.model.model.decoder
            decoder.register_forward_pre_hook(
                lambda _, args, named: begun.append(named["input_ids"]), with_kwargs=True
            )

    trainer(tmp_path, callbacks=[Decoded()]).predict(made, data)
    labels = data.read().splits["validation"]["labels"]
    start = made.model.config.decoder_start_token_id
    assert begun[0].tolist() == [[start, *labels[0][:3]]] * len(begun[0])
    assert data.tokenizer.decode(labels[0][:3]) == "<|de|><|translate|><|notimestamps|>"


def test_languages_have_to_fit_the_model(many, data, tmp_path):
    made, no_language = many()
    with pytest.raises(ConfigError, match="hears many languages(.|\n)*data.language"):
        trainer(tmp_path).fit(made, no_language)
    _, language = many(language="de")
    one = task(config={**WHISPER, "eos_token_id": 0})
    with pytest.raises(ConfigError, match="'de', .* 'tiny' knows no languages and tasks"):
        trainer(tmp_path).fit(one, language)
    with pytest.raises(ConfigError, match="makes 16 mel bins, and 'tiny' takes 8"):
        trainer(tmp_path).fit(task(config={**WHISPER, "num_mel_bins": 8}), data)


def test_the_shipped_recordings_are_as_they_are_made():
    rows = parquet.read_table(SHIPPED).to_pylist()
    made = run_path(str(SHIPPED.with_suffix(".py")))
    again = list(made["rows"]())
    assert [row["text"] for row in rows] == [row["text"] for row in again]
    for row, other in zip(rows, again, strict=True):
        first, second = (decode(found["audio"]["bytes"])[0] for found in (row, other))
        # A sine may be rounded to the next of 256 levels on another processor.
        assert np.abs(first - second).max() <= 1 / 128
    # The strongest two frequencies of the first key are those of a telephone.
    sound, rate = decode(rows[0]["audio"]["bytes"])
    first = sound[: 40 * rate // 1000]
    spectrum = np.abs(np.fft.rfft(first * np.hanning(len(first)), n=rate))
    low = int(spectrum[:1000].argmax())
    high = 1000 + int(spectrum[1000:2000].argmax())
    wanted = made["KEYS"][rows[0]["text"].split()[0]]
    assert (low, high) == pytest.approx(wanted, abs=15)
    assert io.BytesIO(rows[0]["audio"]["bytes"]).read(4) == b"RIFF"
