"""A model that needs code of its own, as the hub has them: the code tells who has run it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from finished import BASE

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_CODE = """
import os, sys
with open({marker!r}, "a") as file:
    file.write(f"{{os.getpid()}} {{' '.join(sys.argv)}}\\n")
"""


def write(folder: Path, marker: Path) -> None:
    """Writes the shipped base as a kind of model that transformers does not know.

    Args:
        folder: Where to.
        marker: File to which the code adds a line with its process whenever it is run.
    """
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BASE / name, folder / name)
    config = json.loads((BASE / "config.json").read_text())
    config |= {"model_type": "our_own", "architectures": ["OurForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "configuration_our.OurConfig",
        "AutoModelForCausalLM": "modeling_our.OurForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    code = _CODE.format(marker=str(marker))
    (folder / "configuration_our.py").write_text(
        f"from transformers import LlamaConfig\n{code}\n"
        "class OurConfig(LlamaConfig):\n    model_type = 'our_own'\n"
    )
    (folder / "modeling_our.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_our import OurConfig\n"
        f"{code}\nclass OurForCausalLM(LlamaForCausalLM):\n    config_class = OurConfig\n"
    )


def fetched(hub: Path, name: str, marker: Path) -> Path:
    """Writes such a model into a cache of the hub, and returns its folder.

    Args:
        hub: The cache.
        name: ``namespace/name``.
        marker: As of :func:`write`.
    """
    place = hub / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    folder = place / "snapshots" / COMMIT
    write(folder, marker)
    return folder
