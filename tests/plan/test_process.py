"""The memory of whole processes on the CPU, against what is planned for them."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import llama_config

from lightning_peft.plan.margins import KERNEL_BYTES, KERNELS_KEPT
from lightning_peft.plan.prediction import plan_memory

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "lightning_peft" / "demo" / "base"


@pytest.fixture
def benchmark(monkeypatch):
    """The script of the measurement."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("process_memory")


def test_the_peak_of_a_real_run_is_in_the_planned_range(tmp_path, benchmark):
    row = {**benchmark.ROWS[1], "steps": 3}
    run = tmp_path / "run"
    words = benchmark.words_of(row, DEMO, benchmark.data_of(row, DEMO, tmp_path), run)
    words[0:1] = [sys.executable, "-m", "lightning_peft.cli"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads((run / "result.json").read_text())["peak_memory"]["process_bytes"]
    plan = benchmark.plan(row)
    assert plan.low_bytes <= measured <= plan.high_bytes
    # Three steps know few lengths; the plan is that of a longer run.
    assert 0.9 <= plan.peak_bytes / measured <= 1.6


@pytest.mark.parametrize("model", ["demo", pytest.param("smollm2", marks=pytest.mark.long)])
def test_every_recorded_peak_is_in_the_planned_range(benchmark, model):
    rows = [row for row in benchmark.read(benchmark.NAME)["rows"] if row["model"] == model]
    # A variable leaves out what the plan counts.
    rows = [row for row in rows if not row["variable"]]
    assert rows
    for row in rows:
        plan = benchmark.plan(row)
        assert plan.low_bytes <= row["measured"] <= plan.high_bytes, row
        assert 0.7 <= plan.peak_bytes / row["measured"] <= 1.5, row


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_are_counted_where_products_are_in_16_bits(dtype):
    config = llama_config(vocab_size=256, intermediate_size=128, architectures=["LlamaForCausalLM"])
    plan = plan_memory(config, dtype=dtype, method="lora", seq_len=32, device="cpu")
    kernels = plan.breakdown["kernels"]
    if dtype == "float32":
        assert plan.trace.products == kernels == 0
    else:
        assert 8 <= plan.trace.products <= 40
        assert kernels == KERNELS_KEPT // 2 * KERNEL_BYTES
    # A layer more has no new shapes.
    config.num_hidden_layers = 3
    more = plan_memory(config, dtype=dtype, method="lora", seq_len=32, device="cpu")
    assert more.trace.products == plan.trace.products
    on_gpu = plan_memory(config, dtype=dtype, method="lora", seq_len=32, device="cuda")
    assert on_gpu.breakdown["kernels"] == on_gpu.breakdown["heap"] == 0
