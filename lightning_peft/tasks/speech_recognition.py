"""Speech recognition with encoder-decoder models such as Whisper."""

from __future__ import annotations

from transformers import AutoModelForSpeechSeq2Seq

from lightning_peft.errors import ConfigError
from lightning_peft.tasks.encoder_decoder import EncoderDecoderTask


class SpeechRecognizer(EncoderDecoderTask):
    """A model that hears recordings and writes what is said.

    Logs ``val_loss`` (nats per token of the transcript, the tokens for language and end among
    them), ``val_perplexity``, ``val_token_accuracy``, and of generated transcripts ``val_wer`` and
    ``val_cer``: the share of words and of characters that are wrong, which may exceed 1; and the
    same as ``test_...``. Texts are compared as they are, with case and punctuation.

    Language and task are said once, to the :class:`SpeechData
    <lightning_peft.data.speech.SpeechData>`.

    The arguments are those of
    :class:`EncoderDecoderTask <lightning_peft.tasks.encoder_decoder.EncoderDecoderTask>` and
    :class:`PretrainedTask <lightning_peft.tasks.pretrained.PretrainedTask>`.
    """

    auto_class = AutoModelForSpeechSeq2Seq
    encoder_inputs = ("input_features", "input_values", "attention_mask")
    metrics_by_default = ("wer", "cer")

    def setup(self, stage: str) -> None:
        """Checks that the model hears what the feature extractor makes."""
        super().setup(stage)
        extractor = getattr(self._datamodule, "extractor", None)
        features = getattr(extractor, "feature_size", None)
        heard = getattr(self.model_config(), "num_mel_bins", None)
        if None not in (features, heard) and features != heard:
            raise ConfigError(
                f"The feature extractor makes {features} mel bins, and {self.hparams['model']!r} "
                f"takes {heard}. Give the data the model's own: "
                f"processor={self.hparams['model']!r}."
            )

    def configure_model(self) -> None:
        """Loads the model, and checks that it gets a language if it knows several."""
        super().configure_model()
        assert self.model is not None
        settings = self.generation()
        several = bool(getattr(self.model.generation_config, "is_multilingual", False))
        if several and "language" not in settings and self._datamodule is not None:
            raise ConfigError(
                f"{self.hparams['model']!r} hears many languages. Without one it would be trained "
                "to write no language token, and asked to write after one. Say which with "
                "data.language."
            )
        if settings and not several:
            raise ConfigError(
                f"{settings} is given, and {self.hparams['model']!r} knows no languages and tasks. "
                "Leave them out."
            )
