"""Environment variables of training processes, without the server's secrets."""

from __future__ import annotations

import os
from collections.abc import Mapping

from gradio_app.settings import Settings

_SYSTEM = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "SYSTEMROOT")
_PLACES = ("TMPDIR", "TEMP", "TMP", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
_NETWORK = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_LIBRARIES = ("LD_LIBRARY_PATH", "LD_PRELOAD", "TOKENIZERS_PARALLELISM", "MALLOC_ARENA_MAX")
_SPACE = ("SPACE_ID", "SPACES_ZERO_GPU")
# The token of whoever owns a Space opens what no visitor may see.
_OWNERS = ("HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN")
_NAMES = {*_SYSTEM, *_PLACES, *_NETWORK, *_CERTIFICATES, *_LIBRARIES, *_SPACE, *_OWNERS}
_NAMES |= {name.lower() for name in _NETWORK}
_BEGINNINGS = (
    *("LC_", "XDG_", "HF_", "CUDA_", "NVIDIA_", "NCCL_", "OMP_", "MKL_", "OPENBLAS_", "TORCH"),
    *("PYTORCH_", "BNB_", "TRANSFORMERS_", "CONDA_"),
)
# Loggers that a person uses on a machine of their own.
_PERSONAL = ("WANDB_", "MLFLOW_", "COMET_")


def training_environment(
    settings: Settings, outer: Mapping[str, str] = os.environ, loggers: bool = True
) -> dict[str, str]:
    """Returns the environment of a process that runs the command line.

    ``loggers`` passes their credentials, on a machine of one's own.
    """
    personal = loggers and not settings.space
    beginnings = _BEGINNINGS + _PERSONAL if personal else _BEGINNINGS
    kept = {
        name: value
        for name, value in outer.items()
        if name in _NAMES or name.startswith(beginnings)
    }
    if settings.space:
        for name in _OWNERS:
            kept.pop(name, None)
        # Or the library would look for the token in a file of the owner's.
        kept["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
    # Threads that wait for each other with their cores held make a run many times slower where the
    # page, a chat or another program uses the cores too.
    kept.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Without a safe path, a file called like a library, where the data lies, would be imported.
    return {**kept, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
