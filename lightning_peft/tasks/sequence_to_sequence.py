"""Summarisation, translation and other rewriting with encoder-decoder language models."""

from __future__ import annotations

from transformers import AutoModelForSeq2SeqLM

from lightning_peft.tasks.encoder_decoder import EncoderDecoderTask


class Seq2SeqLM(EncoderDecoderTask):
    """An encoder-decoder language model that is trained to write targets of sources.

    Logs ``val_loss`` (nats per target token, the end token among them), ``val_perplexity`` (its
    exponential), ``val_token_accuracy`` (share of target tokens that are the most likely one), and
    of generated text what ``metrics`` asks for: ``val_rouge1``, ``val_rouge2`` and ``val_rougeL``
    (F-measures), ``val_bleu``, ``val_chrf``, each from 0 to 1; and the same as ``test_...``.

    The arguments are those of
    :class:`EncoderDecoderTask <lightning_peft.tasks.encoder_decoder.EncoderDecoderTask>` and
    :class:`PretrainedTask <lightning_peft.tasks.pretrained.PretrainedTask>`.
    """

    auto_class = AutoModelForSeq2SeqLM
    metrics_by_default = ("rouge",)
    encoder_inputs = ("input_ids", "attention_mask")
