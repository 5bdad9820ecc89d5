"""What the form offers: tasks, models, example data, three amounts of training, GPUs."""

from __future__ import annotations

from dataclasses import dataclass

DEMO_BASE = "package:demo/base"


@dataclass(frozen=True)
class Task:
    """A kind of training.

    Attributes:
        name: That of its recipes: ``NAME-lora``, ``NAME-qlora``.
        module: Class of its task.
        small_recipe: Name of the recipe that makes a small trial of it.
        processor_argument: Argument of the data module that names the tokenizer or processor.
        sequences_per_row: Sequences that the planner counts for a row; 0 where it cannot plan.
        shapes: Shapes of rows that it takes, with the fields that each needs or may have.
    """

    name: str
    module: str
    small_recipe: str
    processor_argument: str | None = "tokenizer"
    sequences_per_row: int = 0
    shapes: tuple[tuple[str, tuple[str, ...]], ...] = ()


_MESSAGES = ("messages", ("messages", "system"))
_PAIR = ("prompt_completion", ("prompt", "completion", "system"))
_ALPACA = ("alpaca", ("instruction", "input", "output", "system"))
_PREFERENCE = (("preference", ("prompt", "chosen", "rejected", "system")),)
_SEQUENCES = (
    ("source_target", ("source", "target")),
    ("translation", ("translation",)),
    ("prompt_completion", ("prompt", "completion")),
)
TASKS = (
    Task(
        "sft",
        "CausalLM",
        "sft",
        sequences_per_row=1,
        shapes=(_MESSAGES, _PAIR, _ALPACA, ("text", ("text",))),
    ),
    Task("dpo", "PreferenceTuning", "dpo", sequences_per_row=2, shapes=_PREFERENCE),
    Task("orpo", "PreferenceTuning", "orpo", sequences_per_row=2, shapes=_PREFERENCE),
    Task("reward", "RewardModel", "reward", shapes=_PREFERENCE),
    Task(
        "text-classification",
        "TextClassifier",
        "text-classification",
        shapes=(("text_label", ("text", "label", "text_pair")),),
    ),
    Task(
        "token-classification",
        "TokenClassifier",
        "token-classification",
        shapes=(("tokens_tags", ("tokens", "tags")),),
    ),
    Task("summarization", "Seq2SeqLM", "summarization", shapes=_SEQUENCES),
    Task("translation", "Seq2SeqLM", "translation", shapes=_SEQUENCES),
    Task(
        "speech-recognition",
        "SpeechRecognizer",
        "speech-recognition",
        processor_argument="processor",
        shapes=(("speech", ("audio", "transcript")),),
    ),
    Task(
        "image-classification",
        "ImageClassifier",
        "image-classification",
        processor_argument="processor",
        shapes=(("image_label", ("image", "label")),),
    ),
    Task("time-series", "Forecaster", "time-series", processor_argument=None),
)
TASK_NAMES = tuple(task.name for task in TASKS)


@dataclass(frozen=True)
class Model:
    """A base that is offered.

    Attributes:
        name: On the hub, or in the package.
        parameters: Its weights.
        licence: As its authors call it.
        tasks: Names of the tasks that it is offered for.
        gated: Whether its authors must first be asked on the hub.
        has_chat_template: Whether it has a chat template of its own.
        bytes_per_parameter: Bytes that a weight takes in its files on the hub.
    """

    name: str
    parameters: int
    licence: str
    tasks: tuple[str, ...]
    gated: bool = False
    has_chat_template: bool = True
    bytes_per_parameter: int = 2

    @property
    def download_bytes(self) -> int:
        """Bytes that are fetched from the hub; what is not weights is little."""
        return self.bytes_per_parameter * self.parameters

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in 16 bits."""
        return 2 * self.parameters


_CHAT = ("sft", "dpo", "orpo", "reward")
_CLASSIFICATION = ("text-classification", "token-classification")
_SEQUENCE = ("summarization", "translation")
# Tasks that train the same kinds of models.
FAMILIES = (_CHAT, _CLASSIFICATION, _SEQUENCE)
MODELS = (
    Model(DEMO_BASE, 4_262_144, "Apache 2.0", (*_CHAT, *_CLASSIFICATION), has_chat_template=False),
    Model("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, "Apache 2.0", _CHAT),
    Model("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120, "Apache 2.0", _CHAT),
    Model("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, "Apache 2.0", _CHAT),
    Model("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, "Llama 3.2", _CHAT, gated=True),
    Model("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304, "Apache 2.0", _CHAT),
    Model("HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384, "Apache 2.0", _CHAT),
    Model("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512, "Apache 2.0", _CHAT),
    Model("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, "Llama 3.1", _CHAT, gated=True),
    Model(
        "answerdotai/ModernBERT-base",
        149_014_272,
        "Apache 2.0",
        _CLASSIFICATION,
        has_chat_template=False,
        bytes_per_parameter=4,
    ),
    Model(
        "google-t5/t5-small",
        60_506_624,
        "Apache 2.0",
        _SEQUENCE,
        has_chat_template=False,
        bytes_per_parameter=4,
    ),
    Model(
        "google/flan-t5-base",
        247_577_856,
        "Apache 2.0",
        _SEQUENCE,
        has_chat_template=False,
        bytes_per_parameter=4,
    ),
    Model(
        "openai/whisper-tiny",
        37_760_640,
        "Apache 2.0",
        ("speech-recognition",),
        has_chat_template=False,
        bytes_per_parameter=4,
    ),
    Model(
        "openai/whisper-small",
        241_734_912,
        "Apache 2.0",
        ("speech-recognition",),
        has_chat_template=False,
        bytes_per_parameter=4,
    ),
    Model(
        "facebook/dinov2-small",
        22_056_576,
        "Apache 2.0",
        ("image-classification",),
        has_chat_template=False,
        bytes_per_parameter=4,
    ),
)

# How long and how strongly: epochs, rank, and what the learning rate of the recipe is taken by.
AMOUNTS: dict[str, tuple[int, int, float]] = {
    "quick": (1, 8, 1.0),
    "balanced": (2, 16, 1.0),
    "thorough": (4, 32, 0.5),
}
# GPUs by the planner's names; what others have is given as an amount.
GPUS = (
    *("t4", "l4", "a10g", "a100-40", "a100-80", "h100", "h200"),
    *("rtx3060", "rtx3080", "rtx3090", "rtx4060", "rtx4070", "rtx4080", "rtx4090"),
    *("rtx5070", "rtx5080", "rtx5090", "rtxa6000"),
)
THIS_MACHINE = "this"


def get_task(name: str) -> Task:
    """Returns the task of that name; the first for one that is none."""
    return next((task for task in TASKS if task.name == name), TASKS[0])
