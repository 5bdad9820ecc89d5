"""Chat requests: a conversation and sampling settings, validated before they are sent."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradio_app.errors import UserError

# Those of a user may have `images`: paths of files that Gradio has received.
Turns = Sequence[dict[str, Any]]
MAX_TEXT = 20_000
MAX_TURNS = 60
# Images of a question, and bytes of all images of a conversation.
MAX_IMAGES, MAX_IMAGE_BYTES = 4, 20_000_000
MAX_NEW_TOKENS = 1_024
MAX_TEMPERATURE = 2.0
MAX_TOP_K = 1_000
MAX_REPETITION_PENALTY = 5.0
# Stop texts, and the longest of them.
MAX_STOP, MAX_STOP_LENGTH = 8, 100
# What is set at a click: temperature, top-p, top-k and repetition penalty.
PRESETS: dict[str, tuple[float, float, int, float]] = {
    "greedy": (0.0, 1.0, 0, 1.0),
    "balanced": (0.7, 0.9, 0, 1.0),
    "creative": (1.0, 0.95, 50, 1.05),
}


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, as ``chat --serve`` takes it; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields of a request."""
        return asdict(self)


def validate_sampling(
    temperature: Any,
    top_p: Any,
    tokens: Any,
    seed: Any,
    top_k: Any = 0,
    repetition: Any = 1.0,
    stop: Any = "",
) -> Sampling:
    """Returns the settings that a visitor has chosen; raises UserError if one is out of range."""
    return Sampling(
        temperature=_number("temperature", temperature, 0, MAX_TEMPERATURE),
        top_p=_number("top_p", top_p, 0.01, 1),
        max_new_tokens=int(_number("length", tokens, 1, MAX_NEW_TOKENS)),
        seed=int(_number("seed", seed, 0, 2**53)),
        top_k=int(_number("top_k", top_k, 0, MAX_TOP_K)),
        repetition_penalty=_number("repetition", repetition, 0.1, MAX_REPETITION_PENALTY),
        stop=_stop_texts(stop),
    )


def _stop_texts(text: Any) -> tuple[str, ...]:
    """Returns the texts, one a line; backslash and n stand for a line break."""
    lines = text.splitlines() if isinstance(text, str) else []
    found = tuple(line.replace("\\n", "\n") for line in lines if line.strip())
    if len(found) > MAX_STOP or any(len(one) > MAX_STOP_LENGTH for one in found):
        raise UserError("playground.refused_stop", most=MAX_STOP, longest=MAX_STOP_LENGTH)
    return found


def _number(name: str, value: Any, least: float, most: float) -> float:
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known or not math.isfinite(value) or not least <= value <= most:
        raise UserError(f"playground.refused_{name}", least=least, most=f"{most:,}")
    return float(value)


def validate_text(text: Any, name: str = "question") -> str:
    """Returns the text of a visitor; raises UserError if it is too long, or an empty question."""
    found = text.strip() if isinstance(text, str) else ""
    if len(found) > MAX_TEXT:
        raise UserError("playground.refused_long", most=f"{MAX_TEXT:,}")
    if not found and name == "question":
        raise UserError("playground.refused_empty")
    return found


def validate_images(value: Any) -> tuple[str, ...]:
    """Returns the paths of uploaded images; raises UserError if there are too many."""
    found = tuple(map(str, value or ()))
    if len(found) > MAX_IMAGES:
        raise UserError("playground.refused_images_many", most=MAX_IMAGES)
    return found


def user_turn(question: str, images: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the turn of a question, with its images if it has any."""
    shown = list(images)
    return {"role": "user", "content": question, **({"images": shown} if shown else {})}


def build_messages(system: str, turns: Turns) -> list[dict[str, Any]]:
    """Returns the messages of a request from turns that end in the question.

    Raises UserError if there are too many turns, or their images are too large or gone.
    """
    if len(turns) > MAX_TURNS:
        raise UserError("playground.refused_turns", n=MAX_TURNS // 2)
    try:
        sizes = [Path(path).stat().st_size for turn in turns for path in turn.get("images", ())]
        if sum(sizes) > MAX_IMAGE_BYTES:
            raise UserError("playground.refused_images_size", most=MAX_IMAGE_BYTES // 1_000_000)
        messages = [
            {**turn, "images": [_base64(path) for path in turn["images"]]}
            if "images" in turn
            else turn
            for turn in turns
        ]
    except OSError:
        # Gradio deletes files after a day.
        raise UserError("playground.refused_images_gone") from None
    return [*([{"role": "system", "content": system}] if system else []), *messages]


def _base64(path: str) -> str:
    return base64.b64encode(Path(path).read_bytes()).decode("ascii")
