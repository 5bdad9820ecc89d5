"""``python -m lightning_peft.cli``."""

from __future__ import annotations

import sys

from lightning_peft.cli import main

sys.exit(main())
