"""Whether what a run trains can be talked to at all: a classifier has no answer to give."""

from __future__ import annotations

import re

from gradio_app.runs.files import read_json_object
from gradio_app.runs.store import Run

CHAT_TASKS = frozenset({"CausalLM", "PreferenceTuning"})
# Tasks of the library that write nothing that could go on as a conversation, by the name of what
# is said of them.
UNSUPPORTED_TASKS = {
    "Forecaster": "forecaster",
    "ImageClassifier": "image_classifier",
    "RewardModel": "reward_model",
    "Seq2SeqLM": "seq2seq",
    "SpeechRecognizer": "speech_recognizer",
    "TextClassifier": "text_classifier",
    "TokenClassifier": "token_classifier",
}
_OURS = r"lightning_peft\.tasks\.(?:\w+\.)?(\w+)"
_TASK = re.compile(_OURS)
_IN_RECIPE = re.compile(rf"^model:\n\s+class_path: {_OURS}$", re.MULTILINE)


def unsupported_task(run: Run) -> str:
    """Returns which kind of task a run trains that cannot be talked to.

    Empty for one that can, and for a user's own task: its base may well be a language model, and
    loading it says whether it is.
    """
    recorded = read_json_object(run.folder.provenance).get("task")
    found = _TASK.fullmatch(recorded) if isinstance(recorded, str) else None
    if recorded is None:
        # It has not begun yet.
        found = _IN_RECIPE.search(run.recipe_text)
    return UNSUPPORTED_TASKS.get(found[1], "") if found else ""
