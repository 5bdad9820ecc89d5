"""Registry of tasks.

The command line, the planner, exports and the page read these entries: a new task is an entry, its
LightningModule, a recipe, a docs page and its texts. Nothing heavy is imported here, so that tasks
can be listed by a process that never loads torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lightning_peft.errors import ConfigError

# A shape of rows, and the fields of it that a form offers.
Shapes = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class TaskSpec:
    """One task.

    Attributes:
        name: That of its recipes, ``NAME-lora``, ``NAME-qlora`` and ``small/NAME``.
        module: Class path of its LightningModule.
        data: Class path of its data module.
        shapes: Shapes of rows that it takes, with the fields that each needs or may have.
        selector: Path of a config value and its start, where several tasks share the classes.
        auto_class: Class of transformers that loads its bases; ``None`` for the base's own.
        reader: Class of transformers that makes its inputs; ``None`` where nothing does.
        processor_argument: Argument of the data module that names that tokenizer or processor.
        family: Tasks of one family train the same kinds of models.
        head: ``"labels"`` where the base gets a head for the labels of the data, ``"scalar"`` for
            one of a single score; ``None`` for the head of the base.
        replaces_head: Whether bases come with a head for labels of their own.
        label_per: What has a label: a ``"row"`` or a ``"token"``; ``None`` for neither.
        generates: Whether its model generates text, so that samples can be logged.
        chats: Whether its model holds conversations.
        sees: Whether questions in them may come with images.
        chat_template: Whether a chat template writes its rows.
        sentence_class: Class of sentence-transformers that loads its exported models.
        sequences_per_row: Sequences of the model in a row of the data, for the planner; 0 where
            memory is not predicted.
        chunked_logits: Whether logits are computed for a chunk of tokens at a time.
        metric: What the best checkpoint is chosen by, and ``"min"`` or ``"max"``.
        defaults: Config values that differ from those of most tasks, by path.
    """

    name: str
    module: str
    data: str
    shapes: Shapes = ()
    selector: tuple[str, str] | None = None
    auto_class: str | None = None
    reader: str | None = "AutoTokenizer"
    processor_argument: str | None = "tokenizer"
    family: str = ""
    head: Literal["labels", "scalar"] | None = None
    replaces_head: bool = False
    label_per: Literal["row", "token"] | None = None
    generates: bool = False
    chats: bool = False
    sees: bool = False
    chat_template: bool = False
    sentence_class: Literal["SentenceTransformer", "CrossEncoder"] | None = None
    sequences_per_row: int = 0
    chunked_logits: bool = False
    metric: tuple[str, str] = ("val_loss", "min")
    defaults: tuple[tuple[str, Any], ...] = ()

    @property
    def class_name(self) -> str:
        """Name of the LightningModule's class."""
        return self.module.rpartition(".")[2]

    @property
    def data_name(self) -> str:
        """Name of the data module's class."""
        return self.data.rpartition(".")[2]

    @property
    def logits(self) -> Literal["chunked", "all"]:
        """The planner's ``--logits``."""
        return "chunked" if self.chunked_logits else "all"

    @property
    def base_suffix(self) -> str | None:
        """How names of its bases' classes end, such as ``"ForCausalLM"``, if all do."""
        return self.auto_class.removeprefix("AutoModel") if self.auto_class else None

    def owns(self, class_path: str) -> bool:
        """Whether ``class_path`` is its LightningModule, named where it is defined or above."""
        return _names(class_path, self.module)

    def owns_data(self, class_path: str) -> bool:
        """Whether ``class_path`` is its data module, likewise."""
        return _names(class_path, self.data)


def _names(class_path: str, public: str) -> bool:
    package, _, name = public.rpartition(".")
    return class_path.startswith(f"{package}.") and class_path.endswith(f".{name}")


TASKS: dict[str, TaskSpec] = {}


def register_task(spec: TaskSpec) -> TaskSpec:
    """Adds a task, and returns it.

    Raises:
        ConfigError: If there is another one of that name.
    """
    if TASKS.setdefault(spec.name, spec) != spec:
        raise ConfigError(
            f"There is a task {spec.name!r} already, of {TASKS[spec.name].module}. Register "
            f"{spec.module} under another name."
        )
    return spec


def tasks_of_module(class_path: str) -> list[TaskSpec]:
    """Returns the tasks of a LightningModule, by its class path."""
    return [spec for spec in TASKS.values() if spec.owns(class_path)]


def task_of_config(config: Mapping[str, Any]) -> TaskSpec | None:
    """Returns the task of a config of LightningCLI; ``None`` for a module that none has."""
    path = _value(config, "model.class_path")
    specs = tasks_of_module(path) if isinstance(path, str) else []
    default = next((spec for spec in specs if spec.selector is None), None)
    chosen = [
        spec
        for spec in specs
        if spec.selector and str(_value(config, spec.selector[0])).startswith(spec.selector[1])
    ]
    return chosen[0] if chosen else default


def _value(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


_MESSAGES = ("messages", ("messages", "system"))
_PAIR = ("prompt_completion", ("prompt", "completion", "system"))
_ALPACA = ("alpaca", ("instruction", "input", "output", "system"))
_PREFERENCE: Shapes = (("preference", ("prompt", "chosen", "rejected", "system")),)
_SEQUENCES: Shapes = (
    ("source_target", ("source", "target")),
    ("translation", ("translation",)),
    ("prompt_completion", ("prompt", "completion")),
)
_ANCHOR = ("anchor_positive", ("anchor", "positive", "negative"))
_SCORED = ("scored_pair", ("text_a", "text_b", "score"))
_RATE = "model.init_args.learning_rate"

_chat_task = partial(
    TaskSpec,
    auto_class="AutoModelForCausalLM",
    family="causal-lm",
    generates=True,
    chats=True,
    chat_template=True,
)

for _spec in (
    _chat_task(
        name="sft",
        module="lightning_peft.tasks.CausalLM",
        data="lightning_peft.SupervisedData",
        shapes=(_MESSAGES, _PAIR, _ALPACA, ("text", ("text",))),
        label_per="token",
        sequences_per_row=1,
        chunked_logits=True,
    ),
    *(
        _chat_task(
            name=name,
            module="lightning_peft.tasks.PreferenceTuning",
            data="lightning_peft.PreferenceData",
            shapes=_PREFERENCE,
            selector=("model.init_args.loss", "orpo") if name == "orpo" else None,
            label_per="token",
            sequences_per_row=2,
            defaults=((_RATE, 5e-6),),
        )
        for name in ("dpo", "orpo")
    ),
    _chat_task(
        name="kto",
        module="lightning_peft.tasks.UnpairedPreferenceTuning",
        data="lightning_peft.UnpairedPreferenceData",
        shapes=(("unpaired", ("prompt", "completion", "label", "system")), *_PREFERENCE),
        label_per="token",
        sequences_per_row=1,
        defaults=((_RATE, 5e-6),),
    ),
    _chat_task(
        name="grpo",
        module="lightning_peft.tasks.RewardTuning",
        data="lightning_peft.PromptData",
        shapes=(("prompt", ("prompt", "system")),),
        metric=("val_reward", "max"),
        defaults=((_RATE, 1e-5), ("model.init_args.beta", 0.0)),
    ),
    TaskSpec(
        name="reward",
        module="lightning_peft.tasks.RewardModel",
        data="lightning_peft.PreferenceData",
        shapes=_PREFERENCE,
        auto_class="AutoModelForSequenceClassification",
        family="causal-lm",
        head="scalar",
        label_per="row",
        chat_template=True,
        defaults=((_RATE, 1e-4),),
    ),
    TaskSpec(
        name="text-classification",
        module="lightning_peft.tasks.TextClassifier",
        data="lightning_peft.TextClassificationData",
        shapes=(("text_label", ("text", "label", "text_pair")),),
        auto_class="AutoModelForSequenceClassification",
        family="encoder",
        head="labels",
        label_per="row",
    ),
    TaskSpec(
        name="token-classification",
        module="lightning_peft.tasks.TokenClassifier",
        data="lightning_peft.TokenClassificationData",
        shapes=(("tokens_tags", ("tokens", "tags")),),
        auto_class="AutoModelForTokenClassification",
        family="encoder",
        head="labels",
        label_per="token",
    ),
    TaskSpec(
        name="embedding",
        module="lightning_peft.tasks.SentenceEmbedder",
        data="lightning_peft.EmbeddingData",
        shapes=(_ANCHOR, _SCORED),
        auto_class="AutoModel",
        family="encoder",
        sentence_class="SentenceTransformer",
        sequences_per_row=2,
    ),
    TaskSpec(
        name="reranker",
        module="lightning_peft.tasks.Reranker",
        data="lightning_peft.RerankingData",
        shapes=(_ANCHOR, _SCORED),
        auto_class="AutoModelForSequenceClassification",
        family="encoder",
        head="scalar",
        label_per="row",
        sentence_class="CrossEncoder",
        sequences_per_row=2,
    ),
    *(
        TaskSpec(
            name=name,
            module="lightning_peft.tasks.Seq2SeqLM",
            data="lightning_peft.Seq2SeqData",
            shapes=_SEQUENCES,
            selector=("data.init_args.prefix", "transl") if name == "translation" else None,
            family="seq2seq",
            generates=True,
        )
        for name in ("summarization", "translation")
    ),
    TaskSpec(
        name="speech-recognition",
        module="lightning_peft.tasks.SpeechRecognizer",
        data="lightning_peft.SpeechData",
        shapes=(("speech", ("audio", "transcript")),),
        reader="AutoProcessor",
        processor_argument="processor",
        family="speech",
        generates=True,
    ),
    TaskSpec(
        name="image-classification",
        module="lightning_peft.tasks.ImageClassifier",
        data="lightning_peft.ImageData",
        shapes=(("image_label", ("image", "label")),),
        auto_class="AutoModelForImageClassification",
        reader="AutoImageProcessor",
        processor_argument="processor",
        family="image",
        head="labels",
        replaces_head=True,
        label_per="row",
        metric=("val_accuracy", "max"),
    ),
    TaskSpec(
        name="image-text-to-text",
        module="lightning_peft.tasks.ImageTextToText",
        data="lightning_peft.ImageTextData",
        shapes=(
            ("image_messages", ("images", *_MESSAGES[1])),
            ("image_prompt", ("images", *_PAIR[1])),
        ),
        auto_class="AutoModelForImageTextToText",
        reader="AutoProcessor",
        processor_argument="processor",
        family="image-text",
        label_per="token",
        generates=True,
        chats=True,
        sees=True,
        chat_template=True,
        sequences_per_row=1,
    ),
    TaskSpec(
        name="time-series",
        module="lightning_peft.tasks.Forecaster",
        data="lightning_peft.SeriesData",
        reader=None,
        processor_argument=None,
        family="series",
        defaults=((_RATE, 1e-3), ("data.init_args.batch_size", 64)),
    ),
):
    register_task(_spec)
