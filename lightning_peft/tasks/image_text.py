"""Supervised fine-tuning of image-text-to-text models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from lightning_peft.data.encoding import IGNORED
from lightning_peft.data.end_tokens import end_tokens
from lightning_peft.errors import ConfigError, UnsupportedError
from lightning_peft.generation import generate
from lightning_peft.plugin.injection_settings import AdapterDefaults
from lightning_peft.tasks.causal_lm import MAX_NEW_TOKENS, CausalLM
from lightning_peft.tasks.heads import keep_in_float32
from lightning_peft.tasks.samples import GeneratedSample

# Projectors that are inside of the vision part, as in Qwen-VL and Granite-Docling.
_MERGERS = ("merger", "deepstack_merger_list", "connector")
# Those next to it that are a model of transformers too are known by their name.
_PROJECTORS = ("projector", "connector", "merger", "aligner")


@dataclass(frozen=True)
class ModelParts:
    """Names of the parts of an image-text-to-text model.

    ``vision`` is without a projector that is inside of a part; ``output`` are the output
    embeddings, if they are a layer of their own.
    """

    vision: tuple[str, ...]
    projectors: tuple[str, ...]
    output: str | None = None


class ImageTextToText(CausalLM):
    """A language model that sees images, trained on the tokens that carry a label.

    Logs what :class:`CausalLM <lightning_peft.tasks.causal_lm.CausalLM>` logs. The model computes
    its own loss, with the logits of all tokens of a batch.

    With a strategy or callback of this package, the linear layers of the language part get
    adapters, the projector is trained in full, in float32, and stored with them, and the vision
    part is frozen and stays in the dtype that it was loaded in.

    Args:
        model: As of :class:`PretrainedTask <lightning_peft.tasks.pretrained.PretrainedTask>`.
        adapt_vision: Give adapters to the vision part too, and quantize it as the rest. Names of
            it in ``target_modules`` do the same.
        projector: ``"full"`` trains the projector in full, ``"adapters"`` gives it adapters as the
            language part, ``"frozen"`` leaves it as it is.
        **options: Keyword arguments of ``PretrainedTask``.

    Raises:
        ConfigError: If arguments contradict each other.
    """

    auto_class = AutoModelForImageTextToText

    def __init__(
        self,
        model: str,
        adapt_vision: bool = False,
        projector: Literal["full", "adapters", "frozen"] = "full",
        **options: Any,
    ) -> None:
        super().__init__(model, **options)

    def setup(self, stage: str) -> None:
        """Checks the tokens of the data against the model, before it is loaded."""
        config: Any = self.model_config()
        if config.get_text_config().is_encoder_decoder:
            raise UnsupportedError(
                f"{self.hparams['model']!r} is a {config.model_type} model, whose decoder writes "
                "what an encoder reads. Labels are for models that go on with their prompt: take "
                "one such as Qwen-VL, SmolVLM, Gemma 3 or LLaVA."
            )
        images = getattr(self._datamodule, "image_tokens", None)
        named = (getattr(config, f"image_token_{name}", None) for name in ("id", "index"))
        expected = next((token for token in named if token is not None), None)
        if images is not None and expected is not None and expected not in images.ids:
            raise ConfigError(
                f"The processor writes images as the tokens {images.ids}, and "
                f"{self.hparams['model']!r} takes the token {expected} for one. Give the data the "
                f"model's own: processor={self.hparams['model']!r}."
            )

    def prepare_model(self, model: Any) -> None:
        """Puts a projector that is trained in full in float32."""
        if self.hparams["projector"] == "full":
            projectors = map(model.get_submodule, model_parts(model).projectors)
            # Models write its output over the embeddings of text.
            keep_in_float32(projectors, reader=model.get_input_embeddings())

    def adapter_defaults(self) -> AdapterDefaults:
        """Returns the parts that get no adapters, and those that are trained in full."""
        skeleton = self._skeleton()
        parts = model_parts(skeleton)
        hparams = self.hparams
        vision = () if hparams["adapt_vision"] else parts.vision
        projector = hparams["projector"]
        if projector != "frozen":
            self._check_projector(skeleton, parts.projectors)
        left = vision if projector == "adapters" else (*vision, *parts.projectors)
        return AdapterDefaults(
            left=left,
            saved=parts.projectors if projector == "full" else (),
            # transformers quantizes it where it is given names that it shall not quantize.
            dense=() if parts.output is None else (parts.output,),
            inside=tuple(
                name
                for part in left
                for name, _ in skeleton.get_submodule(part).named_modules(prefix=part)
            ),
        )

    def _skeleton(self) -> Any:
        """Returns the model without values."""
        hparams = self.hparams
        config: Any = self.model_config()
        code = (getattr(config, "auto_map", None) or {}).get(self.auto_class.__name__)
        with torch.device("meta"):
            if code is None or not hparams["trust_remote_code"]:
                return self.auto_class.from_config(config, trust_remote_code=False)
            # from_config would take the code of the newest commit.
            name, revision = hparams["model"], hparams["revision"]
            return get_class_from_dynamic_module(code, name, revision=revision)(config)

    def _check_projector(self, skeleton: Any, names: tuple[str, ...]) -> None:
        wanted, model = self.hparams["projector"], self.hparams["model"]
        if not names:
            raise UnsupportedError(
                f"projector={wanted!r}, and {model!r} ({type(skeleton).__name__}) has no layer "
                "between vision and language that is known as one. Set projector: frozen, or name "
                "its layers in target_modules or modules_to_save."
            )
        layers = [one for name in names for one in skeleton.get_submodule(name).modules()]
        if wanted == "adapters" and not any(isinstance(one, nn.Linear) for one in layers):
            raise UnsupportedError(
                f"projector='adapters', and the projector of {model!r} ({', '.join(names)}) has no "
                "linear layer that an adapter could go to. Set projector: full, or "
                "projector: frozen."
            )

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Returns prompt, expected and generated text of each row."""
        if not isinstance(batch, list):
            raise UnsupportedError(
                "predict takes the rows of lightning_peft.ImageTextData: in a padded batch it is "
                "not known which image is of which row. Give the Trainer such a datamodule."
            )
        return [asdict(sample) for sample in self.generate_samples(batch, MAX_NEW_TOKENS)]

    def generate_samples(
        self, rows: list[dict[str, Any]], max_new_tokens: int
    ) -> list[GeneratedSample]:
        """Returns the model's answers to the prompts of ``rows``: all before the first label."""
        return [self._answer(row, max_new_tokens) for row in rows]

    def _answer(self, row: dict[str, Any], max_new_tokens: int) -> GeneratedSample:
        data = self._datamodule
        tokenizer = data.tokenizer
        ends = end_tokens(self.model, tokenizer)
        inputs = data.prompt_of(row)
        first = inputs["input_ids"].shape[1]
        (tokens,) = generate(
            self.model,
            inputs,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=data.pad_token_id,
        )
        new_tokens = tokens[first:].tolist()
        expected = [token for token in row["labels"] if token != IGNORED]
        prompt = "".join(span.text for span in data.render_row(row) if not span.trained)
        answer, written = (
            tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (expected, new_tokens)
        )
        cut = len(new_tokens) >= max_new_tokens and new_tokens[-1] not in ends
        return GeneratedSample(prompt, answer, written, cut)


def model_parts(model: Any) -> ModelParts:
    """Returns the parts of an image-text-to-text model, by what stands next to its decoder."""
    names = {id(child): name for name, child in model.named_modules()}
    decoder = names[id(model.get_decoder())]
    above = model.get_submodule(decoder.rpartition(".")[0])
    vision: list[str] = []
    projectors: list[str] = []
    for child in above.children():
        name = names[id(child)]
        if name == decoder or child is model.get_output_embeddings() or not _has_weights(child):
            continue
        last = name.rpartition(".")[2]
        sees = isinstance(child, PreTrainedModel) and not any(one in last for one in _PROJECTORS)
        (vision if sees else projectors).append(name)
    seeing: list[str] = []
    for name in vision:
        part = model.get_submodule(name)
        inner = [last for last in _MERGERS if hasattr(part, last)]
        projectors += [f"{name}.{last}" for last in inner]
        rest = [last for last, child in part.named_children() if _has_weights(child)]
        seeing += [f"{name}.{last}" for last in rest if last not in inner] if inner else [name]
    output = names.get(id(model.get_output_embeddings()))
    # PEFT trains no list in full, but what is in one.
    single = [one for name in projectors for one in _without_list(model, name)]
    return ModelParts(tuple(seeing), tuple(single), output)


def _without_list(model: nn.Module, name: str) -> list[str]:
    part = model.get_submodule(name)
    children = [f"{name}.{last}" for last, _ in part.named_children()]
    return children if isinstance(part, nn.ModuleList) else [name]


def _has_weights(child: nn.Module) -> bool:
    return next(child.parameters(), None) is not None
