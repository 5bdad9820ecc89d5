"""What the hub accepts in the front matter of a Space.

Keys and values are those of https://huggingface.co/docs/hub/spaces-config-reference and, for
scopes, of https://huggingface.co/docs/hub/spaces-oauth, both as of August 2026. Hardware is what
huggingface_hub knows.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceHardware

_COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
_SCOPES = (
    *("email", "read-billing", "read-memberships", "read-repos", "gated-repos"),
    *("contribute-repos", "write-repos", "manage-repos", "read-collections"),
    *("write-collections", "inference-api", "read-endpoints", "write-endpoints", "jobs"),
    *("webhooks", "write-discussions"),
)
_TEXT = (
    *("title", "emoji", "app_file", "app_build_command", "base_path", "short_description"),
    # Of every repository's card: https://huggingface.co/docs/hub/repositories-licenses
    *("thumbnail", "startup_duration_timeout", "license"),
)
_LISTS = ("models", "datasets", "tags", "hf_oauth_scopes", "preload_from_hub")
_NUMBERS = ("app_port", "hf_oauth_expiration_minutes")
_SWITCHES = ("fullWidth", "pinned", "hf_oauth", "disable_embedding")
_CHOICES: dict[str, tuple[str, ...]] = {
    "colorFrom": _COLOURS,
    "colorTo": _COLOURS,
    "sdk": ("gradio", "docker", "static"),
    "suggested_hardware": tuple(one.value for one in SpaceHardware),
    "header": ("mini", "default"),
}
_PATTERNS = {
    # In quotes: YAML reads 3.10 as the number 3.1.
    "python_version": r"3\.\d+(\.\d+)?",
    "sdk_version": r"\d+\.\d+\.\d+",
    "startup_duration_timeout": r"\d+[hm]",
    "base_path": r"/.*",
    # Longer ones are refused.
    "short_description": r".{1,60}",
}
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys((*_TEXT, *_CHOICES, "python_version", "sdk_version"), (str,)),
    **dict.fromkeys(_LISTS, (list,)),
    **dict.fromkeys(_NUMBERS, (int,)),
    **dict.fromkeys(_SWITCHES, (bool,)),
    "hf_oauth_authorized_org": (str, list),
    "custom_headers": (dict,),
}
_REQUIRED = {"gradio": ("sdk_version", "app_file"), "docker": (), "static": ()}


def front_matter_problems(matter: dict[str, Any], folder: Path) -> list[str]:
    """Returns the problems that the hub would have with a repository's front matter."""
    found = []
    for key, value in matter.items():
        kinds = _KINDS.get(key)
        if kinds is None:
            found.append(f"{key}: the hub documents no such key")
        elif not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            found.append(f"{key}: {value!r} is a {type(value).__name__}, not a {names}")
        elif key in _CHOICES and value not in _CHOICES[key]:
            found.append(f"{key}: {value!r} is not one of {', '.join(_CHOICES[key])}")
        elif key in _PATTERNS and not re.fullmatch(_PATTERNS[key], str(value)):
            found.append(f"{key}: {value!r} is not of the form {_PATTERNS[key]}")
    unknown = sorted(set(map(str, matter.get("hf_oauth_scopes") or ())) - set(_SCOPES))
    found += [f"hf_oauth_scopes: {one!r} is not one of {', '.join(_SCOPES)}" for one in unknown]
    sdk = matter.get("sdk")
    required = ("title", "sdk", *_REQUIRED.get(str(sdk), ()))
    found += [f"{key}: missing" for key in required if key not in matter]
    needed = "Dockerfile" if sdk == "docker" else str(matter.get("app_file", ""))
    if needed and not (folder / needed).is_file():
        found.append(f"{needed}: the file is not in the repository")
    return found
