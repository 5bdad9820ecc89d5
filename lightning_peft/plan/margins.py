"""How far predictions were off, and what no allocator sees."""

from __future__ import annotations

# Worst errors over the measured grid (benchmarks/planner_grid_cpu.json), rounded up: predicted
# over measured, minus one. The tests compare them with the records.
UNDER = 0.10
OVER = 0.25

# What a process takes on a device besides torch's tensors: the CUDA context with its libraries and
# their workspaces. An assumption, not a measurement of this project. On the CPU it is the
# interpreter with the libraries, which is there before anything is planned.
OVERHEAD = {"cuda": 800_000_000, "cpu": 0}
