"""Export requests: validation, and translation to command line arguments."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gradio_app.errors import UserError
from gradio_app.guards import checked_hub_name, shortened
from gradio_app.runs.run_task import task_of_run
from gradio_app.runs.types import Checkpoint, Run

SENTENCES, GGUF_ADAPTER = "sentence-transformers", "gguf-adapter"
FORMATS = ("adapter", "merged", "quantized", SENTENCES, "gguf", GGUF_ADAPTER, "vllm", "ollama")
# For programs that run language models.
_GENERATING = frozenset({"gguf", GGUF_ADAPTER, "vllm", "ollama"})
# These write the whole model, and need memory for it.
FULL_MODEL_FORMATS = frozenset({"merged", "quantized", SENTENCES, "gguf", "ollama"})
# What is worth a place on the hub; the others are commands for programs on a machine.
PUSHABLE_FORMATS = tuple(name for name in FORMATS if name not in ("vllm", "ollama"))
BITS = (8, 4)
# llama.cpp's names of what numbers are stored in; formats with a GGUF file have them.
OUTTYPES = ("f16", "bf16", "q8_0")
GGUF_FORMATS = frozenset({"gguf", "ollama"})


@dataclass(frozen=True)
class ExportRequest:
    """What is to be exported.

    ``measure`` compares outputs, which loads the model. ``base_name`` is what the files call the
    base, where it is not what the run called it; ``push_to`` is empty for no push.
    """

    format: str = "adapter"
    checkpoint: str = "best"
    bits: int = 8
    outtype: str = "f16"
    measure: bool = False
    base_name: str = ""
    push_to: str = ""
    private: bool = True

    @property
    def writes_model(self) -> bool:
        """Whether it writes the whole model."""
        return self.format in FULL_MODEL_FORMATS

    def argv(self, adapter: str, output: Path, dry_run: bool) -> list[str]:
        """Returns the arguments of ``lightning-peft``; ``adapter`` is ``NAME=FOLDER``."""
        words = ["export", f"--format={self.format}", "--json"]
        if self.format == GGUF_ADAPTER:
            words[1:2] = ["--format=gguf", "--adapter-only"]
        if self.format == "quantized":
            words.append(f"--bits={self.bits}")
        if self.format in GGUF_FORMATS:
            words.append(f"--outtype={self.outtype}")
        if self.writes_model and not self.measure:
            words.append("--no-measure")
        if self.base_name:
            words.append(f"--base-name={self.base_name}")
        if self.push_to:
            words += [f"--push-to={self.push_to}", "--private" if self.private else "--no-private"]
            words += ["--dry-run"] if dry_run else []
        # Nothing that follows can become an option.
        return [*words, "--", adapter, str(output)]


def validate_request(
    run: Run,
    kind: object,
    checkpoint: object,
    *,
    bits: object = 8,
    outtype: object = "f16",
    measure: object = False,
    base_name: object = "",
    push_to: object = None,
    private: object = True,
) -> ExportRequest:
    """Returns the validated request of a visitor.

    ``push_to`` is ``None`` if nothing is pushed, and anything but ``private=False`` makes the
    repository private. Raises UserError if a value is not one that was offered.
    """
    if kind not in (FORMATS if push_to is None else PUSHABLE_FORMATS):
        raise UserError("export.refused_format", format=shortened(kind))
    if kind not in formats_of(run):
        raise UserError("export.refused_task", format=shortened(kind))
    if bits not in BITS:
        raise UserError("export.refused_bits", bits=shortened(bits))
    if outtype not in OUTTYPES:
        raise UserError("export.refused_outtype", outtype=shortened(outtype))
    found = find_checkpoint(run, checkpoint)
    name = str(base_name or "").strip()
    repository = checked_hub_name(push_to) if push_to is not None else ""
    if push_to is not None and "/" not in repository:
        raise UserError("errors.hub_name", name=shortened(push_to))
    return ExportRequest(
        format=str(kind),
        checkpoint=found.name,
        bits=int(str(bits)),
        outtype=str(outtype),
        measure=measure is True,
        base_name=checked_hub_name(name) if name else "",
        push_to=repository,
        private=private is not False,
    )


def formats_of(run: Run) -> tuple[str, ...]:
    """Returns the formats that models of a run's task have."""
    task = task_of_run(run)
    generates = task is None or task.auto_class == "AutoModelForCausalLM"
    left_out = set() if generates else set(_GENERATING)
    if task is not None and task.auto_class == "AutoModelForImageTextToText":
        left_out.remove("vllm")
    if task is None or task.sentence_class is None:
        left_out.add(SENTENCES)
    return tuple(name for name in FORMATS if name not in left_out)


def find_checkpoint(run: Run, name: object) -> Checkpoint:
    """Returns a checkpoint of a run. Raises UserError if it has none of that name."""
    found = next((one for one in run.checkpoints() if one.name == name), None)
    if found is None:
        raise UserError("export.refused_checkpoint", name=shortened(name))
    return found


def slug(run: Run) -> str:
    """Returns the name of a run's adapter in files and programs."""
    return re.sub(r"[^a-z0-9]+", "-", run.name.lower()).strip("-")[:40].strip("-") or "adapter"
