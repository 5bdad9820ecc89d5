"""``python -m gradio_app``: the same as ``lightning-peft app``."""

from __future__ import annotations

import sys

from lightning_peft.cli import main

if __name__ == "__main__":
    sys.exit(main(["app", *sys.argv[1:]]))
