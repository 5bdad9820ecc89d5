"""Upload to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from lightning_peft.errors import ConfigError, HubError, first_line


def check_repo(repo: str) -> None:
    """Refuses what is not a repository name."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push-to {repo!r} is not a repository name: {error}") from error
    if repo.count("/") != 1:
        raise ConfigError(f"--push-to {repo!r}: write NAMESPACE/NAME, as in my-name/my-adapter.")


def files_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the files to push: paths in the repository, and their bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size}
        for path in files
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def check_token() -> None:
    """Asks the hub who the token belongs to, before hours of merging."""
    try:
        HfApi().whoami()
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise HubError(
            f"The hub does not say whose token this is ({first_line(error)[:200]}). Set HF_TOKEN "
            "or run `hf auth login`, and check the network (HF_HUB_OFFLINE must not be set). "
            "Without --push-to, or with --dry-run, nothing is pushed."
        ) from error


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Makes the repository if it is not there, and pushes all in one commit; returns its address.

    One that is there stays private or not; if the hub refuses, the folder stays.
    """
    api = HfApi()
    try:
        created = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[file["path"] for file in files_of(folder)],
            commit_message="Upload by lightning-peft export",
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise HubError(
            f"The hub did not take {repo!r} ({first_line(error)[:200]}). Nothing is lost: the "
            f"export is complete in {str(folder)!r}. Try again with `hf upload {repo} {folder}`."
        ) from error
    return str(created)
