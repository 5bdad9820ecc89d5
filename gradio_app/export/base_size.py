"""Size of a base model, read from file headers without loading weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gradio_app.recipe.gguf_header import gguf_header
from gradio_app.recipe.model_files import cached_folder, tensor_sizes
from gradio_app.runs.files import read_json_object
from lightning_peft.errors import LightningPeftError
from lightning_peft.model_reference import parse_model_reference, written_reference

# What the libraries take besides the weights.
_LIBRARIES = 800_000_000


@dataclass(frozen=True)
class BaseSize:
    """The parameters of a base, in all and of its largest tensor."""

    parameters: int
    largest: int

    @property
    def merged_bytes(self) -> int:
        """Bytes of the merged 16-bit model."""
        return 2 * self.parameters

    def quantized_bytes(self, bits: int) -> int:
        """Bytes of the quantized model at least: embeddings stay 16-bit."""
        return self.parameters * bits // 8

    def gguf_bytes(self, outtype: str) -> int:
        """Bytes of a GGUF file."""
        return self.parameters * (34 if outtype == "q8_0" else 64) // 32

    def memory_bytes(self, kind: str, measure: bool) -> int:
        """Returns about how many bytes of memory an export takes.

        Merging holds a few copies of one tensor in float32; quantizing loads the merged model;
        comparing outputs loads it in float32 and computes with it.
        """
        work = 4 * 4 * self.largest
        if kind == "quantized":
            work = max(work, self.merged_bytes)
        if measure:
            work = max(work, 2 * 4 * self.parameters)
        return _LIBRARIES + work


def recorded_base(checkpoint: Path) -> tuple[str, str | None]:
    """Returns the base that a checkpoint records, and its commit; an empty name for none."""
    base = read_json_object(checkpoint / "provenance.json", "base")
    if not base:
        name = read_json_object(checkpoint / "adapter_config.json").get("base_model_name_or_path")
        return str(name or ""), None
    revision = base.get("revision")
    return str(base.get("name_or_path") or ""), str(revision) if revision else None


def base_size(checkpoint: Path, root: Path | None = None) -> BaseSize | None:
    """Returns the size of a checkpoint's base; ``None`` if its files are not on this machine.

    A relative path of the base is taken from ``root``, where runs are started.
    """
    name, revision = recorded_base(checkpoint)
    if not name:
        return None
    reference = written_reference(name)
    place, file = Path(reference.place), reference.gguf_file
    if root is not None and (root / place).is_dir():
        place = root / place
    folder = place if place.is_dir() else cached_folder(reference.place, revision)
    if folder is None:
        return None
    try:
        # A folder with one GGUF file alone stands for that.
        file = file or parse_model_reference(folder).gguf_file
    except LightningPeftError:
        return None
    files = [folder / file] if file else list(folder.glob("*.safetensors"))
    sizes = [gguf_header(one).sizes if file else tensor_sizes(one) or () for one in files]
    if not sizes or not all(sizes):
        return None
    return BaseSize(sum(map(sum, sizes)), max(map(max, sizes)))
