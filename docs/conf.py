"""Sphinx settings: Markdown pages, reference from docstrings, no network."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import command_reference
import method_table

for made in (command_reference, method_table):
    content = made.text()
    # Only where it changed, so that a build knows what is up to date.
    if not made.PAGE.is_file() or made.PAGE.read_text(encoding="utf-8") != content:
        made.PAGE.write_text(content, encoding="utf-8")

project = "lightning-peft"
author = "The lightning-peft developers"
project_copyright = author
version = release = installed_version("lightning-peft")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"

# Every reference to a public name of this package has to resolve. Names of other projects could
# only be checked by fetching their inventories, and the types inside our rooms are not public.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!lightning_peft\.\w+$).*")]

html_theme = "furo"
html_title = f"lightning-peft {release}"
