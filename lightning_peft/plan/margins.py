"""Prediction margins, and process memory outside of torch."""

from __future__ import annotations

# Bounds of predicted over measured tensors, minus one. On the CPU from the measured grid
# (benchmarks/planner_grid_cpu.json), whose worst rows are 1 % under and 0.5 % over; a test compares
# the two. On a GPU nothing was measured: this is the range in which the published figures on
# docs/planner.md come out.
UNDER = {"cpu": 0.02, "cuda": 0.15}
OVER = {"cpu": 0.02, "cuda": 0.15}

# Libraries, tokenizer and data: least, usual and most bytes. On the CPU resident memory, mapped
# files included: after the imports of `lightning-peft fit`, then with a tokenizer, some thousand
# rows and all code that a run reaches (benchmarks/records/process_memory.json). On a GPU the CUDA
# context, the libraries and their workspaces: an assumption.
PROCESS_BYTES = {
    "cpu": (600_000_000, 690_000_000, 800_000_000),
    "cuda": (800_000_000, 800_000_000, 800_000_000),
}

# Part of that on GPUs are cuBLAS' workspaces, 32 MiB from compute capability 9 and 8.1 MiB before
# (torch, cuda/CUDABlas), for each thread that multiplies: forward and backward. torch's allocator
# counts them among tensors.
WORKSPACE_BYTES = {True: 2 * (32 << 20), False: 2 * 8_519_680}

# On CPUs, oneDNN compiles a kernel for each shape of a product of 16-bit matrices, and keeps the
# last 1,024 (ONEDNN_PRIMITIVE_CACHE_CAPACITY). On AVX512-BF16 one takes about 0.7 MB (same record).
# Batches of another length need other kernels. In float32 there are none to speak of.
KERNEL_BYTES, KERNELS_KEPT = 730_000, 1024

# On CPUs, the C library keeps freed blocks of up to 32 MB, and batches of other lengths leave gaps
# between them: a share of what a step computes, least, usual and most.
HEAP = (0.0, 0.3, 0.7)

# Share of the device up to which a run fits comfortably: batches differ, and memory fragments.
COMFORTABLE = 0.85
