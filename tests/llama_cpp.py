"""llama.cpp itself, on the CPU: what it makes of GGUF files."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import time
import urllib.request
import weakref
from pathlib import Path
from typing import Any

import pytest


class LlamaCpp:
    """A GGUF file as llama.cpp loads it.

    Attributes:
        address: Of its server.
    """

    def __init__(
        self,
        file: Path,
        adapter: Path | None = None,
        context: int = 256,
        template: str | None = None,
    ) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            pytest.skip("llama.cpp is not installed")
        given = (str(file), adapter and str(adapter), context, template)
        # A process of its own, which is killed: the destructor of the server can wait for ever.
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(given)], stdout=subprocess.PIPE, text=True
        )
        self._end = weakref.finalize(self, _kill, self._process)
        assert self._process.stdout is not None
        found, _, _ = select.select([self._process.stdout], [], [], 100)
        self.address = self._process.stdout.readline().strip() if found else ""
        assert self.address, f"llama.cpp did not load {file}"

    def _post(self, path: str, fields: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.address + path,
            json.dumps(fields).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=100) as answer:
            return json.loads(answer.read())

    def props(self) -> dict[str, Any]:
        """Returns its facts of the model."""
        with urllib.request.urlopen(self.address + "/props", timeout=100) as answer:
            return json.loads(answer.read())

    def tokens(self, text: str, special: bool = True, parse: bool = True) -> list[int]:
        """Returns the ids of a text."""
        fields = {"content": text, "add_special": special, "parse_special": parse}
        return self._post("/tokenize", fields)["tokens"]

    def prompt(self, messages: list[dict[str, str]]) -> str:
        """Returns a conversation as text, by the chat template in the file."""
        return self._post("/apply-template", {"messages": messages})["prompt"]

    def continued(self, ids: list[int], count: int, top: int = 1) -> dict[str, Any]:
        """Returns the likeliest next tokens, and the ``top`` log-probabilities at each."""
        fields = {"prompt": ids, "n_predict": count, "temperature": 0.0, "n_probs": top}
        found = self._post("/completion", {**fields, "cache_prompt": False, "return_tokens": True})
        return {
            "tokens": found["tokens"],
            "logprobs": [
                {each["id"]: each["logprob"] for each in step["top_logprobs"]}
                for step in found.get("completion_probabilities", [])
            ],
            "stop": found["stop_type"],
        }


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def serve(file: str, adapter: str | None, context: int, template: str | None) -> None:
    """Serves a file until the process is killed, and prints the address."""
    import xllamacpp as llama

    params = llama.CommonParams()
    params.model.path, params.n_ctx = file, context
    params.n_parallel, params.warmup, params.verbosity = 1, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # What it keeps for the next request, and computes with on the way, in full precision.
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.fit_params = False
    if template is not None:
        params.chat_template = template
    if adapter is not None:
        params.lora_adapters = [llama.CommonAdapterLoraInfo(adapter, 1.0)]
    server = llama.Server(params)
    print(server.listening_address, flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


if __name__ == "__main__":
    serve(*json.loads(sys.argv[1]))
